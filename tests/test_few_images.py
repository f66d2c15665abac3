"""A stem on a CPU a few images at a time: the same values as all at once, where it applies and where not."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP16, FP32, require
from parity import assert_parity
from stem_networks import network
from torch import nn

import fused_resblock as frb
from fused_resblock import backends
from fused_resblock.backends import few_images, onednn
from fused_resblock.kernels.pool import POOL
from fused_resblock.params import Conv, Epilogue


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Two images' worth of 8 channels of 12x10 in fp32."""
    monkeypatch.setattr(few_images, "CACHED", -(-2 * 8 * 12 * 10 * 4 // torch.get_num_threads()))


@pytest.fixture
def counted(monkeypatch):
    """How many images each convolution was given."""
    seen, bind = [], onednn.bind_conv_bn_act

    def counting(x, *args):
        run = bind(x, *args)
        return lambda x, other: seen.append(len(x)) or run(x, other)

    monkeypatch.setattr(onednn, "bind_conv_bn_act", counting)
    return seen


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("images", "pieces"), [(1, 1), (2, 1), (3, 3), (4, 2), (6, 3)])
def test_parity(images, pieces, dtype, counted):
    require("onednn", dtype)
    reference = network(width=8).to(dtype)
    fused = frb.fuse(reference, strict=True)
    x = torch.randn(images, 3, 24, 20).to(dtype)
    with torch.no_grad():
        counted.clear()
        y = fused(x)
        stem = counted[:pieces]
        exact = network(width=8).to(dtype).double()(x.double())
        assert_parity(y, reference(x), exact, what="logits", floor=1e-5)
        assert torch.equal(fused(x), y)
    if dtype == FP32:
        assert stem == [images // pieces] * pieces


def conv(k: int = 8, stride: int = 2) -> Conv:
    torch.manual_seed(0)
    return Conv(torch.randn(k, 3, 7, 7).to(memory_format=torch.channels_last), None, None, (stride, stride), (3, 3))


def image(n: int = 4, h: int = 24, w: int = 20) -> torch.Tensor:
    return torch.randn(n, 3, h, w).to(memory_format=torch.channels_last)


def test_the_pool_is_torchs_to_the_bit_and_keeps_nan():
    require("onednn")
    x = image()
    for relu, value in ((True, 0.0), (False, float("nan"))):  # oneDNN's fused ReLU makes NaN 0
        x[1, :, 5, 5] = value
        y = few_images.bind_stem(x, conv(), relu, POOL)(x, None)
        z = torch.conv2d(x, conv().weight, None, 2, 3)
        expected = torch.max_pool2d(z.relu() if relu else z, 3, 2, 1)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert y[1].isnan().any()
    pooled = torch.empty(2, 5, 3, 4).to(memory_format=torch.channels_last)
    values = torch.randn(2, 5, 6, 8).to(memory_format=torch.channels_last)
    expected = torch.max_pool2d(values, 3, 2, 1)
    few_images._max_pool(values, pooled)
    assert torch.equal(pooled, expected)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_numbers_of_16_bits_are_pooled_to_the_bit(dtype, relu, monkeypatch):
    require("onednn", dtype)
    x, layer = image().to(dtype), conv()._replace(weight=conv().weight.to(dtype))
    z = onednn.bind_conv_bn_act(x, layer, None, Epilogue(relu=relu), False)(x, None)
    assert (z.min() < 0) == (not relu)
    z[0] = 0.0
    z[1, :, :4, :4] = float("inf")
    z[2, :, :2, :2] = -0.0
    monkeypatch.setattr(few_images, "CACHED", 1 << 30)
    monkeypatch.setattr(onednn, "bind_conv_bn_act", lambda *_: lambda *_: z.clone())
    assert torch.equal(few_images.bind_stem(x, layer, relu, POOL)(x, None), torch.max_pool2d(z, 3, 2, 1))


@pytest.mark.parametrize(
    ("x", "layer", "pool"),
    [
        pytest.param(image(h=22), conv(), POOL, id="odd height"),
        pytest.param(image(w=18), conv(), POOL, id="odd width"),
        pytest.param(image(), conv(k=1), POOL, id="one channel"),
        pytest.param(image(), conv(), (2, 2, 0, 1, False), id="another pool"),
        pytest.param(image(), conv(), (3, 2, 1, 1, True), id="ceil_mode"),
    ],
)
def test_where_it_does_not_apply(x, layer, pool):
    require("onednn")
    assert few_images.bind_stem(x, layer, True, pool) is None


def test_one_image_is_pooled_likewise():
    require("onednn")
    assert few_images.bind_stem(image(1), conv(), True, POOL) is not None


def test_other_backends_do_not_use_it():
    require("onednn")
    x = image()
    assert backends.bind_stem(x, conv(), True, POOL, backend="onednn") is not None
    assert backends.bind_stem(x, conv(), True, POOL) is not None
    assert backends.bind_stem(x, conv(), True, POOL, backend="eager") is None


def test_results_are_nobody_elses_memory():
    require("onednn")
    fused = frb.fuse(nn.Sequential(network(width=8)))
    x = torch.randn(4, 3, 24, 20)
    with torch.no_grad():
        first = fused(x)
        kept = first.clone()
        fused(x + 1)
    assert torch.equal(first, kept)
