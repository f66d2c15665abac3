"""A 1x1, or both of a downsample branch, in a ring of loads: what is taken, what is right, what runs elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import FP16, FP32, ConvCase, require
from compiling import run
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


COMPILED = """
import sys
from benchmarks import emulate
from benchmarks.shapes import ConvShape
from fused_resblock.kernels.tiles import Tile

emulate.FEW = 2  # so that a program takes several pieces, and the ring goes round
emulate.ORDERS = tuple((late, apart) for late in (False, True) for apart in (False, True))
for shape, names in (
    (ConvShape("", 64, 128, 7, shortcut=64, shortcut_stride=2), ("64x64x64.w4.s4.p3.r1", "128x128x64.w8.s6.p1.r1")),
    (ConvShape("", 128, 256, 13, shortcut=256), ("256x128x64.w8.s4.p1.r1", "64x128x64.w4.s4.p2.r1")),
    (ConvShape("", 64, 256, 9, shortcut=192, shortcut_stride=2), ("128x256x64.w8.s4.p1.r1",)),
    (ConvShape("", 256, 256, 5, shortcut=64), ("128x256x64.w8.s3.p1.r1", "128x128x64.w8.s3.p2.r1")),
    (ConvShape("", 64, 128, 13, residual=True), ("64x64x64.w4.s4.p3.r1", "128x128x64.w8.s4.p1.r1")),
    (ConvShape("", 192, 256, 13, residual=True), ("128x256x64.w8.s3.p1.r1", "128x128x64.w8.s2.p2.r1")),
    (ConvShape("", 128, 512, 9, residual=True), ("128x128x64.w8.s5.p1.r1", "64x128x64.w4.s2.p3.r1")),
    (ConvShape("", 128, 256, 9), ("128x128x64.w8.s2.p2.r1",)),
):
    for name in names:
        row = emulate.convolution(90, sys.argv[1], shape, Tile.parse(name))
        assert row["status"] == "ok", (shape, name, row)
        assert row["wavefronts"] == row["ideal"], "bank conflicts"
"""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_compiled_kernel_is_right(dtype):
    result = run(COMPILED, dtype)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


SPECIAL = """
from dataclasses import replace
import torch
from benchmarks.emulate import both_ways
from benchmarks.gpu.operations import build
from benchmarks.shapes import ConvShape
from fused_resblock.kernels.conv_pair import bind_conv_pair
from fused_resblock.kernels.tiles import Tile
from fused_resblock.params import Affine

tile = Tile(64, 64, 64, 4, 3, persistent=1, ring=True)
op = build(ConvShape("", 64, 64, 3, shortcut=64, shortcut_stride=2), 1, torch.float16, "cpu")

def scaled(op, one, two):
    \"\"\"The operation with norms that have these scales.\"\"\"
    norms = [Affine(torch.as_tensor(scale).expand(64).contiguous(), torch.full((64,), 0.5)) for scale in (one, two)]
    branch = op.epilogue.shortcut._replace(norm=norms[1])
    return replace(op, conv=op.conv._replace(norm=norms[0]), epilogue=op.epilogue._replace(shortcut=branch))

def kernel(op):
    arguments = (op.x, op.conv, op.other, op.epilogue)
    return both_ways(90, lambda: bind_conv_pair(*arguments, tile)(op.x, op.other))[0]

def plain(op):
    branch, conv = op.epilogue.shortcut, op.conv
    scale, scale2 = (c.norm.scale.double()[:, None, None] for c in (conv, branch))
    h = torch.nn.functional.conv2d(op.x.double(), conv.weight.double())
    x = torch.nn.functional.conv2d(op.other.double(), branch.weight.double(), stride=2)
    return (h * scale + x * scale2 + 1).relu()

def moved(t):
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return memory[1:].as_strided(t.shape, t.stride()).copy_(t)

