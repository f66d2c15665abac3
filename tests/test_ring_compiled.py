"""The kernels of `test_ring` compiled for Hopper and emulated: they are not in the interpreter."""

from __future__ import annotations

import pytest
from compiling import run

pytest.importorskip("triton")

COMPILED = """
import sys
from benchmarks import emulate
from benchmarks.shapes import ConvShape
from fused_resblock.kernels.tiles import Tile

emulate.FEW = 2  # so that a program takes several pieces, and the ring goes round
emulate.ORDERS = (False, True), (True, True)  # loads at once and products late, and the other way round
every = 1 if sys.argv[1] == "fp16" else 3  # bf16 is another operand type of the same instructions
for shape, names in (
    (ConvShape("", 64, 128, 7, shortcut=64, shortcut_stride=2), ("64x64x64.w4.s4.p3.r1", "128x128x64.w8.s6.p1.r1")),
    (ConvShape("", 128, 256, 9, shortcut=256), ("256x128x64.w8.s4.p1.r1", "64x128x64.w4.s4.p2.r1")),
    (ConvShape("", 64, 256, 9, shortcut=192, shortcut_stride=2), ("128x256x64.w8.s4.p1.r1",)),
    (ConvShape("", 256, 256, 5, shortcut=64), ("128x256x64.w8.s3.p1.r1", "128x128x64.w8.s3.p2.r1")),
    (ConvShape("", 64, 128, 9, residual=True), ("64x64x64.w4.s4.p3.r1", "128x128x64.w8.s4.p1.r1")),
    (ConvShape("", 192, 256, 9, residual=True), ("128x256x64.w8.s3.p1.r1", "128x128x64.w8.s2.p2.r1")),
    (ConvShape("", 128, 512, 9, residual=True), ("128x128x64.w8.s5.p1.r1", "64x128x64.w4.s2.p3.r1")),
    (ConvShape("", 128, 256, 9), ("128x128x64.w8.s2.p2.r1",)),
)[::every]:
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
