"""Kernels whose taps come from shared memory: what they take, and what runs in their place where there is no Hopper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import FP16, FP32, ConvCase, require
from compiling import run
from stage_cases import StageCase
from test_expand_shift import check as check_stage
from test_tiles import arguments
from test_tiles import check as check_convolution

pytest.importorskip("triton")

from benchmarks.gpu.tail_shapes import TailShape
from fused_resblock.kernels import convolution, gpu, halo
from fused_resblock.kernels.choice import HALO
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.halo import blocks_of, boxes_of, conv_refusal, halo_buffers, join_groups, tail_refusal
from fused_resblock.kernels.stage import choose_stage_tile
from fused_resblock.kernels.tables import Entry
from fused_resblock.kernels.tiles import StageTile
from fused_resblock.params import PLAIN, Conv

TILE = StageTile(64, 64, 64, 4, 1, 2, tma=True, halo=True)


@pytest.mark.parametrize(
    ("size", "boxes"),
    [((1, 1, 1), (1, 1, 1)), ((3, 8, 8), (3, 1, 1)), ((2, 9, 16), (8, 2, 2)), ((2, 56, 13), (28, 7, 2))],
)
def test_boxes_cover_every_image(size, boxes):
    assert boxes_of(*size) == boxes


@pytest.mark.parametrize(
    ("width", "outputs", "reduced", "second", "buffers"),
    [
        (64, 256, 64, False, 4),
        (64, 256, 0, False, 4),
        (64, 256, 128, False, 2),
        (64, 256, 64, True, 2),
        (64, 256, 128, True, 0),
        (64, 512, 64, False, 0),
        (64, 250, 64, False, 0),
        (64, 256, 32, False, 0),
        (128, 512, 128, False, 0),
        (32, 128, 32, False, 0),
    ],
)
def test_chunks_that_fit_beside_the_filters(width, outputs, reduced, second, buffers):
    assert halo_buffers(width, outputs, reduced, second) == buffers


@pytest.mark.parametrize(
    ("outputs", "channels", "groups", "blocks"),
    [
        *((64, 64, 1, 1), (64, 64, 64, 1), (128, 128, 32, 2), (1024, 1024, 32, 16), (192, 192, 12, 3)),
        *((128, 128, 1, 0), (128, 64, 2, 0), (96, 96, 3, 0), (192, 192, 2, 0), (192, 192, 8, 0)),
    ],
)
def test_blocks_of_channels(outputs, channels, groups, blocks):
    assert blocks_of(outputs, channels, groups) == blocks


def test_joined_groups_compute_the_same():
    x, weight = torch.randn(2, 24, 5, 5), torch.randn(12, 2, 3, 3)
    same = torch.nn.functional.conv2d(x, weight, groups=12)
    joined = torch.nn.functional.conv2d(x, join_groups(weight, 12, 4), groups=3)
    torch.testing.assert_close(joined, same)


def conv_of(k=64, c=64, size=3, **options):
    """A convolution without values."""
    return Conv(torch.empty(k, c, size, size), padding=options.pop("padding", (size // 2,) * 2), **options)


@pytest.mark.parametrize(("release", "known"), [((3, 5), False), ((3, 6), True), ((3, 9), True), ((3, 10), False)])
def test_only_releases_whose_gluon_is_known(release, known, monkeypatch):
    monkeypatch.setattr(gpu, "triton_release", lambda: release)
    assert Gpu().gluon == known
    asked = TailShape("", 64, 56, outputs=64).build(128, FP16, "meta").gemms()
    assert choose_stage_tile(asked, 2, Gpu()).halo == known
    assert not Gpu(108, 80).gluon


@pytest.mark.parametrize(
    ("conv", "other", "epilogue", "dtype", "capability", "word"),
    [
        (conv_of(), None, PLAIN, FP16, 90, None),
        (conv_of(), torch.empty(0), PLAIN, FP16, 90, None),
        (conv_of(), None, PLAIN, FP32, 90, "16-bit"),
        (conv_of(), None, PLAIN, FP16, 80, "Hopper"),
        (conv_of(), None, PLAIN, FP16, 100, "Hopper"),
        (conv_of(k=128), None, PLAIN, FP16, 90, "not 64"),
        (conv_of(k=128, c=128), None, PLAIN, FP16, 90, "not 64"),
        (conv_of(k=128, c=4, groups=32), None, PLAIN, FP16, 90, None),
        (conv_of(k=128, c=64, groups=2), None, PLAIN, FP16, 90, None),
        (conv_of(k=256, c=128, groups=2), None, PLAIN, FP16, 90, "not 64"),
        (conv_of(size=1), None, PLAIN, FP16, 90, "no 3x3"),
        (conv_of(stride=(2, 2)), None, PLAIN, FP16, 90, "stride"),
        (conv_of(padding=(0, 2)), None, PLAIN, FP16, 90, "padding"),
        (conv_of(dilation=(2, 2), padding=(2, 2)), None, PLAIN, FP16, 90, "dilation"),
        (conv_of(), torch.empty(0), PLAIN._replace(residual_stride=2), FP16, 90, "strided residual"),
        (conv_of(), torch.empty(0), PLAIN._replace(shortcut=conv_of(size=1)), FP16, 90, "downsample"),
    ],
)
def test_convolutions_that_it_takes(conv, other, epilogue, dtype, capability, word, monkeypatch):
    monkeypatch.setattr(halo, "gpu_of", lambda device: Gpu(132, capability))
    refused = conv_refusal(torch.empty(0, dtype=dtype), conv, other, epilogue, HALO)
    assert refused is None if word is None else word in refused


@pytest.mark.parametrize(
    ("changed", "dtype", "capability", "word"),
    [
        ({}, FP16, 90, None),
        ({"shortcut": conv_of(256, 64, 1)}, FP16, 90, None),
        ({"reduce": None}, FP16, 90, None),
        ({}, FP32, 90, "16-bit"),
        ({}, FP16, 120, "Hopper"),
        ({"conv": conv_of(stride=(2, 2))}, FP16, 90, "stride"),
        ({"conv": conv_of(size=5)}, FP16, 90, "no 3x3"),
        ({"shortcut": conv_of(256, 64, 1, stride=(2, 2))}, FP16, 90, "another stride"),
        ({"shortcut": conv_of(256, 32, 1)}, FP16, 90, "another stride or width"),
        ({"expand": conv_of(512, 64, 1)}, FP16, 90, "do not fit"),
        ({"reduce": conv_of(256, 256, 1)}, FP16, 90, "do not fit"),
    ],
)
def test_tails_that_it_takes(changed, dtype, capability, word, monkeypatch):
    monkeypatch.setattr(halo, "gpu_of", lambda device: Gpu(132, capability))
    layers = {"conv": conv_of(), "expand": conv_of(256, 64, 1), "shortcut": None, "reduce": conv_of(64, 256, 1)}
    refused = tail_refusal(torch.empty(0, dtype=dtype), **{**layers, **changed}, tile=TILE)
    assert refused is None if word is None else word in refused


@pytest.mark.parametrize("changed", [{"block_m": 128}, {"block_n": 32}, {"num_warps": 8}, {"persistent": 0}])
def test_tiles_of_convolutions_that_it_is_not_made_for(changed):
    tile = replace(HALO, **changed)
    assert str(tile) in conv_refusal(torch.empty(0, dtype=FP16), conv_of(), None, PLAIN, tile)


@pytest.mark.parametrize("changed", [{"block_m": 128}, {"block_n": 32}, {"num_warps": 8}, {"chunk_stages": 1}])
def test_tiles_of_tails_that_it_is_not_made_for(changed):
    tile, layers = replace(TILE, **changed), (conv_of(), conv_of(256, 64, 1), None, None)
    assert str(tile) in tail_refusal(torch.empty(0, dtype=FP16), *layers, tile)


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"residual": 1}, True),
        ({"residual": 2}, False),
        ({"stride": 2}, False),
        ({"groups": 2}, True),
        ({"padding": (0, 2)}, False),
        ({"dilation": 2, "padding": 2}, False),
    ],
)
def test_only_what_it_takes_is_offered_to_it(changed, taken, monkeypatch):
    args = arguments(ConvCase(channels=64, out_channels=64, size=(8, 8), **changed).build(FP16))
    assert (HALO in convolution.likely_tiles(*args, Gpu())) == taken
    monkeypatch.setattr(convolution, "choose_tile", lambda **options: HALO)
    tile = convolution.choose(*args, Gpu())
    assert tile.halo == taken
    assert convolution.usable(Entry(64, "triton", HALO), *args) == (HALO if taken else None)


def test_in_the_interpreter_the_kernels_with_boxes_run():
    require("triton", FP16)
    for groups in (1, 2):
        case = ConvCase(channels=64, out_channels=64, groups=groups, residual=1)
        check_convolution(case.build(FP16), HALO, FP16)
    case = StageCase(width=64, expanded=256, outputs=64, second=64)
    check_stage(case.build(FP16), TILE, FP16)


ON_HOPPER = """
import torch
from benchmarks.emulate import both_ways
from benchmarks.gpu import tails
from benchmarks.gpu.tail_shapes import TailShape
from benchmarks.gpu.operations import build
from benchmarks.ptx.driver import emulated
from benchmarks.shapes import ConvShape
from fused_resblock.backends import triton
from fused_resblock.kernels.choice import HALO
from fused_resblock.kernels.conv_halo import bind_conv_halo
from fused_resblock.kernels.stage import bind_stage, choose_stage_tile
from fused_resblock.kernels.tables import Entry
from fused_resblock.kernels.tiles import StageTile

