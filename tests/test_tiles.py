"""Every way to cut a convolution into programs: tiles larger and smaller than it, split loops, boxes that TMA moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, FP64, ConvCase, cast, conv_bn_act_reference, floor, require, slack_of
from conv_cases import EPILOGUES, GEOMETRIES, named
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_parity

from fused_resblock.functional import conv_bn_act
from fused_resblock.kernels.conv_tma import refusal
from fused_resblock.kernels.convolution import bind_convolution
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.tiles import StageTile, Tile
from fused_resblock.params import Conv, Epilogue, pair

CASES = {
    "1x1 ragged in all three": ConvCase(
        kernel=(1, 1), padding=0, channels=35, out_channels=37, size=(7, 5), residual=1
    ),
    "3x3 stride 2 residual": ConvCase(stride=2, channels=20, out_channels=18, residual=2, slack=1, bias=True),
    "3x3 2 groups": ConvCase(groups=2, channels=36, out_channels=34, dilation=2, padding=2),
    "shortcut": ConvCase(channels=17, out_channels=33, shortcut=2, slack=1),
    "exactly one tile": ConvCase(batch=2, channels=16, out_channels=16, size=(4, 4)),
    "one pixel": ConvCase(batch=1, size=(1, 1), residual=1),
}
BLOCKS = [(16, 16, 16), (32, 16, 32), (64, 32, 16), (16, 128, 128), (128, 128, 64)]
TILES = [Tile(*blocks, num_warps=4, num_stages=1) for blocks in BLOCKS]
SPLIT = [Tile(32, 16, 16, 4, 1, split) for split in (2, 3, 16)]  # as many as steps, fewer, more
#: what TMA takes: channels that are multiples of 16 bytes, even images at stride 2
BOXES = {
    "1x1 ragged in all three": CASES["1x1 ragged in all three"],
    "1x1 residual": ConvCase(kernel=(1, 1), padding=0, channels=40, out_channels=56, size=(7, 5), residual=1),
    "1x1 stride 2": ConvCase(kernel=(1, 1), padding=0, stride=2, channels=24, out_channels=16, size=(6, 10)),
    "3x3": ConvCase(channels=24, out_channels=40, size=(7, 5), bias=True),
    "3x3 stride 2": ConvCase(stride=2, channels=40, out_channels=24, size=(8, 6), residual=1),
    "3x3 dilated, wide padding": ConvCase(channels=16, out_channels=16, dilation=2, padding=(3, 2), size=(6, 7)),
    "3x3 2 groups": ConvCase(groups=2, channels=48, out_channels=32, size=(5, 5)),
    "5x1 no norm": ConvCase(kernel=(5, 1), padding=(2, 0), channels=16, out_channels=16, norm=None, relu=False),
    "shortcut": ConvCase(channels=24, out_channels=40, shortcut=2, shortcut_channels=24),
    "1x1 shortcut": ConvCase(kernel=(1, 1), padding=0, channels=24, out_channels=40, shortcut=1, shortcut_channels=24),
    "one pixel": ConvCase(batch=1, channels=16, out_channels=16, size=(1, 1), residual=1),
    "five small images": ConvCase(batch=5, channels=16, out_channels=16, size=(3, 2)),
}
WIDE = Tile(64, 64, 16, 4, 1, persistent=1)  # the filters are the first operand
PERSISTENT = [Tile(*blocks, 4, 1, persistent=1) for blocks in ((16, 16, 16), (32, 16, 32), (128, 16, 64))]


def arguments(args: dict) -> tuple:
    """What kernels are bound to, of `functional.conv_bn_act`'s arguments."""
    stride, padding, dilation = (pair(args[k]) for k in ("stride", "padding", "dilation"))
    conv = Conv(args["weight"], args["bias"], args["norm"], stride, padding, dilation, args["groups"])
    shortcut = args.get("shortcut")
    other = args.get("residual") if shortcut is None else shortcut.x
    branch = None if shortcut is None else shortcut.conv
    return args["x"], conv, other, Epilogue(args.get("residual_stride", 1), None, branch, args["relu"])


def launch(args: dict, tile: Tile | None) -> torch.Tensor:
    """The kernel that the tile is for, called with `functional`'s arguments."""
    x, conv, other, epilogue = arguments(args)
    return bind_convolution(x, conv, other, epilogue, tile)(x, other)


def check(args: dict, tile: Tile | None, dtype: torch.dtype = FP32) -> None:
    """The kernel's result against torch's."""
    actual, exact = launch(args, tile), conv_bn_act_reference(**cast(args, FP64))
    same = conv_bn_act_reference(**args)
    assert_parity(actual, same, exact, what="y", floor=floor(dtype), slack=slack_of("triton", dtype))


