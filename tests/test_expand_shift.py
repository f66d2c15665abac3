"""The stage kernel: 3x3, expand, residual or downsample branch, ReLU and the next reduce in one pass."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, FP64, cast, floor, require, slack_of
from conv_cases import named
from parity import assert_parity
from stage_cases import Stage, StageCase

from benchmarks.gpu.tail_shapes import TailShape
from fused_resblock.kernels import gpu, stage
from fused_resblock.kernels.choice import chip_of
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.stage import bind_stage, candidates, choose_stage_tile, predicted_seconds, refusal
from fused_resblock.kernels.tiles import StageTile
from fused_resblock.params import Conv

CASES = {
    "identity": StageCase(),
    "ragged chunks": StageCase(expanded=56, outputs=32, bias=True),
    "last": StageCase(outputs=None),
    "two channel steps": StageCase(width=32, expanded=64, outputs=16),
    "stride 2, downsample": StageCase(stride=2, size=(8, 6), second=24),
    "stride 2, downsample, odd image": StageCase(stride=2, second=24),
    "downsample of 40 channels, last": StageCase(second=40, outputs=None, bias=True),
    "no norm": StageCase(norm=None, bias=True),
    "norm without gamma and beta": StageCase(norm="plain"),
    "one pixel": StageCase(batch=1, size=(1, 1)),
    "exactly one tile": StageCase(batch=1, size=(4, 4)),
    "no padding": StageCase(padding=0, size=(6, 7)),
    "stride 3, downsample": StageCase(stride=3, size=(7, 6), second=24),
}
TILES = [
    StageTile(*blocks, 4, 1, 1, tma) for blocks in ((16, 16, 16), (32, 32, 16), (64, 16, 32)) for tma in (False, True)
]


def check(stage: Stage, tile: StageTile, dtype: torch.dtype = FP32) -> None:
    """Both results against torch's."""
    y, g = bind_stage(*stage, tile)(stage.h, stage.other)
    same, exact = stage.plain(), cast(stage, FP64).plain()
    slack = slack_of("triton", dtype)
    slack *= 2 if slack > 2 else 1  # where the interpreter truncates to bf16 it does so for the 3x3 and for y
    rule = {"floor": floor(dtype), "slack": slack}
    assert_parity(y, same[0], exact[0], what="y", **rule)
    if stage.reduce is None:
        assert g is None
    else:
        assert_parity(g, same[1], exact[1], what="g", **rule)


@pytest.mark.parametrize("tile", [pytest.param(t, id=str(t)) for t in TILES])
@pytest.mark.parametrize("case", named(CASES))
def test_every_case(case, tile):
    require("triton")
    check(case.build(FP32), tile)


@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (FP16, BF16, FP64)])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "TMA"])
@pytest.mark.parametrize("case", named(CASES))
def test_other_dtypes(case, tma, dtype):
    require("triton", dtype)
    check(case.build(dtype), StageTile(32, 16, 16, 4, 2, 2, tma), dtype)


def shipped(width: int, second: bool) -> list[StageTile]:
    """The tiles of chips whose kernels the interpreter knows: all but those of Gluon."""
    chips = (Gpu(132, capability) for capability in (80, 90, 100, 120))
    tiles = dict.fromkeys(tile for chip in chips for tile in candidates(width, width, 2, second, chip))
    return [tile for tile in tiles if not (tile.halo or tile.ring)]


SHIPPED = [(w, second, tile) for w in (64, 128, 256) for second in (False, True) for tile in shipped(w, second)]


@pytest.mark.parametrize(
    ("width", "second", "tile"), [pytest.param(*case, id="-".join(map(str, case))) for case in SHIPPED]
)
def test_tiles_that_ship_at_their_width(width, second, tile):
    """81 pixels, so that each tile's last program is ragged."""
    require("triton", FP16)
    branch = width if width == 64 else 2 * width
    case = StageCase(1, width, 4 * width, (9, 9), second=branch if second else None, outputs=width)
    check(case.build(FP16), tile, FP16)


@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (FP32, FP16, BF16)])
@pytest.mark.parametrize(("second", "stride"), [(16, 1), (32, 2), (24, 2)])
def test_input_of_the_downsample_branch_is_held(second, stride, dtype):
    """Loaded once for all chunks; 24 channels are no power of two and come for each."""
    require("triton", dtype)
    check(StageCase(stride=stride, size=(8, 6), second=second).build(dtype), replace(TILES[1], held=True), dtype)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "TMA"])