def moved(t):
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return memory[1:].as_strided(t.shape, t.stride()).copy_(t)

with torch.no_grad():
    op = build(ConvShape("", 64, 64, 8, 3, residual=True), 1, torch.float16, "cpu")
    arguments = triton.prepared(op.x, op.conv, op.other, op.epilogue)
    run = lambda x, other: both_ways(90, lambda: bind_conv_halo(*arguments, HALO)(x, other))[0]
    y = run(op.x, op.other)
    assert torch.allclose(y.double(), op.to(torch.float64).plain(), atol=1e-2)
    # two bytes into their memory: no descriptor can name them
    grouped = build(ConvShape("", 128, 128, 8, 3, groups=32), 1, torch.float16, "cpu")
    taken = grouped.prepared(HALO)
    assert taken[1].weight is grouped.conv.weight, "no groups are joined in memory"
    either = bind_conv_halo(*taken, HALO)
    for x in (grouped.x, moved(grouped.x), grouped.x):
        assert torch.allclose(both_ways(90, lambda: either(x, None))[0].double(), grouped.to(torch.float64).plain(), atol=1e-2)
    assert torch.allclose(run(moved(op.x), op.other), y, atol=1e-2)
    assert torch.allclose(run(op.x, moved(op.other)), y, atol=1e-2)
    # over the residual
    other = op.other.clone(memory_format=torch.channels_last)
    with emulated(90, False):
        written = bind_conv_halo(*arguments, HALO, overwrite=True)(op.x, other)
    assert written is other and torch.equal(other, y)
    # a NaN reaches its neighbours alone, one of the residual its own pixel
    x, other = (t.clone(memory_format=torch.channels_last) for t in (op.x, op.other))
    x[0, 5, 0, 3] = other[0, 7, 6, 6] = float("nan")
    found = run(x, other).isnan()
    assert found[0, :, :2, 2:5].all() and found[0, 7, 6, 6]
    assert found.sum() == 64 * 6 + 1

    asked = TailShape("", 64, 8, outputs=64).build(1, torch.float16, "cpu")
    x, other = asked.inputs()
    bound = lambda h, other: tails.joined(tails.bound(asked, StageTile(64, 64, 64, 4, 1, 4, True, True))(h, other))
    run = lambda h, other: both_ways(90, lambda: bound(h, other))[0]
    y = run(x, other)
    assert torch.allclose(run(moved(x), other), y, atol=2e-2)
    layers = [triton.prepare(layer, torch.float16) for layer in (*asked.layers[:2], asked.reduce)]
    kept = other.clone(memory_format=torch.channels_last)
    halo = StageTile(64, 64, 64, 4, 1, 4, True, True)
    written = bind_stage(x, *layers[:2], kept, None, layers[2], halo, overwrite=True)
    with emulated(90, False):
        both = written(x, kept)
    assert both[0] is kept and torch.equal(tails.joined(both), y)
    assert torch.allclose(run(x, moved(other)), y, atol=2e-2)
    x[0, 5, 0, 3] = float("nan")
    found = run(x, other).isnan()
    assert found[0, :, :2, 2:5].all() and found.sum() == (256 + 64) * 6
"""


def test_on_hopper_what_no_descriptor_names_and_nan():
    result = run(ON_HOPPER)
    assert result.returncode == 0, result.stderr[-2000:]
