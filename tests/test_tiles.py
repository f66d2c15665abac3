"""The convolution kernel with every tile shape, larger and smaller than the problem, and the heuristic that picks one."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, FP64, ConvCase, cast, conv_bn_act_reference, floor, require, slack_of
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity

from fused_resblock.kernels.conv_bn_act import conv_bn_act
from fused_resblock.kernels.tiles import Gpu, Tile, choose_tile
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
TILES = [(16, 16, 16), (32, 16, 32), (16, 64, 16), (64, 32, 16), (128, 16, 64), (16, 128, 128), (128, 128, 64)]


def launch(args: dict, tile: Tile | None) -> torch.Tensor:
    """The launcher called with `functional`'s arguments."""
    stride, padding, dilation = (pair(args[k]) for k in ("stride", "padding", "dilation"))
    conv = Conv(args["weight"], args["bias"], args["norm"], stride, padding, dilation, args["groups"])
    shortcut = args.get("shortcut")
    other = args.get("residual") if shortcut is None else shortcut.x
    branch = None if shortcut is None else shortcut.conv
    epilogue = Epilogue(args.get("residual_stride", 1), None, branch, args["relu"])
    return conv_bn_act(args["x"], conv, other, epilogue, tile=tile)


@pytest.mark.parametrize("blocks", [pytest.param(t, id="x".join(map(str, t))) for t in TILES])
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_forced_tile(case, blocks):
    require("triton")
    args = case.build(FP32)
    actual = launch(args, Tile(*blocks, num_warps=4, num_stages=1))
    assert_parity(actual, conv_bn_act_reference(**args), conv_bn_act_reference(**cast(args, FP64)), what="y")


@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (FP16, BF16, FP64)])
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_forced_tile_in_other_dtypes(case, dtype):
    require("triton", dtype)
    args = case.build(dtype)
    actual = launch(args, Tile(32, 16, 32, num_warps=4, num_stages=2))
    exact = conv_bn_act_reference(**cast(args, FP64))
    assert_parity(
        actual, conv_bn_act_reference(**args), exact, what="y", floor=floor(dtype), slack=slack_of("triton", dtype)
    )


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


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 2**31),
    n=st.integers(1, 4096),
    k=st.integers(1, 4096),
    taps=st.sampled_from([1, 3, 9, 49]),
    itemsize=st.sampled_from([2, 4, 8]),
    second=st.booleans(),
    multiprocessors=st.integers(1, 200),
    capability=st.sampled_from([80, 86, 89, 90, 100, 120]),
)
def test_choice_is_a_tile_that_the_kernel_takes(m, n, k, taps, itemsize, second, multiprocessors, capability):
    tile = choose_tile(m, n, k, taps, itemsize, second=second, gpu=Gpu(multiprocessors, capability))
    for size in (tile.block_m, tile.block_n, tile.block_k):
        assert size >= 16, "tl.dot takes no less"
        assert size & (size - 1) == 0, "a power of two"
    assert tile.block_k * itemsize <= 128 or tile.block_k == 16
    assert taps == 1 or tile.num_warps == 4, "pytorch#173068"
    held = (tile.block_m + tile.block_n) * tile.block_k * itemsize * tile.num_stages
    assert held <= 100 * 1024, "the shared memory of every supported GPU"


@pytest.mark.parametrize(
    ("problem", "blocks"),
    [
        pytest.param((128 * 56 * 56, 64, 64, 9, 2), (128, 64, 64), id="3x3 of a full batch"),
        pytest.param((128 * 56 * 56, 256, 64, 1, 2), (128, 128, 64), id="1x1 of a full batch"),
        pytest.param((49, 512, 512, 9, 2), (64, 32, 64), id="7x7 image, batch 1"),
        pytest.param((1, 1, 1, 1, 4), (64, 16, 16), id="one number"),
    ],
)
def test_choice(problem, blocks):
    tile = choose_tile(*problem)
    assert (tile.block_m, tile.block_n, tile.block_k) == blocks