@pytest.mark.parametrize("tile", [pytest.param(t, id=str(t)) for t in (*TILES, *SPLIT)])
@pytest.mark.parametrize("case", named(CASES))
def test_forced_tile(case, tile):
    require("triton")
    check(case.build(FP32), tile)


@pytest.mark.parametrize("case", named(GEOMETRIES | EPILOGUES))
def test_without_tma(case):
    """On an H100, which the interpreter stands for, most of these are given to TMA."""
    require("triton")
    check(case.build(FP32), TILES[1])


@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (FP16, BF16, FP64)])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("case", named(CASES))
def test_forced_tile_in_other_dtypes(case, split, dtype):
    require("triton", dtype)
    check(case.build(dtype), Tile(32, 16, 32, 4, 2, split), dtype)


def test_a_stride_of_no_residual_is_not_that_of_the_branch():
    require("triton")
    args = CASES["shortcut"].build(FP32)
    expected = launch(args, SPLIT[0])
    assert torch.equal(launch({**args, "residual_stride": 2}, SPLIT[0]), expected)


def fitting(case: ConvCase, tile: Tile) -> dict:
    """The case's arguments, with channels rounded up until TMA takes them, and a tile's width within a group."""
    wide = replace(case, channels=-(-case.channels // 8) * 8, out_channels=-(-case.out_channels // 8) * 8)
    args = wide.build(FP32)
    assert refusal(*arguments(args), tile) is None
    return args


@pytest.mark.parametrize("tile", [pytest.param(t, id=str(t)) for t in PERSISTENT])
@pytest.mark.parametrize("case", named(BOXES))
def test_boxes(case, tile):
    require("triton")
    check(fitting(case, tile), tile)


@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (FP16, BF16, FP64)])
@pytest.mark.parametrize("case", named(BOXES))
def test_boxes_in_other_dtypes(case, dtype):
    require("triton", dtype)
    tile = Tile(32, 16, 32, 4, 2, persistent=2)
    check(cast(fitting(case, tile), dtype), tile, dtype)


@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (FP32, FP16, BF16)])
@pytest.mark.parametrize("case", named(BOXES))
def test_boxes_with_the_filters_first(case, dtype):
    require("triton", dtype)
    wide = replace(case, out_channels=128 if case.groups > 1 else 72)
    check(cast(fitting(wide, WIDE), dtype), WIDE, dtype)


def test_programs_that_take_several_pieces(monkeypatch):
    require("triton")
    monkeypatch.setattr("fused_resblock.kernels.conv_tma.gpu_of", lambda _: Gpu(multiprocessors=3))
    check(ConvCase(channels=16, out_channels=48, size=(9, 9)).build(FP32), Tile(16, 16, 16, 4, 1, persistent=1))


def test_weight_that_no_descriptor_can_name():
    """A weight that is a piece of one long vector, as optimisers make: copied to where a descriptor can begin."""
    require("triton")
    args = ConvCase(kernel=(1, 1), padding=0, channels=16, out_channels=16).build(FP32)
    memory = torch.zeros(args["weight"].numel() + 1, device=DEVICE)
    args["weight"] = memory[1:].view(16, 16, 1, 1).copy_(args["weight"])
    assert args["weight"].data_ptr() % 16
    torch.testing.assert_close(conv_bn_act(**args, backend="triton"), conv_bn_act_reference(**args))


def test_a_dead_residual_is_overwritten():
    """Piece by piece, with more pieces than programs, and a box with pixels outside."""
    require("triton")
    args = ConvCase(channels=16, out_channels=48, size=(9, 7), residual=1).build(FP32)
    x, conv, other, epilogue = arguments(args)
    kept = other.clone(memory_format=torch.channels_last)
    run = bind_convolution(x, conv, other, epilogue, PERSISTENT[0], overwrite=True)
    y = run(x, kept)
    assert y.data_ptr() == kept.data_ptr()
    assert_parity(y, conv_bn_act_reference(**args), conv_bn_act_reference(**cast(args, FP64)), what="y")


def test_a_shortcuts_input_is_not_overwritten():
    require("triton")
    args = BOXES["1x1 shortcut"].build(FP32)
    x, conv, other, epilogue = arguments(args)
    before = other.clone()
    bind_convolution(x, conv, other, epilogue, PERSISTENT[0], overwrite=True)(x, other)
    assert torch.equal(other, before)