with torch.no_grad():
    sizes = torch.tensor([0.0, -0.0, 1.0, -1.5, 1e-4, -1e-12, 1e-25, 1e-38])
    ordinary = scaled(op, sizes.repeat(8), sizes.repeat_interleave(8))  # every pair of them
    y = kernel(ordinary)
    assert torch.allclose(y.double(), plain(ordinary), rtol=2e-3, atol=2e-3)
    # two bytes into their memory: no descriptor can name them
    for changed in (replace(ordinary, x=moved(op.x)), replace(ordinary, other=moved(op.other))):
        assert torch.allclose(kernel(changed), y, atol=1e-2)
    # NaN stays NaN, also by a scale of 0; the pixels between those of a stride are not read
    for h, x in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        broken = scaled(op, h, x)
        inputs = [t.clone(memory_format=torch.channels_last) for t in (op.x, op.other)]
        inputs[0][0, 5, 0, 2] = inputs[1][0, 9, 4, 2] = inputs[1][0, 9, 1, 1] = float("nan")
        found = kernel(replace(broken, x=inputs[0], other=inputs[1])).isnan()
        assert found[0, :, 0, 2].all() and found[0, :, 2, 1].all() and found.sum() == 2 * 64
    for h, x in ((float("nan"), 1.0), (1.0, float("nan"))):
        assert kernel(scaled(op, h, x)).isnan().all()
"""


def test_scales_of_all_sizes_nan_and_what_no_descriptor_names():
    result = run(SPECIAL)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


RESIDUALS = """
from dataclasses import replace
import torch
from benchmarks import emulate
from benchmarks.emulate import both_ways
from benchmarks.gpu.operations import build
from benchmarks.shapes import ConvShape
from fused_resblock.kernels.conv_ring import bind_conv_ring
from fused_resblock.kernels.tiles import Tile

emulate.FEW = 1
op = build(ConvShape("", 64, 256, 9, residual=True), 3, torch.float16, "cpu")  # 243 pixels: the last tile is not full

def kernel(op, tile, overwrite=False):
    def call():
        other = op.other.clone(memory_format=torch.channels_last)
        y = bind_conv_ring(op.x, op.conv, other, op.epilogue, tile, overwrite=overwrite)(op.x, other)
        assert (y is other) == overwrite
        assert overwrite or torch.equal(other.nan_to_num(7), op.other.nan_to_num(7))
        return y
    y, fault, *_ = both_ways(90, call)
    assert fault is None
    return y

def moved(t):
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return memory[1:].as_strided(t.shape, t.stride()).copy_(t)

with torch.no_grad():
    for name in ("64x64x64.w4.s4.p3.r1", "64x128x64.w4.s3.p2.r1", "64x128x64.w4.s2.p3.r1"):  # 1, 4, 3 buffers
        tile = Tile.parse(name)
        y = kernel(op, tile)
        assert torch.allclose(y.double(), op.to(torch.float64).plain(), rtol=2e-3, atol=2e-3)
        assert torch.equal(kernel(op, tile, overwrite=True), y)
    for changed in (replace(op, x=moved(op.x)), replace(op, other=moved(op.other))):  # no descriptor can name them
        assert torch.allclose(kernel(changed, tile), y, atol=1e-2)
    broken = [t.clone(memory_format=torch.channels_last) for t in (op.x, op.other)]
    broken[0][0, 5, 0, 2] = broken[1][2, 9, 8, 8] = float("nan")
    found = kernel(replace(op, x=broken[0], other=broken[1]), tile).isnan()
    assert found[0, :, 0, 2].all() and found[2, 9, 8, 8] and found.sum() == 256 + 1
    bare = replace(op, conv=op.conv._replace(norm=None), epilogue=op.epilogue._replace(relu=False))
    assert torch.allclose(kernel(bare, tile).double(), bare.to(torch.float64).plain(), rtol=2e-3, atol=2e-3)
"""


def test_residuals_that_are_overwritten_nan_and_what_no_descriptor_names():
    result = run(RESIDUALS)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
