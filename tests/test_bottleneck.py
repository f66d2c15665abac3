"""`bottleneck_rows`: the blocks that it takes, how images are cut into bands, and its code for Hopper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BF16, FP16, FP32
from compiling import run
from test_halo import conv_of

pytest.importorskip("triton")

from fused_resblock.kernels import bottleneck, gpu
from fused_resblock.kernels.bottleneck import (
    bands_of,
    box_of,
    cost_of,
    predicted_seconds,
    refusal,
    resident,
    shared_of,
    tiles_for,
)
from fused_resblock.kernels.choice import chip_of
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.ring import SHARED

TILE = tiles_for(128, 512, False)[0]
CHANNELS = [(64, 256, False), (64, 256, True), (128, 512, False), (128, 256, True)]


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of the kind, and a release of Triton, that the kernel is for."""
    monkeypatch.setattr(bottleneck, "gpu_of", lambda device: Gpu(132, 90))
    monkeypatch.setattr(gpu, "triton_release", lambda: (3, 7))


def layers(width=128, outputs=512, second=0, **changed):
    """A block's convolutions; `changed` names one of them and what to replace."""
    made = {
        "reduce": conv_of(width, second or outputs, 1),
        "conv": conv_of(width, width, 3),
        "expand": conv_of(outputs, width, 1),
        "shortcut": conv_of(outputs, second, 1) if second else None,
    }
    return tuple({**made, **{name: made[name]._replace(**new) for name, new in changed.items()}}.values())


def image(channels=512, size=(28, 28), dtype=FP16):
    return torch.empty(4, channels, *size, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("made", "x", "word"),
    [
        ({}, {}, None),
        ({}, {"dtype": BF16}, None),
        ({}, {"dtype": FP32}, "only 16 bits"),
        ({}, {"size": (3, 126)}, None),
        ({}, {"size": (3, 127)}, "more than 126 pixels"),
        ({"width": 64, "outputs": 256}, {"channels": 256}, None),
        ({"width": 64, "outputs": 256, "second": 64}, {"channels": 64}, None),
        ({"width": 64, "outputs": 256, "second": 128}, {"channels": 128}, "more than 64 channels"),
        ({"width": 128, "outputs": 256, "second": 64}, {"channels": 64}, None),
        ({"width": 128, "outputs": 512, "second": 64}, {"channels": 64}, None),
        ({"width": 256, "outputs": 1024}, {"channels": 1024}, "no tile has room for 256 channels"),
        ({"width": 64, "outputs": 192}, {"channels": 192}, "no power of two"),
        ({"reduce": {"stride": (2, 2)}}, {}, "first convolution is no plain 1x1"),
        ({"expand": {"groups": 2}}, {}, "last convolution is no plain 1x1"),
        ({"width": 64, "outputs": 256, "second": 64, "shortcut": {"stride": (2, 2)}}, {"channels": 64}, "downsample"),
        ({"conv": {"stride": (2, 2)}}, {}, "no 3x3"),
        ({"conv": {"dilation": (2, 2), "padding": (2, 2)}}, {}, "no 3x3"),
        ({"conv": {"groups": 2}}, {}, "no 3x3"),
        ({}, {"channels": 256}, "do not fit each other"),
        ({"reduce": {"weight": torch.empty(128, 256, 1, 1)}}, {"channels": 256}, "another channel count"),
    ],
)
def test_blocks_that_it_takes(made, x, word, hopper):
    refused = refusal(image(**x), *layers(**made))
    assert refused is None if word is None else word in refused


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, None),
        ({"tap_stages": 1}, "too short"),
        ({"chunk_stages": 1}, "too short"),
        ({"tap_stages": 4}, "does not fit"),
        ({"ring": False}, "a tile"),
        ({"num_warps": 4}, "a tile"),
        ({"block_m": 256, "num_warps": 16}, "a tile"),
        ({"block_n": 128}, "a tile"),
        ({"block_k": 32}, "a tile"),
        ({"held": True}, "hold all filters"),
    ],
)
def test_tiles_that_it_takes(changed, word, hopper):
    refused = refusal(image(), *layers(), replace(TILE, **changed))
    assert refused is None if word is None else word in refused


def test_widest_rows_of_a_tile(hopper):
    narrow = next(tile for tile in tiles_for(64, 256, False) if tile.block_m == 64)
    block = layers(64, 256)
    assert refusal(image(256, (56, 62)), *block, narrow) is None
    assert "more than 62 pixels" in refusal(image(256, (56, 63)), *block, narrow)
    assert refusal(image(256, (56, 63)), *block) is None


def test_other_chips_and_releases(monkeypatch, hopper):
    for release in ((3, 8), (3, 9)):
        monkeypatch.setattr(gpu, "triton_release", lambda release=release: release)
        assert "another chip than Hopper" in refusal(image(), *layers())
    monkeypatch.setattr(gpu, "triton_release", lambda: (3, 7))
    monkeypatch.setattr(bottleneck, "gpu_of", lambda device: Gpu(108, 80))
    assert "another chip than Hopper" in refusal(image(), *layers())