def test_activation_that_no_descriptor_can_name():
    """Four bytes into its memory: the plain kernel takes the call."""
    require("triton")
    args = ConvCase(channels=16, out_channels=16).build(FP32)
    memory = torch.zeros(args["x"].numel() + 1, device=DEVICE)
    off = memory[1:].as_strided(args["x"].shape, args["x"].stride())
    off.copy_(args["x"])
    assert off.data_ptr() % 16
    bound = bind_convolution(*arguments(args), PERSISTENT[0])
    assert_parity(bound(off, None), conv_bn_act_reference(**args), conv_bn_act_reference(**cast(args, FP64)), what="y")


@pytest.mark.parametrize(
    ("case", "word"),
    [
        (ConvCase(stride=2, channels=16, out_channels=16, size=(7, 6)), "odd height or width"),
        (ConvCase(stride=(1, 2), channels=16, out_channels=16, size=(8, 6)), "stride"),
        (ConvCase(stride=3, channels=16, out_channels=16, size=(9, 9)), "stride"),
        (ConvCase(channels=18, out_channels=16), "16 bytes"),
        (ConvCase(channels=16, out_channels=18), "16 bytes"),
        (ConvCase(channels=32, out_channels=32, groups=4), "edge of a group"),
        (ConvCase(channels=16, out_channels=16, residual=2), "strided residual"),
        (ConvCase(channels=16, out_channels=16, shortcut=2, slack=1), "odd height or width"),
    ],
)
def test_what_boxes_cannot_do_is_refused(case, word):
    require("triton")
    args = case.build(FP32)
    assert word in refusal(*arguments(args), Tile(16, 16, 16, 4, 1, persistent=1))
    check(args, None)  # and runs without


@pytest.mark.parametrize("case", named(CASES | BOXES))
def test_predicted_tile(case):
    require("triton")
    check(case.build(FP32), None)


@pytest.mark.parametrize("tile", [TILES[0], PERSISTENT[0]], ids=str)
def test_pixels_that_a_strided_shortcut_skips_may_be_nan(tile):
    require("triton")
    args = BOXES["shortcut"].build(FP32)
    args["shortcut"].x[:, :, :, 1::2] = float("nan")
    check(args, tile)


@pytest.mark.parametrize("tile", [TILES[0], PERSISTENT[0]], ids=str)
def test_every_norm_has_its_own_eps(tile):
    require("triton")
    args = ConvCase(channels=16, out_channels=16, shortcut=1, shortcut_channels=16).build(FP32)
    args["norm"] = args["norm"]._replace(eps=0.5)
    args["shortcut"] = args["shortcut"]._replace(norm=args["shortcut"].norm._replace(eps=0.1))
    check(args, tile)


def test_rows_behind_the_last_are_not_written():
    require("triton")
    args = ConvCase(batch=1, channels=16, out_channels=16, size=(3, 3)).build(FP32)
    memory = torch.full((64 * 16,), 7.0, device=DEVICE)
    real, torch.empty = torch.empty, lambda *a, **k: memory[: 9 * 16].as_strided((1, 16, 3, 3), (144, 1, 48, 16))
    try:
        launch(args, Tile(64, 32, 16, num_warps=4, num_stages=1))
    finally:
        torch.empty = real
    assert (memory[9 * 16 :] == 7).all()
    assert (memory[: 9 * 16] != 7).all()


sizes = st.sampled_from([1, 16, 64, 256])


@given(
    *(sizes, sizes, sizes, st.sampled_from([1, 4, 8])),
    *(st.integers(1, 9), st.integers(1, 16), st.integers(0, 4), st.booleans(), st.booleans()),
)
def test_names_of_tiles_are_read_back(m, n, k, warps, stages, split, persistent, halo, ring):
    tile = Tile(m, n, k, warps, stages, split, persistent, halo, ring)
    assert Tile.parse(str(tile)) == tile
    stage = StageTile(m, n, k, warps, stages, split, persistent > 0, halo, split > 8)
    assert StageTile.parse(str(stage)) == stage


@pytest.mark.parametrize(
    "name",
    [
        "",
        "64x64",
        "64x64x64",
        "63x64x64.w4.s3",
        "64x64x64.w4.s3.z1",
        "axbxc.w4.s3",
        "0x1x1.w1.s1",
        "64x1048576x64.w4.s2",
        "64x64x64.w4.s2.k4000",
    ],
)
def test_what_is_no_name_of_a_tile(name):
    for kind in (Tile, StageTile):
        with pytest.raises(ValueError, match="^name must be that of a tile, got "):
            kind.parse(name)