def test_nan_reaches_its_neighbours_and_no_other_image(tma):
    require("triton")
    stage = StageCase().build(FP32)
    stage.h[0, 3, 0, 0] = float("nan")
    y, g = bind_stage(*stage, StageTile(16, 16, 16, 4, 1, 1, tma))(stage.h, stage.other)
    for actual, expected in zip((y, g), stage.plain(), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert actual.isnan().any()
        assert not actual[1].isnan().any()


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "TMA"])
def test_nan_of_the_residual_is_kept(tma):
    require("triton")
    stage = StageCase().build(FP32)
    stage.other[1, 7, 2, 2] = float("nan")
    y, _ = bind_stage(*stage, StageTile(16, 16, 16, 4, 1, 1, tma))(stage.h, stage.other)
    assert y.isnan().nonzero().tolist() == [[1, 7, 2, 2]]


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "TMA"])
def test_pixels_that_a_strided_downsample_skips_may_be_nan(tma):
    require("triton")
    stage = StageCase(stride=2, size=(8, 6), second=24).build(FP32)
    stage.other[:, :, :, 1::2] = float("nan")
    check(stage, StageTile(16, 16, 16, 4, 1, 1, tma))


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "TMA"])
def test_every_norm_has_its_own_eps(tma):
    require("triton")
    stage = StageCase(second=24).build(FP32)
    layers = {}
    for name, eps in (("conv", 0.1), ("expand", 0.2), ("shortcut", 0.3), ("reduce", 0.4)):
        conv = getattr(stage, name)
        layers[name] = conv._replace(norm=conv.norm._replace(eps=eps))
    check(stage._replace(**layers), StageTile(32, 16, 16, 4, 1, 1, tma))


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "TMA"])
def test_bitwise_equal_twice(tma):
    require("triton")
    stage = StageCase(second=24).build(FP32)
    run = bind_stage(*stage, StageTile(16, 16, 16, 4, 1, 1, tma))
    for first, second in zip(run(stage.h, stage.other), run(stage.h, stage.other), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "TMA"])
@pytest.mark.parametrize("case", named(CASES))
def test_output_over_the_residual(case, tma):
    """The same to the bit; what a downsample branch reads is left as it is."""
    require("triton")
    stage, tile = case.build(FP32), StageTile(16, 16, 16, 4, 1, 1, tma)
    expected = bind_stage(*stage, tile)(stage.h, stage.other)
    other = stage.other.clone(memory_format=torch.channels_last)
    y, g = bind_stage(*stage, tile, overwrite=True)(stage.h, other)
    assert (y is other) == (stage.shortcut is None)
    assert y is other or torch.equal(other, stage.other)
    assert torch.equal(y, expected[0])
    assert g is expected[1] is None or torch.equal(g, expected[1])


def test_activation_that_no_descriptor_can_name():
    """Four bytes into its memory: the kernel without TMA takes the call."""
    require("triton")
    stage = StageCase().build(FP32)
    memory = torch.zeros(stage.h.numel() + 1, device=DEVICE)
    off = memory[1:].as_strided(stage.h.shape, stage.h.stride()).copy_(stage.h)
    exact = cast(stage, FP64).plain()[0]
    y, _ = bind_stage(*stage, TILES[1])(off, stage.other)
    assert_parity(y, stage.plain()[0], exact, what="y")
    written, _ = bind_stage(*stage, TILES[1], overwrite=True)(off, stage.other)
    assert written is stage.other
    assert torch.equal(written, y)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"conv": {"dilation": (2, 2)}}, "dilated"),
        ({"conv": {"stride": (1, 2)}}, "two strides"),
        ({"conv": {"groups": 2}}, "grouped"),
        ({"expand": {"padding": (1, 1)}}, "no plain 1x1"),
        ({"reduce": {"stride": (2, 2)}}, "no plain 1x1"),
    ],
)
def test_refusals(change, word):
    stage = StageCase().build(FP32)
    assert refusal(stage.conv, stage.expand, stage.shortcut, stage.reduce) is None
    changed = stage._replace(**{name: getattr(stage, name)._replace(**new) for name, new in change.items()})
    assert word in refusal(changed.conv, changed.expand, changed.shortcut, changed.reduce)


