"""`expand_shift_ring`, `expand_shift_wide`: tails that they take, what runs elsewhere, and their code for Hopper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BF16, FP16, FP32, require
from compiling import run
from stage_cases import StageCase
from test_expand_shift import check
from test_halo import conv_of

pytest.importorskip("triton")

from benchmarks.gpu.tail_shapes import TailShape
from fused_resblock.kernels import stage, tail_ring
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.ring import SHARED
from fused_resblock.kernels.stage import candidates, choose_stage_tile
from fused_resblock.kernels.tail_ring import by_boxes, channels_refusal, is_timed, is_wide, refusal, shared_of
from fused_resblock.kernels.tiles import StageTile

TILE = StageTile(128, 64, 64, 8, 5, 6, tma=True, ring=True)
LARGE = {"block_m": 256, "num_warps": 16, "tap_stages": 3, "chunk_stages": 3}
WIDE = {"block_n": 128, "block_k": 128, "tap_stages": 3, "chunk_stages": 3}


@pytest.mark.parametrize(
    ("outputs", "reduced", "second", "changed", "word"),
    [
        (512, 128, 0, {}, None),
        (512, 0, 0, {}, None),
        (256, 128, 0, {}, None),
        (512, 256, 0, {}, None),
        (512, 0, 0, {"block_m": 256, "tap_stages": 3, "chunk_stages": 3}, None),
        (64, 128, 0, {}, None),
        (512, 128, 0, {"block_m": 256, "tap_stages": 3, "chunk_stages": 3}, None),
        (512, 128, 0, {"tap_stages": 2, "chunk_stages": 2}, None),
        (384, 128, 0, {}, "power of two"),
        (512, 64, 0, {}, "next reduce"),
        (512, 384, 0, {}, "next reduce"),
        (512, 128, 256, {"tap_stages": 3, "chunk_stages": 4}, "branch"),
        (512, 128, 0, {"tap_stages": 7}, "does not fit"),
        (512, 0, 0, {"block_m": 256}, "does not fit"),
        (512, 256, 0, {"block_m": 256, "tap_stages": 3, "chunk_stages": 3}, "a tile"),
        (512, 256, 0, {"chunk_stages": 2}, "too short"),
        (512, 128, 0, {"tap_stages": 1}, "too short"),
        (512, 128, 0, {"chunk_stages": 1}, "too short"),
        (512, 128, 0, {"block_m": 64}, "a tile"),
        (512, 128, 0, {"block_n": 32}, "a tile"),
        (512, 128, 0, {"block_k": 32}, "a tile"),
        (512, 128, 0, {"num_warps": 4}, "a tile"),
        (512, 128, 0, LARGE, None),
        (512, 0, 0, LARGE, None),
        (512, 128, 0, {**LARGE, "block_m": 128}, "a tile"),
        (512, 256, 0, LARGE, "more sums"),
        (512, 128, 0, WIDE, None),
        (512, 0, 0, WIDE, None),
        (128, 0, 0, WIDE, None),
        (512, 0, 0, {**WIDE, "tap_stages": 2, "chunk_stages": 4}, None),
        (64, 128, 0, WIDE, "a tile"),
        (512, 256, 0, WIDE, "more sums"),
        (512, 128, 0, {**WIDE, "block_m": 256}, "a tile"),
        (512, 128, 0, {**WIDE, "block_n": 64}, "a tile"),
        (512, 128, 0, {**WIDE, "tap_stages": 4}, "does not fit"),
        (512, 128, 256, WIDE, "branch"),
    ],
)
def test_channels_and_tiles_that_it_takes(outputs, reduced, second, changed, word, monkeypatch):
    monkeypatch.setattr(tail_ring, "triton_release", lambda: (3, 7))
    refused = channels_refusal(128, outputs, reduced, second, replace(TILE, **changed))
    assert refused is None if word is None else word in refused
    assert "not 128" in channels_refusal(64, outputs, reduced, second, TILE)


def test_sixteen_warps_are_not_asked_to_spill(monkeypatch):
    for release, refused in (((3, 8), False), ((3, 9), True)):
        monkeypatch.setattr(tail_ring, "triton_release", lambda release=release: release)
        assert ("spills" in (channels_refusal(128, 512, 128, 0, replace(TILE, **LARGE)) or "")) == refused
        assert channels_refusal(128, 512, 0, 0, replace(TILE, **LARGE)) is None


@pytest.mark.parametrize(
    ("changed", "dtype", "capability", "word"),
    [
        ({}, FP16, 90, None),
        ({}, BF16, 90, None),
        ({"conv": conv_of(128, 128, stride=(2, 2))}, FP16, 90, "stride"),
        ({"reduce": None}, FP16, 90, None),
        ({}, FP32, 90, "16 bits"),
        ({}, FP16, 80, "Hopper"),
        ({}, FP16, 100, "Hopper"),
        ({"conv": conv_of(128, 128, 5)}, FP16, 90, "no 3x3"),
        ({"conv": conv_of(128, 64)}, FP16, 90, "as many channels"),
        ({"conv": conv_of(128, 128, padding=(0, 1))}, FP16, 90, "padding"),
        ({"conv": conv_of(128, 128, dilation=(2, 2), padding=(2, 2))}, FP16, 90, "dilation"),
        ({"conv": conv_of(64, 64)}, FP16, 90, "not 128"),
        ({"shortcut": conv_of(512, 256, 1)}, FP16, 90, "branch"),
    ],
)
def test_tails_that_it_takes(changed, dtype, capability, word, monkeypatch):
    monkeypatch.setattr(tail_ring, "gpu_of", lambda device: Gpu(132, capability))
    layers = {"conv": conv_of(128, 128), "expand": conv_of(512, 128, 1), "shortcut": None}
    asked = {**layers, "reduce": conv_of(128, 512, 1), "tile": TILE, **changed}
    refused = refusal(torch.empty(0, dtype=dtype), **asked)
    assert refused is None if word is None else word in refused


@pytest.mark.parametrize(
    ("outputs", "second", "sizes"),
    [
        (128, 0, {(128, 64, 8), (256, 64, 8), (256, 64, 16), (128, 128, 8)}),
        (0, 0, {(128, 64, 8), (256, 64, 8), (256, 64, 16), (128, 128, 8)}),
        (256, 0, {(128, 64, 8)}),
        (128, 256, set()),
        (256, 256, set()),
    ],
)
def test_tiles_that_are_tried(outputs, second, sizes, monkeypatch):
    monkeypatch.setattr(tail_ring, "triton_release", lambda: (3, 7))
    tiles = [tile for tile in candidates(128, outputs, 2, bool(second), Gpu(132, 90)) if tile.ring]
    assert {(tile.block_m, tile.block_k, tile.num_warps) for tile in tiles} == sizes
    for tile in tiles:
        room = SHARED - 1024 - shared_of(tile, 512, outputs)
        step = 2 * 128 * tile.block_k
        assert 0 <= room < (step if is_wide(tile) else step + 8 * tile.block_m * 64), "a deeper ring would fit"
    for other in (Gpu(108, 80), Gpu(148, 100)):
        assert not any(tile.ring for tile in candidates(128, outputs, 2, bool(second), other))
    assert not any(tile.ring for tile in candidates(128, outputs, 4, bool(second), Gpu(132, 90)))


def test_it_is_chosen_for_many_images_of_128_channels_with_a_tile_that_a_gpu_has_timed():
    chosen = choose_stage_tile(TailShape("", 128, 28, outputs=128).build(128, FP16, "meta").gemms(), 2, Gpu(132, 90))
    assert (chosen.ring, chosen.block_m, chosen.block_k, chosen.num_warps) == (True, 256, 64, 8)
    assert all(map(is_timed, (chosen, TILE, by_boxes(TILE))))
    assert not any(is_timed(replace(TILE, **changed)) for changed in (WIDE, LARGE))
    odd = TailShape("", 128, 28, 2, 192, 128).build(128, FP16, "meta").gemms()
    assert not choose_stage_tile(odd, 2, Gpu(132, 90)).ring


def test_none_is_chosen_that_no_gpu_has_timed(monkeypatch):
    gemms = TailShape("", 128, 28, outputs=128).build(128, FP16, "meta").gemms()
    monkeypatch.setattr(stage, "predicted_seconds", lambda gemms, itemsize, tile, chip: is_timed(tile))
    assert is_timed(choose_stage_tile(gemms, 2, Gpu(132, 90)))


def test_on_hopper_it_runs_though_the_kernel_with_boxes_is_not_right_there(monkeypatch):
    from fused_resblock.kernels import expand_shift_ring, expand_shift_wide

    hopper = Gpu(132, 90)
    assert not hopper.tail_tma
    monkeypatch.setattr(stage, "right_on", lambda device, right: right(hopper))
    monkeypatch.setattr(stage, "bind_expand_shift", lambda *args, **options: args[-1])
    monkeypatch.setattr(expand_shift_ring, "bind_expand_shift_ring", lambda *args, **options: "ring")
    monkeypatch.setattr(expand_shift_wide, "bind_expand_shift_wide", lambda *args, **options: "wide")
    layers = conv_of(128, 128), conv_of(512, 128, 1), torch.empty(0), None, conv_of(128, 512, 1)
    wide = replace(TILE, **WIDE)
    for dtype, tile, bound in (
        (FP16, TILE, "ring"),
        (FP16, wide, "wide"),
        (FP32, TILE, by_boxes(TILE)),
        (FP32, wide, by_boxes(wide)),
    ):
        h = torch.empty(1, 128, 8, 8, dtype=dtype)
        assert stage.bind_stage(h, *layers, tile) == bound
    strided = layers[0]._replace(stride=(2, 2))
    assert stage.bind_stage(torch.empty(1, 128, 8, 8, dtype=FP16), strided, *layers[1:], TILE) == by_boxes(TILE)


def test_in_the_interpreter_the_kernel_with_boxes_runs():
    require("triton", FP16)
    case = StageCase(width=128, expanded=512, outputs=128)
    for tile in (TILE, by_boxes(TILE), replace(TILE, **WIDE)):
        check(case.build(FP16), tile, FP16)


ON_HOPPER = """
import sys
from benchmarks import emulate
from benchmarks.gpu.tail_shapes import TailShape
from fused_resblock.kernels.tiles import StageTile

