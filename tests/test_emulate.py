"""Compiled kernels, run without a GPU: a sample of what `make emulate` runs, faults put into them, and their counts.

The interpreter and the compiler cannot both be on in one process, so these run in processes of their own.
"""

from __future__ import annotations

import pytest
from compiling import run

pytest.importorskip("triton")

SMALL = """
import sys
from benchmarks.emulate import Job, convolution, elementwise, stem, tail
from benchmarks.gpu.elementwise import judge_bn_act
from benchmarks.gpu.tail_shapes import TailShape
from benchmarks.shapes import ConvShape
from fused_resblock.backends import triton
from fused_resblock.kernels.choice import HALO
from fused_resblock.kernels.tiles import StageTile, Tile

capability, name = int(sys.argv[1]), sys.argv[2]
wide = 32 if name == "tf32" else 64
tma = capability >= 90
conv = lambda shape, tile: convolution(capability, name, shape, tile)
found = {
    "1x1": conv(ConvShape("", 64, 128, 14), Tile(64, 64, wide, 4, 3, persistent=tma)),
    "3x3": conv(ConvShape("", 64, 64, 14, 3), Tile(128, 64, wide, 4, 3, persistent=tma)),
    "3x3 stride 2": conv(ConvShape("", 64, 64, 14, 3, 2), Tile(64, 64, wide, 4, 2, persistent=tma)),
    "residual": conv(ConvShape("", 64, 64, 14, residual=True), Tile(64, 32, wide, 4, 4, persistent=2 * tma)),
    "second": conv(ConvShape("", 64, 64, 7, shortcut=64, shortcut_stride=2), Tile(64, 64, wide, 4, 2, persistent=tma)),
    "channels of no whole step": conv(ConvShape("", 72, 64, 14), Tile(64, 64, wide, 4, 3, persistent=tma)),
    "second channels of no whole step": conv(ConvShape("", 64, 64, 14, shortcut=72), Tile(64, 64, wide, 4, 3, persistent=tma)),
    "grouped": conv(ConvShape("", 128, 128, 14, 3, groups=32), Tile(64, 32, 32, 4, 3)),
    "split": conv(ConvShape("", 128, 64, 7, 3), Tile(64, 64, wide, 4, 3, 2)),
    "stage": tail(capability, name, TailShape("", 64, 7, outputs=64), StageTile(64, 32, wide, 4, 2, 2, tma and capability != 90)),
    "stem": stem(capability, name, 37),
    "bn_act": elementwise(capability, name, judge_bn_act, 67, 9, "strided"),
}
if capability == 90 and name != "tf32":  # taps from shared memory
    two, four = (StageTile(64, 64, 64, 4, 1, buffers, True, True) for buffers in (2, 4))
    for shape, tile in (
        (TailShape("next", 64, 13, outputs=64), four),
        (TailShape("next stage", 64, 13, outputs=128), two),
        (TailShape("last", 64, 13), four),
        (TailShape("first", 64, 13, second=64, outputs=64), two),
    ):
        found[shape] = tail(capability, name, shape, tile)
    for shape in (ConvShape("", 64, 64, 13, 3, residual=True), ConvShape("", 128, 128, 13, 3, groups=32), ConvShape("", 128, 128, 13, 3, groups=8, residual=True)):
        found[shape] = conv(shape, HALO)
    from fused_resblock.kernels import stem_hopper
    stem_hopper.choose_rows = lambda programs, rows, multiprocessors: 3  # of 17, the last of which has one row above
    found["stem of several rows and tiles"] = stem(capability, name, 66)
for kernel, row in found.items():
    assert row["status"] == "ok", (kernel, row)
if name == "tf32":  # weights that are cut as the activations are
    triton.in_tf32 = lambda dtype, device: False
    assert conv(ConvShape("", 64, 128, 14), Tile(64, 64, wide, 4, 3, persistent=tma))["status"] == "wrong"
"""


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp16"), (90, "fp16"), (90, "tf32"), (120, "bf16")])
def test_compiled_kernels_are_right(capability, dtype):
    result = run(SMALL, str(capability), dtype)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