@pytest.mark.parametrize(("width", "expanded", "second"), [(24, 40, None), (8, 40, None), (16, 44, None), (16, 40, 12)])
def test_channels_that_no_tile_holds_are_refused(width, expanded, second):
    weight = torch.empty(width, width, 3, 3), torch.empty(expanded, width, 1, 1)
    shortcut = None if second is None else Conv(torch.empty(expanded, second, 1, 1))
    assert "channels" in refusal(Conv(weight[0], padding=(1, 1)), Conv(weight[1]), shortcut, None)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256, 512])
def test_candidates(width, itemsize, capability):
    for second in (False, True):
        tiles = candidates(width, width, itemsize, second, Gpu(132, capability))
        assert len(set(tiles)) == len(tiles)
        assert bool(tiles) == (width <= (256 if itemsize == 2 else 128))
        for tile in tiles:
            assert tile.tma == (tile.halo or tile.ring if capability == 90 else Gpu(132, capability).tma)
            assert tile.block_k <= width
            assert tile.block_m * max(width, 64) // (32 * tile.num_warps) <= 128, "accumulators of the 3x3"


def test_choice_is_the_fastest_by_prediction():
    """A full batch takes the tile whose filters stay, few pixels another, which need not load them all first."""
    chosen = {}
    for images, size in ((1, 7), (128, 56)):
        asked = TailShape("l1", 64, size, outputs=64).build(images, FP16, "meta")
        gemms, gpu = asked.gemms(), Gpu()
        tile = choose_stage_tile(gemms, 2, gpu)
        times = [predicted_seconds(gemms, 2, t, chip_of(gpu)) for t in candidates(64, 64, 2, False, gpu)]
        assert predicted_seconds(gemms, 2, tile, chip_of(gpu)) == min(times)
        chosen[images] = tile.halo
    assert chosen == {1: False, 128: True}


@pytest.mark.parametrize(
    "shape",
    [TailShape("", 64, 28, 2, second=64), TailShape("", 64, 56, second=32, outputs=64), TailShape("", 128, 56)],
)
def test_taps_of_other_tails_do_not_come_from_shared_memory(shape):
    gemms = shape.build(128, FP16, "meta").gemms()
    assert not choose_stage_tile(gemms, 2, Gpu()).halo


def test_no_candidate_no_tile():
    asked = TailShape("l4", 512, 7, outputs=512).build(1, FP16, "meta")
    assert choose_stage_tile(asked.gemms(), 2, Gpu()) is None


@pytest.mark.parametrize(("release", "there"), [((3, 7), True), ((3, 9), False)])
def test_a_tile_that_spills_with_a_release_is_left_out(release, there, monkeypatch):
    monkeypatch.setattr(stage, "triton_release", lambda: release)
    assert any(tile.block_m == 256 for tile in candidates(64, 64, 2, False, Gpu(132, 90))) == there
    assert candidates(64, 64, 2, False, Gpu(132, 90))


@pytest.mark.parametrize(
    ("device", "capability", "boxes"), [("cuda", 90, False), ("cuda", 100, True), ("cpu", 90, True)]
)
def test_no_tail_by_boxes_on_hopper(device, capability, boxes, monkeypatch):
    """Whoever names the tile: a table of an older release, or a tile with a halo for a tail that has none."""
    bound = []
    monkeypatch.setattr(gpu, "gpu_of", lambda device: Gpu(132, capability))
    monkeypatch.setattr(stage, "bind_expand_shift_tma", lambda *arguments, overwrite: bound.append(True))
    monkeypatch.setattr(stage, "bind_expand_shift", lambda *arguments, overwrite: bound.append(False))
    h = SimpleNamespace(device=torch.device(device), shape=(1, 64, 8, 8), dtype=FP32)
    conv, expand = (Conv(torch.empty(k, 64, size, size), padding=(size // 2,) * 2) for k, size in ((64, 3), (256, 1)))
    for halo in (False, True):
        stage.bind_stage(h, conv, expand, None, None, None, StageTile(64, 64, 64, 4, 1, 2, True, halo))
    assert bound == [boxes, boxes]