@pytest.mark.parametrize("channels", CHANNELS)
def test_every_tile_fits(channels):
    tiles = tiles_for(*channels)
    assert tiles
    for tile in tiles:
        assert shared_of(tile, *channels) <= SHARED - 1024
        assert resident(tile, *channels) == (2 if tile.num_warps == 4 and not tile.held else 1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((128, 256, 56, 56), (64, 2, 28, 128)),  # two images a step
        ((256, 256, 56, 56), (128, 1, 56, 128)),
        ((64, 256, 56, 56), (32, 4, 14, 128)),
        ((1, 256, 5, 5), (1, 5, 1, 5)),
        ((3, 256, 70, 100), (3, 35, 2, 105)),  # an image a step
    ],
)
def test_bands(size, expected):
    tile = next(tile for tile in tiles_for(64, 256, False) if tile.block_m == 128)
    bands = bands_of(size, tile, 64, 256, False, 132)
    assert bands == expected
    assert bands.rows * bands.bands >= size[2] > bands.rows * (bands.bands - 1)
    box = box_of(tile, size[3])
    assert box.images * box.columns == 128
    assert box.columns >= size[3] + 2


@pytest.mark.parametrize(("columns", "padded"), [(1, 4), (2, 4), (3, 8), (30, 32), (31, 64), (62, 64), (63, 128)])
def test_columns_of_a_step(columns, padded):
    """One to the left, and one to the right, that are zeros."""
    box = box_of(TILE, columns)
    assert (box.images, box.rows, box.columns) == (128 // padded, 1, padded)


def test_cost_and_prediction():
    """16 bytes a pixel and channel of the 3x3, where the stage kernel has 20; filters that stay come once."""
    size, chip = (128, 256, 56, 56), chip_of(Gpu(132, 90))
    filters = 256 * 64 + 9 * 64 * 64 + 64 * 256
    pixels = 128 * 56 * 56
    held, streamed = (tile for tile in tiles_for(64, 256, False) if tile.block_m == 128)
    costs = [cost_of(size, t, 64, 256, False, bands_of(size, t, 64, 256, False, 132)) for t in (held, streamed)]
    for cost in costs:
        assert cost.dram == pixels * 64 * 16 + pixels * 512 * 2 // 56 + 2 * filters
        assert cost.flops == 2 * 128 * (64 * 56 * filters + 64 * 4 * 256 * 64)
    assert costs[1].l2 - costs[0].l2 == 2 * (64 * 56 * filters + 64 * 4 * 256 * 64) - 2 * 128 * filters
    for tile in (held, streamed):
        assert predicted_seconds(size, tile, 64, 256, False, chip) >= costs[0].dram / chip.dram


COMPILED = """
import sys
from dataclasses import replace
from benchmarks.emulate import tail
from benchmarks.gpu.block_shapes import BlockShape
from fused_resblock.kernels.bottleneck import tiles_for

name, width, outputs, second = sys.argv[1], *map(int, sys.argv[2:])
for size in (13, 6):  # several bands, and a single one; images that do not fill the last step
    shape = BlockShape("", width, size, second, outputs)
    for tile in tiles_for(width, outputs, bool(second)):
        row = tail(90, name, shape, tile)
        assert row["status"] == "ok", (size, str(tile), row)
        short = replace(tile, tap_stages=2, chunk_stages=2)
        if not tile.held:
            assert tail(90, name, shape, short)["status"] == "ok", (size, str(short))
"""


compiled = pytest.mark.skipif(gpu.triton_release() >= (3, 8), reason="no matrix begins within another in this Triton")


@compiled
@pytest.mark.parametrize("channels", CHANNELS)
def test_compiled_kernel_is_right(channels):
    width, outputs, second = channels
    name = "bf16" if second else "fp16"
    result = run(COMPILED, name, str(width), str(outputs), str(64 * second))
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


BANDS = """
from benchmarks import emulate
from benchmarks.gpu.block_shapes import BlockShape
from fused_resblock.kernels.bottleneck import bands_of, tiles_for

emulate.FEW, emulate.OTHERS = 2, 20
for second in (0, 64):
    shape = BlockShape("", 64, 13, second)
    for tile in tiles_for(64, 256, bool(second)):
        bands = bands_of((20, second or 256, 13, 13), tile, 64, 256, bool(second), 2)
        assert bands.groups * bands.bands > bands.programs, bands
        row = emulate.tail(90, "fp16", shape, tile)
        assert row["status"] == "ok", (str(tile), row)
"""


@compiled
def test_programs_of_several_bands():
    result = run(BANDS)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


SPECIAL = """
import torch
from benchmarks.emulate import _few_multiprocessors
from benchmarks.gpu.block_shapes import BlockShape
from benchmarks.ptx.driver import emulated
from fused_resblock.backends import triton, whole
from fused_resblock.kernels.bottleneck import tiles_for

for second in (0, 64):
    asked = BlockShape("", 64, 6, second).build(2, torch.float16, "cpu")
    x, _ = asked.inputs()
    x[1, 5, 2, 3] = float("nan")
    (exact,) = asked.plain(x.double(), None)
    known = exact.isnan()
    assert known.any() and not known.all()
    for tile in tiles_for(64, 256, bool(second)):
        with _few_multiprocessors(90), emulated(90, False), torch.no_grad():
            y = whole.bind_tile(x, whole.Layers.of(asked), tile)(x, None)
        assert torch.equal(y.isnan(), known), str(tile)
        assert (y.double() - exact).nan_to_num().abs().max() < 0.02
"""


@compiled
def test_nan_is_kept():
    result = run(SPECIAL)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