FAULTS = """
import re
import torch
from benchmarks.emulate import both_ways, tail
from benchmarks.gpu.operations import build, precision
from benchmarks.gpu.tail_shapes import TailShape
from benchmarks.ptx import driver, run
from benchmarks.ptx.grid import Fault
from benchmarks.ptx.parse import parse
from benchmarks.shapes import ConvShape
from fused_resblock.kernels.tiles import StageTile, Tile

run.LIMIT //= 10  # a program of this size that goes on is one that waits for ever

def parsed_by(function):
    # what stands in for the parser, from the next launch on
    driver.parse = function
    driver._compiled.cache_clear()

def without(pattern, number):
    def altered(text):
        kernel = parse(text)
        found = [i for i in kernel.instructions if re.match(pattern, i.text)]
        chosen = found[number]
        chosen.opcode, chosen.operands = "mov.b32", [parse_register(kernel), parse_register(kernel)]
        return kernel
    return altered

def parse_register(kernel):
    from benchmarks.ptx.parse import Register
    return Register(next(n for n, width in enumerate(kernel.widths) if width == 32))

def noticed(capability, tile, pattern, number=0):
    with precision("fp16") as dtype, torch.no_grad():
        op = build(ConvShape("x", 64, 64, 8, 3), 2, dtype, "cpu")
        exact = op.to(torch.float64).plain()
        parsed_by(without(pattern, number))
        try:
            y, fault, *_ = both_ways(capability, lambda: op.with_tile(tile))
        except Fault:
            return True
        finally:
            parsed_by(parse)
        return fault is not None or not bool((y.double() - exact).abs().max() < 0.1)

def noticed_in_tail(shape, buffers, pattern, number=0):
    tile = StageTile(64, 64, 64, 4, 1, buffers, True, True)
    parsed_by(without(pattern, number))
    try:
        return tail(90, "fp16", shape, tile)["status"] != "ok"
    except Fault:
        return True
    finally:
        parsed_by(parse)

plain, boxes = Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3, persistent=1)
assert noticed(80, plain, "cp.async.wait_group", 0)
assert noticed(80, plain, "cp.async.commit_group", 2)
assert noticed(80, plain, "bar.sync", -1)
assert noticed(80, plain, "mma.sync", 3)
assert noticed(80, plain, "ldmatrix", 1)
assert noticed(90, boxes, "wgmma.wait_group", 0)
assert noticed(90, boxes, "wgmma.wait_group", 1)
assert noticed(90, boxes, "wgmma.mma_async", 1)
assert noticed(90, boxes, "cp.async.bulk.wait_group", -1)
assert noticed(90, boxes, "fence.proxy.async", -1)
assert noticed(90, boxes, ".*mbarrier.arrive.expect_tx", 0)
assert noticed(90, boxes, ".*cp.async.bulk.tensor.*mbarrier", 1)
assert noticed(90, boxes, "stmatrix", 0)

tails = TailShape("", 64, 13, outputs=64), TailShape("", 64, 13, second=64), TailShape("", 64, 13, outputs=128)
for shape, buffers, pattern, number in (
    (tails[0], 4, "fence.proxy.async", 1),
    (tails[0], 4, "wgmma.wait_group", 1),
    (tails[0], 4, ".*try_wait", 1),
    (tails[0], 4, "stmatrix", 4),
    (tails[1], 2, "cp.async.bulk.wait_group", 0),
    (tails[2], 2, "cp.async.bulk.wait_group", 1),
):
    assert noticed_in_tail(shape, buffers, pattern, number), (shape, pattern, number)
"""


def test_faults_in_compiled_code_are_noticed():
    result = run(FAULTS)
    assert result.returncode == 0, result.stderr[-2000:]


