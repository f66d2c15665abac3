"""Strided convolutions to one column or row: oneDNN 3.12 reads unwritten memory for some of them with AMX."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP32, require

from fused_resblock.backends import onednn
from fused_resblock.params import Conv, Epilogue


def conv(kernel: int, padding: int, stride: int, dilation: int = 1) -> Conv:
    torch.manual_seed(0)
    weight = torch.randn(32, 32, kernel, kernel) / (32 * kernel**2) ** 0.5
    return Conv(weight, None, None, (stride,) * 2, (padding,) * 2, (dilation,) * 2)


@pytest.mark.parametrize(
    ("size", "layer", "stride"),
    [
        pytest.param((28, 1), conv(3, 1, 2), (2, 1), id="one column"),
        pytest.param((1, 28), conv(3, 1, 2), (1, 2), id="one row"),
        pytest.param((28, 3), conv(3, 0, 3), (3, 1), id="the filter is as wide as the image"),
        pytest.param((28, 1), conv(3, 2, 2, dilation=2), (2, 1), id="dilated"),
        pytest.param((28, 2), conv(3, 1, 2), (2, 2), id="one column of two places"),
        pytest.param((28, 28), conv(3, 1, 2), (2, 2), id="many columns"),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_stride_of_a_filter_that_fits_once_is_none(size, layer, stride, dtype):
    require("onednn", dtype)
    x = torch.randn(2, 32, *size).to(dtype, memory_format=torch.channels_last)
    layer = layer._replace(weight=layer.weight.to(dtype))
    assert onednn._standing(x, layer) == layer._replace(stride=stride)
    if size == (28, 2):
        return  # PyTorch's own is as wrong
    y = onednn.bind_conv_bn_act(x, layer, None, Epilogue(relu=False), False)(x, None)
    exact = torch.conv2d(x.double(), layer.weight.double(), None, *layer[3:])
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)