emulate.FEW = 1  # a program takes tile after tile
for images, shape, tile in (
    (6, TailShape("", 128, 7, outputs=128), "256x64x64.w8.s3.c3.t1.r1"),
    (3, TailShape("", 128, 7, outputs=256), "128x64x64.w8.s5.c6.t1.r1"),
    (4, TailShape("", 128, 7, outputs=128), "128x128x128.w8.s2.c2.t1.r1"),
    (6, TailShape("", 128, 7), "256x64x64.w16.s3.c3.t1.r1"),
    (3, TailShape("", 128, 7), "128x64x64.w8.s2.c2.t1.r1"),
    (3, TailShape("", 128, 7), "128x128x128.w8.s3.c3.t1.r1"),
)[:: 1 if sys.argv[1] == "fp16" else -3]:
    emulate.OTHERS = images
    emulate.IMAGES = {}
    row = emulate.tail(90, sys.argv[1], shape, StageTile.parse(tile))
    assert row["status"] == "ok", (shape, row)
    assert row["wavefronts"] == row["ideal"], "bank conflicts"
"""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_compiled_kernel_is_right(dtype):
    result = run(ON_HOPPER, dtype)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


SPECIAL = """
import sys
import torch
from benchmarks import emulate
from benchmarks.emulate import both_ways
from benchmarks.gpu import tails
from benchmarks.gpu.tail_shapes import TailShape
from fused_resblock.backends import triton
from fused_resblock.kernels.stage import bind_stage
from fused_resblock.kernels.tiles import StageTile

