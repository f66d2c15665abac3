"""Strided convolutions to one column or row: oneDNN reads unwritten memory for some of them."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP32, require

from fused_resblock.backends import onednn
from fused_resblock.params import Conv, Epilogue


def conv(kernel: int, padding: int, stride: int, dilation: int = 1, groups: int = 1) -> Conv:
    torch.manual_seed(0)
    weight = torch.randn(32, 32 // groups, kernel, kernel) / (32 // groups * kernel**2) ** 0.5
    return Conv(weight, None, None, (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)


SHAPES = {
    "one column": ((28, 1), conv(3, 1, 2)),
    "two columns": ((28, 2), conv(3, 1, 2)),
    "without padding": ((28, 4), conv(3, 0, 3)),
    "7x7": ((31, 2), conv(7, 3, 3)),
    "grouped": ((28, 2), conv(3, 1, 2, groups=4)),
    "tall": ((28, 2), conv(3, 1, 2)._replace(stride=(1, 2), padding=(2, 1))),
}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("join", ["nothing", "residual", "strided residual", "shortcut"])
@pytest.mark.parametrize(("size", "layer"), SHAPES.values(), ids=SHAPES)
def test_parity(size, layer, join, dtype):
    require("onednn", dtype)
    x = torch.randn(2, 32, *size).to(dtype, memory_format=torch.channels_last)
    layer = layer._replace(weight=layer.weight.to(dtype))
    exact = torch.conv2d(x.double(), layer.weight.double(), None, *layer[3:])
    other, epilogue, added = None, Epilogue(relu=True), 0.0
    if join == "shortcut":
        other = torch.randn(2, 32, *exact.shape[2:]).to(dtype, memory_format=torch.channels_last)
        second = Conv(torch.randn(32, 32, 1, 1).to(dtype) / 6)
        epilogue = epilogue._replace(shortcut=second)
        added = torch.conv2d(other.double(), second.weight.double())
    elif join != "nothing":
        t = 2 if join == "strided residual" else 1
        other = torch.randn(2, 32, *(t * n for n in exact.shape[2:])).to(dtype, memory_format=torch.channels_last)
        epilogue = epilogue._replace(residual_stride=t)
        added = other.double()[:, :, ::t, ::t]
    kept = None if other is None else other.clone()
    y = onednn.bind_conv_bn_act(x, layer, other, epilogue, False)(x, other)
    torch.testing.assert_close(y.double(), (exact + added).relu(), rtol=0.03, atol=0.03)
    assert y.stride() == torch.empty_like(exact, memory_format=torch.channels_last).stride()
    assert other is None or torch.equal(other, kept)


@pytest.mark.parametrize(
    ("size", "layer", "dtype", "turned"),
    [
        pytest.param((28, 2), conv(3, 1, 2), BF16, True, id="one column"),
        pytest.param((28, 2), conv(3, 1, 2), FP32, True, id="fp32"),
        pytest.param((28, 3), conv(3, 1, 2), BF16, False, id="two columns"),
        pytest.param((2, 2), conv(3, 1, 2), BF16, False, id="one place"),
        pytest.param((28, 3), conv(3, 0, 1), BF16, False, id="stride 1"),
        pytest.param((28, 2), conv(1, 0, 2), BF16, False, id="1x1"),
        pytest.param((9, 2), conv(2, 2, 2, dilation=4), BF16, False, id="dilated"),
    ],
)
def test_where_it_applies(size, layer, dtype, turned):
    assert onednn._to_one_column(torch.empty(2, 32, *size, dtype=dtype), layer) == turned


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_channel(layout):
    require("onednn")
    x = torch.randn(5, 1, 28, 3).to(memory_format=layout)
    layer = Conv(torch.randn(8, 1, 4, 4), None, None, (1, 3), (1, 1))
    y = onednn.bind_conv_bn_act(x, layer, None, Epilogue(relu=False), False)(x, None)
    exact = torch.conv2d(x.double(), layer.weight.double(), None, *layer[3:])
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
