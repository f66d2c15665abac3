"""A 1x1, or both of a downsample branch, in a ring of loads: what is taken, what is right, what runs elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import FP16, FP32, ConvCase, require
from test_tiles import arguments, check

pytest.importorskip("triton")

from benchmarks.gpu import space
from benchmarks.offline import CHIPS
from benchmarks.shapes import ConvShape
from fused_resblock.kernels import convolution, ring
from fused_resblock.kernels.choice import RESIDUAL_RINGS, RINGS, chip_of
from fused_resblock.kernels.cost import resident_programs
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.tables import Entry
from fused_resblock.kernels.tiles import Tile
from fused_resblock.params import PLAIN, Conv

TILE = Tile(128, 128, 64, 8, 4, persistent=1, ring=True)
#: of ResNet-50, the last convolutions of the stages' first blocks
SHAPES = [
    ConvShape("wide layer1", 128, 256, 56, shortcut=64),
    *(ConvShape(f"layer{i + 2}", 128 << i, 512 << i, 28 >> i, shortcut=256 << i, shortcut_stride=2) for i in range(3)),
]
#: and those of the other blocks
RESIDUAL = [ConvShape(f"layer{i + 2}", 128 << i, 512 << i, 28 >> i, residual=True) for i in range(3)]


def conv_of(k=128, c=64, size=1, **options):
    """A convolution without values."""
    return Conv(torch.empty(k, c, size, size), padding=options.pop("padding", (size // 2,) * 2), **options)


@pytest.mark.parametrize(
    ("changed", "buffers"),
    [
        ({}, 2),
        ({"num_stages": 6}, 2),
        ({"num_stages": 7}, 0),
        ({"num_stages": 2, "persistent": 2}, 2),
        ({"num_stages": 3, "persistent": 2}, 1),
        ({"num_stages": 4, "persistent": 2}, 0),
        ({"block_n": 256}, 2),
        ({"block_n": 256, "num_stages": 3}, 4),
        ({"block_n": 256, "num_stages": 5}, 0),
        ({"block_m": 256}, 1),
    ],
)
def test_pieces_that_fit_beside_the_ring(changed, buffers):
    tile = replace(TILE, **changed)
    check_room(tile, buffers, second=True)


@pytest.mark.parametrize(
    ("changed", "buffers"),
    [
        ({}, 4),
        ({"num_stages": 5}, 4),
        ({"num_stages": 6}, 2),
        ({"num_stages": 2, "persistent": 2}, 2),
        ({"num_stages": 3, "persistent": 2}, 0),
        ({"block_n": 256, "num_stages": 3}, 5),
        ({"block_n": 256}, 0),
        ({"block_m": 256, "num_stages": 3}, 2),
        ({"block_m": 256}, 0),
        ({"block_n": 64, "num_stages": 3, "persistent": 2}, 2),
    ],
)
def test_a_residual_needs_room_for_all_pieces_of_a_tile(changed, buffers):
    check_room(replace(TILE, **changed), buffers, residual=True)


def check_room(tile, buffers, **kind):
    """So many pieces and the ring are what a program of so many has room for."""
    assert ring.buffers_of(tile, **kind) == buffers
    if buffers:
        limit = min(CHIPS[90].shared_limit, CHIPS[90].shared_total // tile.persistent - 1024)
        assert ring.shared_of(tile, **kind) <= limit
        assert resident_programs(tile, 2, chip_of(Gpu()).shared, **kind) >= tile.persistent


@pytest.mark.parametrize(
    ("conv", "branch", "dtype", "capability", "word"),
    [
        (conv_of(), conv_of(c=192), FP16, 90, None),
        (conv_of(), conv_of(stride=(2, 2)), FP16, 90, None),
        (conv_of(), None, FP16, 90, None),
        (conv_of(c=96), None, FP16, 90, "multiple"),
        (conv_of(), conv_of(), FP32, 90, "16 bits"),
        (conv_of(), conv_of(), FP16, 80, "Hopper"),
        (conv_of(), conv_of(), FP16, 100, "Hopper"),
        (conv_of(size=3), conv_of(), FP16, 90, "plain 1x1"),
        (conv_of(stride=(2, 2)), conv_of(), FP16, 90, "plain 1x1"),
        (conv_of(padding=(1, 1)), conv_of(), FP16, 90, "plain 1x1"),
        (conv_of(c=32, groups=2), conv_of(), FP16, 90, "plain 1x1"),
        (conv_of(c=96), conv_of(), FP16, 90, "multiple"),
        (conv_of(), conv_of(c=32), FP16, 90, "multiple"),
        (conv_of(k=192), conv_of(k=192), FP16, 90, "multiple"),
    ],
)
def test_convolutions_that_it_takes(conv, branch, dtype, capability, word, monkeypatch):
    monkeypatch.setattr(ring, "gpu_of", lambda device: Gpu(132, capability))
    other, epilogue = torch.empty(0, dtype=dtype), PLAIN._replace(shortcut=branch)
    refused = ring.refusal(other, conv, other, epilogue, TILE)
    assert refused is None if word is None else word in refused


@pytest.mark.parametrize(
    "changed", [{"block_m": 32}, {"block_k": 32}, {"num_warps": 4}, {"persistent": 0}, {"num_stages": 1}]
)
def test_tiles_that_it_is_not_made_for(changed):
    tile, other = replace(TILE, **changed), torch.empty(0, dtype=FP16)
    assert str(tile) in ring.refusal(other, conv_of(), other, PLAIN._replace(shortcut=conv_of()), tile)


def test_more_stages_than_fit():
    tile, other = replace(TILE, num_stages=7), torch.empty(0, dtype=FP16)
    assert "fit" in ring.refusal(other, conv_of(), other, PLAIN._replace(shortcut=conv_of()), tile)


@pytest.mark.parametrize(
    ("changed", "taken"), [({}, True), ({"channels": 96}, False), ({"kernel": (3, 3), "padding": 1}, False)]
)
def test_only_what_it_takes_is_run_by_it(changed, taken, monkeypatch):
    case = {"kernel": (1, 1), "padding": 0, "channels": 64, "out_channels": 128, "size": (8, 8)}
    args = arguments(ConvCase(**{**case, **changed}, shortcut=2, shortcut_channels=64).build(FP16))
    assert convolution.usable(Entry(64, "triton", TILE), *args) == (TILE if taken else None)
    monkeypatch.setattr(convolution, "choose_tile", lambda **options: TILE)
    assert convolution.choose(*args, Gpu()).ring == taken


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_it_is_chosen_where_programs_take_several_pieces(shape):
    assert space.chosen(shape, 128, "fp16", Gpu()) == RINGS[0]
    assert not space.chosen(shape, 1, "fp16", Gpu()).ring
    assert not space.chosen(shape, 128, "tf32", Gpu()).ring
    assert not space.chosen(shape, 128, "bf16", Gpu(108, 80)).ring
    offered = [tile for tile in space.tiles(shape, "bf16", Gpu()) if tile.ring]
    assert set(RINGS) <= set(offered)
    assert all(ring.buffers_of(tile, second=True) for tile in offered)


@pytest.mark.parametrize("shape", RESIDUAL, ids=lambda shape: shape.name)
def test_with_a_residual_it_is_chosen_likewise(shape):
    assert space.chosen(shape, 128, "fp16", Gpu()) in RESIDUAL_RINGS
    assert not space.chosen(shape, 1, "fp16", Gpu()).ring
    assert not space.chosen(shape, 128, "tf32", Gpu()).ring
    assert not space.chosen(shape, 128, "bf16", Gpu(108, 80)).ring
    offered = [tile for tile in space.tiles(shape, "bf16", Gpu()) if tile.ring]
    assert set(RESIDUAL_RINGS) <= set(offered)
    assert len(offered) == len(space.RESIDUAL_RINGS)


@pytest.mark.parametrize(
    "shape",
    [
        ConvShape("layer1 first", 64, 256, 56, shortcut=64),
        ConvShape("layer1", 64, 256, 56, residual=True),
        ConvShape("3x3", 128, 128, 28, 3, residual=True),
        ConvShape("no residual", 512, 128, 28),
    ],
    ids=lambda shape: shape.name,
)
def test_what_is_faster_elsewhere_runs_there(shape):
    assert not space.chosen(shape, 128, "fp16", Gpu()).ring


@pytest.mark.parametrize("tile", [TILE, RINGS[0]], ids=str)
def test_in_the_interpreter_the_kernel_with_boxes_runs(tile):
    require("triton", FP16)
    case = ConvCase(kernel=(1, 1), padding=0, channels=64, out_channels=256, shortcut=2, shortcut_channels=64)
    check(replace(case, size=(4, 6)).build(FP16), tile, FP16)
    check(replace(case, shortcut=None, residual=1).build(FP16), RESIDUAL_RINGS[0], FP16)