emulate.FEW = 1
step, stages = (64, (5, 4)) if sys.argv[1] == "ring" else (128, (3, 3))
tile = StageTile(128, step, step, 8, *stages, tma=True, ring=True)
asked = TailShape("", 128, 5, outputs=128).build(6, torch.float16, "cpu")  # 150 pixels: the last tile is not full

def moved(t):
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return memory[1:].as_strided(t.shape, t.stride()).copy_(t)

def kernel(x, other, overwrite=False):
    layers = [triton.prepare(layer, torch.float16) for layer in (*asked.layers[:2], asked.reduce)]
    def call():
        residual = other.as_strided(other.shape, other.stride()).clone() if overwrite else other
        y, g = bind_stage(x, *layers[:2], residual, None, layers[2], tile, overwrite=overwrite)(x, residual)
        assert (y is residual) == overwrite
        return tails.joined((y, g))
    result, fault, *_ = both_ways(90, call)
    assert fault is None, fault
    return result

with torch.no_grad():
    x, other = asked.inputs()
    # a NaN reaches its neighbours alone, one of the residual its own pixel of y and of g
    x[0, 5, 0, 3] = other[2, 9, 4, 4] = float("nan")
    y = kernel(x, other)
    found = y.isnan()
    assert found[0, :, :2, 2:].all() and found[2, 9, 4, 4] and found[2, 512:, 4, 4].all()
    assert found.sum() == (512 + 128) * 6 + 1 + 128
    exact = tails.joined(asked.plain(x.double(), other.double()))
    assert torch.allclose(y.double(), exact, atol=2e-2, equal_nan=True)
    assert torch.allclose(kernel(x, other, overwrite=True), y, rtol=0, atol=0, equal_nan=True)
    if sys.argv[1] == "ring":  # two bytes into their memory: no descriptor can name them, and another kernel runs
        assert torch.allclose(kernel(moved(x), other), y, atol=2e-2, equal_nan=True)
        assert torch.allclose(kernel(x, moved(other)), y, atol=2e-2, equal_nan=True)
"""


@pytest.mark.parametrize("kernel", ["ring", "wide"])
def test_residuals_that_are_overwritten_nan_and_what_no_descriptor_names(kernel):
    result = run(SPECIAL, kernel)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