COUNTS = """
import torch
from benchmarks.emulate import both_ways
from benchmarks.gpu import tails
from benchmarks.gpu.tail_shapes import TailShape
from benchmarks.gpu.operations import build, precision
from benchmarks.floors import gemm_of, second_of
from benchmarks.shapes import ConvShape
from fused_resblock.kernels.cost import conv_bn_act_cost, conv_halo_cost, expand_shift_cost, expand_shift_halo_cost
from fused_resblock.kernels.choice import HALO
from fused_resblock.kernels.tiles import StageTile, Tile

def counted(call):
    *_, (profile,), _ = both_ways(90, call)
    return profile

def close(found, expected):
    assert abs(found / expected - 1) < 0.15, (found, expected)

with precision("fp16") as dtype, torch.no_grad():
    tile = Tile(128, 64, 64, 4, 3, persistent=1)
    for shape in (ConvShape("3x3", 64, 64, 16, 3), ConvShape("1x1", 256, 64, 16), ConvShape("+", 64, 256, 16, residual=True)):
        op, gemm = build(shape, 2, dtype, "cpu"), gemm_of(shape, 2)
        cost, profile = conv_bn_act_cost(gemm, 2, tile, residual=shape.residual), counted(lambda: op.with_tile(tile))
        close(profile.l2, cost.l2)
        close(profile.device, cost.dram)
        close(2 * profile.products, cost.flops)
        assert profile.wavefronts == profile.ideal  # no bank conflicts
    shape, ring = ConvShape("pair", 64, 256, 16, shortcut=128, shortcut_stride=2), Tile.parse("128x256x64.w8.s4.p1.r1")
    op, cost = build(shape, 2, dtype, "cpu"), conv_bn_act_cost(gemm_of(shape, 2), 2, ring, second=second_of(shape, 2))
    profile = counted(lambda: op.with_tile(ring))
    close(profile.l2, cost.l2)
    close(profile.device, cost.dram)
    close(2 * profile.products, cost.flops)
    # the tail of a bottleneck with the next block's head: 20 C bytes a pixel instead of 32 C
    width, size, images = 64, 16, 2
    tail = TailShape("tail", width, size, outputs=width)
    asked = tail.build(images, dtype, "cpu")
    x, other = asked.inputs()
    tile = StageTile(128, 64, 64, 8, 3, 2, True)
    profile = counted(lambda: tails.joined(tails.bound(asked, tile)(x, other)))
    filters = 2 * sum(layer.weight.numel() for layer in asked.layers)
    close((profile.device - filters) / (images * size**2), 20 * width)
    conv, expand, second, reduce = asked.gemms()
    close(profile.l2, expand_shift_cost(conv, expand, 2, tile, second=second, reduce=reduce).l2)
    # with taps from shared memory; filters of every program
    programs = images * size**2 // 64
    profile = counted(lambda: tails.joined(tails.bound(asked, StageTile(64, 64, 64, 4, 1, 4, True, True))(x, other)))
    close(profile.l2, expand_shift_halo_cost(conv, expand, 2, programs, second=second, reduce=reduce).l2)
    close((profile.device - filters) / (images * size**2), 20 * width)
    assert profile.wavefronts == profile.ideal
    # with 128 channels, all through two rings
    images, tile = 1, StageTile.parse("256x64x64.w8.s3.c3.t1.r1")
    asked = TailShape("tail", 128, size, outputs=128).build(images, dtype, "cpu")
    x, other = asked.inputs()
    profile = counted(lambda: tails.joined(tails.bound(asked, tile)(x, other)))
    conv, expand, second, reduce = asked.gemms()
    filters = 2 * sum(layer.weight.numel() for layer in asked.layers)
    close(profile.l2, expand_shift_cost(conv, expand, 2, tile, second=second, reduce=reduce).l2)
    close((profile.device - filters) / (images * size**2), 20 * 128)
    assert profile.wavefronts == profile.ideal
    shape = ConvShape("3x3", 64, 64, 16, 3, residual=True)
    op, cost = build(shape, 2, dtype, "cpu"), conv_halo_cost(gemm_of(shape, 2), 2, programs, residual=True)
    profile = counted(lambda: op.with_tile(HALO))
    close(profile.l2, cost.l2)
    close(profile.device, cost.dram)
    assert profile.wavefronts == profile.ideal
"""


def test_kernels_move_the_bytes_that_the_cost_model_counts():
    result = run(COUNTS)
    assert result.returncode == 0, result.stderr[-2000:]
