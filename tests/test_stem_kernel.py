"""The stem kernel: a strided convolution of a few channels, norm, ReLU and max-pool in one pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, FP16, FP32, FP64, cast, floor, image, make_norm, normalize, require, slack_of
from parity import assert_parity
from torch import Tensor

from fused_resblock.kernels.pool import POOL
from fused_resblock.kernels.stem import bind_stem, pack_weight, refusal
from fused_resblock.kernels.tiles import StemTile
from fused_resblock.params import Conv

#: channels, output channels, filter, padding, image
CASES = {
    "7x7 of 3 channels": (3, 16, 7, 3, (19, 23)),
    "even image": (3, 32, 7, 3, (16, 24)),
    "3x3 of 4 channels, no bias": (4, 16, 3, 1, (13, 9)),
    "5x5 of 1 channel": (1, 16, 5, 2, (11, 40)),
    "no padding": (3, 16, 7, 0, (17, 15)),
    "one pixel": (3, 16, 7, 3, (1, 1)),
    "two blocks of channels": (2, 128, 3, 1, (6, 5)),
    "wider than a tile": (3, 16, 3, 1, (8, 150)),
}
PARAMS = [pytest.param(*case, id=name) for name, case in CASES.items()]
TILES = [StemTile(rows, columns, 4) for rows, columns in ((1, 16), (2, 32), (8, 16))]


def build(c: int, k: int, size: int, padding: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Conv]:
    """An image and the convolution with its norm; a bias where the filter is 5x5."""
    weight = image(k, c, size, size, dtype=dtype) / (c * size * size) ** 0.5
    bias = image(1, k, 1, 1, dtype=dtype).flatten() if size == 5 else None
    norm = make_norm(k, "affine", FP32 if dtype.itemsize < 4 else dtype)
    return image(2, c, *shape, dtype=dtype), Conv(weight, bias, norm, (2, 2), (padding, padding))


def plain(x: Tensor, conv: Conv) -> Tensor:
    """The stem in plain torch."""
    z = F.relu(normalize(F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding), conv.norm))
    return F.max_pool2d(z, 3, 2, 1)


def run(x: Tensor, conv: Conv, tile: StemTile | None = None) -> Tensor:
    """The stem in the kernel."""
    assert refusal(conv, True, POOL) is None
    return bind_stem(x, conv, pack_weight(conv.weight, bool(conv.padding[1] % 2)), tile)(x)


@pytest.mark.parametrize("tile", [pytest.param(t, id=f"{t.pooled_rows}x{t.pooled_columns}") for t in TILES])
@pytest.mark.parametrize(("c", "k", "size", "padding", "shape"), PARAMS)
def test_every_case(c, k, size, padding, shape, tile):
    require("triton")
    x, conv = build(c, k, size, padding, shape, FP32)
    y = run(x, conv, tile)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_parity(y, plain(x, conv), plain(*cast((x, conv), FP64)), what="y")


@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (FP16, BF16, FP64)])
@pytest.mark.parametrize(("c", "k", "size", "padding", "shape"), PARAMS)
def test_other_dtypes(c, k, size, padding, shape, dtype):
    require("triton", dtype)
    x, conv = build(c, k, size, padding, shape, dtype)
    exact = plain(*cast((x, conv), FP64))
    rule = {"floor": floor(dtype), "slack": slack_of("triton", dtype)}
    assert_parity(run(x, conv), plain(x, conv), exact, what="y", **rule)


@pytest.mark.parametrize("layout", ["NCHW", "rows of a larger image", "every second column"])
def test_image_of_any_layout(layout):
    require("triton")
    x, conv = build(3, 16, 7, 3, (15, 14), FP32)
    expected = run(x, conv)
    other = {
        "NCHW": x.contiguous(),
        "rows of a larger image": F.pad(x, (0, 0, 3, 2))[:, :, 3:18],
        "every second column": x.repeat_interleave(2, 3)[..., ::2],
    }[layout]
    assert torch.equal(run(other, conv), expected)


def test_nan_reaches_the_windows_that_hold_it():
    require("triton")
    x, conv = build(3, 16, 7, 3, (16, 18), FP32)
    x[1, 2, 7, 8] = float("nan")
    expected = plain(x, conv).isnan()
    assert torch.equal(run(x, conv, TILES[0]).isnan(), expected)
    assert expected.any()
    assert not expected.all()


def test_all_below_zero_gives_zero():
    require("triton")
    x, conv = build(3, 16, 7, 3, (9, 9), FP32)
    conv = conv._replace(norm=conv.norm._replace(bias=torch.full_like(conv.norm.bias, -1e3)))
    assert not run(x, conv).any()


def test_settings_in_pairs():
    layer = Conv(torch.empty(16, 3, 7, 7), stride=(2, 2), padding=(3, 3))
    assert refusal(layer, True, ((3, 3), [2, 2], (1, 1), 1, False)) is None


@pytest.mark.parametrize(
    ("conv", "relu", "pool", "word"),
    [
        ({}, True, (2, 2, 1, 1, False), "max-pool"),
        ({}, True, (3, (2, 1), 1, 1, False), "max-pool"),
        ({}, True, (3, 2, 1, 1, True), "max-pool"),
        ({}, False, POOL, "no ReLU"),
        ({"stride": (1, 1)}, True, POOL, "stride 2"),
        ({"dilation": (2, 2)}, True, POOL, "stride 2"),
        ({"weight": torch.empty(16, 5, 3, 3)}, True, POOL, "4 channels"),
        ({"weight": torch.empty(24, 3, 3, 3)}, True, POOL, "output channels"),
        ({"weight": torch.empty(48, 3, 3, 3)}, True, POOL, "output channels"),
        ({"weight": torch.empty(96, 3, 3, 3)}, True, POOL, "output channels"),
        ({"weight": torch.empty(16, 3, 17, 3)}, True, POOL, "wider than 15"),
    ],
)
def test_refusals(conv, relu, pool, word):
    layer = Conv(torch.empty(16, 3, 7, 7), stride=(2, 2), padding=(3, 3))._replace(**conv)
    assert word in refusal(layer, relu, pool)
