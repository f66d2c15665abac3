"""The tile of a convolution where none was measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_resblock.kernels import choice, convolution, gpu
from fused_resblock.kernels.choice import CHIPS, candidates, chip_of, choose_tile, predicted_seconds, ranked
from fused_resblock.kernels.cost import Ceilings, Gemm, conv_halo_cost, resident_programs
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.tables import Entry
from fused_resblock.kernels.tiles import Tile

CHANNELS = st.integers(1, 2048)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 2**31),
    n=CHANNELS,
    k=CHANNELS,
    taps=st.sampled_from([1, 3, 9, 49]),
    itemsize=st.sampled_from([2, 4, 8]),
    kind=st.sampled_from(["plain", "residual", "second"]),
    tma=st.booleans(),
    multiprocessors=st.integers(1, 200),
    capability=st.sampled_from([75, 80, 86, 89, 90, 100, 103, 120]),
)
def test_choice_is_a_tile_that_the_kernel_takes(m, n, k, taps, itemsize, kind, tma, multiprocessors, capability):
    gpu = Gpu(multiprocessors, capability)
    second = Gemm(m, n, k, 1, m) if kind == "second" else None
    gemm, residual = Gemm(m, n, k, taps, m), kind == "residual"
    tile = choose_tile(gemm, itemsize, residual=residual, second=second, tma=tma, gpu=gpu)
    for size in (tile.block_m, tile.block_n, tile.block_k):
        assert size >= 16, "tl.dot takes no less"
        assert size & (size - 1) == 0, "a power of two"
    assert tile.block_k * itemsize <= 128 or tile.block_k == 16
    assert taps == 1 or tile.persistent or tile.num_warps == 4, "pytorch#173068"
    assert not tile.persistent or (tma and gpu.tma)
    assert tile.split_k == 1 or not tile.persistent
    assert resident_programs(tile, itemsize, chip_of(gpu).shared, residual=residual, second=second is not None)


@pytest.mark.parametrize(
    ("gemm", "tma", "expected"),
    [
        pytest.param(Gemm(128 * 56 * 56, 64, 64, 9, 128 * 56 * 56), False, (128, 64, 64, 1), id="3x3 of a full batch"),
        pytest.param(Gemm(128 * 56 * 56, 256, 64, 1, 128 * 56 * 56), True, (256, 64, 64, 1), id="1x1 of a full batch"),
        pytest.param(Gemm(1, 1, 1, 1, 1), False, (64, 16, 16, 1), id="one number"),
    ],
)
def test_choice(gemm, tma, expected):
    tile = choose_tile(gemm, 2, tma=tma)
    assert (tile.block_m, tile.block_n, tile.block_k, tile.split_k) == expected


def test_few_pixels_and_many_channels_split_the_loop():
    """The last stage at batch 1: 8 programs would leave 124 multiprocessors idle."""
    gemm = Gemm(49, 512, 512, 9, 49)
    tile = choose_tile(gemm, 2)
    assert tile.split_k > 1
    assert gemm.pieces(tile) * tile.split_k > 32


@pytest.mark.parametrize("capability", CHIPS)
def test_choice_has_the_least_predicted_time(capability):
    gpu = Gpu(CHIPS[capability].multiprocessors, capability)
    gemm = Gemm(128 * 28 * 28, 128, 128, 9, 128 * 28 * 28)
    chip, best = chip_of(gpu), choose_tile(gemm, 2, tma=True, gpu=gpu)
    fastest = predicted_seconds(gemm, 2, best, chip)
    for tma in (False, gpu.tma):
        for tile in candidates(gemm, 2, residual=False, second=False, tma=tma, gpu=gpu):
            assert predicted_seconds(gemm, 2, tile, chip) >= fastest - 1e-8, tile


def test_a_gpu_with_half_the_multiprocessors_has_half_the_rates():
    whole, half = chip_of(Gpu(132, 90)), chip_of(Gpu(66, 90))
    assert (half.dram, half.l2, half.matrix) == (whole.dram / 2, whole.l2 / 2, whole.matrix / 2)


def test_a_chip_between_two_known_ones_counts_as_the_older():
    assert chip_of(Gpu(148, 103)).name == "B200"
    assert chip_of(Gpu(100, 75)).name == "A100"


def test_without_matrix_units_tiles_are_small():
    """fp32 products that must not be rounded to TF32: larger tiles spilled thousands of bytes a thread."""
    gemm = Gemm(128 * 28 * 28, 128, 128, 9, 128 * 28 * 28)
    for tile in ranked(gemm, 4, tma=True, ieee=True):
        assert not tile.persistent
        assert tile.block_m * tile.block_n // (32 * tile.num_warps) <= 32
    assert choose_tile(gemm, 4, tma=True).persistent


@pytest.mark.parametrize(("release", "there"), [((3, 6), False), ((3, 7), True)])
def test_tiles_whose_matrix_instructions_a_release_serializes_are_left_out(release, there, monkeypatch):
    monkeypatch.setattr(choice, "triton_release", lambda: release)
    options = {"residual": False, "second": False, "gpu": Gpu(132, 90)}
    split = choice.candidates(Gemm(784, 512, 2048, 1, 784), 2, tma=False, **options)
    assert any(t.split_k > 1 and t.num_warps == 8 for t in split) == there


@pytest.mark.parametrize("release", [(3, 6), (3, 7), (3, 9)])
@pytest.mark.parametrize(("capability", "there"), [(90, False), (100, True)])
def test_tiles_whose_pixels_pass_through_registers_are_left_out(capability, there, release, monkeypatch):
    """On Hopper they are written anew while a product may still read them."""
    monkeypatch.setattr(choice, "triton_release", lambda: release)
    options = {"residual": False, "second": False, "gpu": Gpu(132, capability)}
    for groups in (1, 4):  # no tile is wider than a group
        gemm = Gemm(4096, 128, 128, 9, 4096, groups)
        assert any(t.block_n < 64 for t in choice.candidates(gemm, 2, tma=True, **options)) == there
        assert choice.ranked(gemm, 2, tma=True, gpu=options["gpu"])


@pytest.mark.parametrize(
    ("device", "capability", "taken"), [("cuda", 90, False), ("cuda", 100, True), ("cpu", 90, True)]
)
def test_a_table_that_names_such_a_tile_is_not_followed_on_hopper(device, capability, taken, monkeypatch):
    monkeypatch.setattr(gpu, "gpu_of", lambda device: Gpu(132, capability))
    monkeypatch.setattr(convolution, "tma_refusal", lambda *args: None)
    x = SimpleNamespace(device=torch.device(device))
    for tile, right in ((Tile(64, 32, 64, 4, 4, persistent=4), taken), (Tile(64, 64, 64, 4, 4, persistent=4), True)):
        found = convolution.usable(Entry(64, "triton", tile), x, None, None, None)
        assert found == (tile if right else None)


@pytest.mark.parametrize(("release", "there"), [((3, 7), True), ((3, 9), False)])
def test_tiles_that_spill_with_a_release_are_left_out(release, there, monkeypatch):
    monkeypatch.setattr(choice, "triton_release", lambda: release)
    gemm = Gemm(4096, 64, 256, 1, 4096)
    options = {"residual": False, "second": False, "tma": True}
    small = [t for t in choice.candidates(gemm, 4, gpu=Gpu(148, 100), **options) if (t.block_m, t.block_n) == (64, 64)]
    assert bool(small) == there
    assert any((t.block_m, t.block_n) == (64, 64) for t in choice.candidates(gemm, 2, gpu=Gpu(148, 100), **options))


@pytest.mark.parametrize(("release", "tma"), [((3, 6), False), ((3, 7), True), ((4, 0), True)])
def test_tma_of_capability_12_waits_for_triton_3_7(release, tma, monkeypatch):
    monkeypatch.setattr(gpu, "triton_release", lambda: release)
    assert Gpu(170, 120).tma == tma
    assert Gpu(132, 90).tma
    assert not Gpu(108, 80).tma


def test_filters_of_a_halo_kernel_come_from_l2_once():
    """Ahead of its first tile: where L2 alone takes time, what a prediction pays for is what the kernel loads."""
    chip = Ceilings("L2", dram=1e20, l2=1e6, matrix=1e20, multiprocessors=4)
    gemm = Gemm(64 * 400, 64, 64, 9, 64 * 400)
    loaded = conv_halo_cost(gemm, 2, 8).l2
    tile = Tile(64, 64, 64, 4, 1, persistent=2, halo=True)
    assert predicted_seconds(gemm, 2, tile, chip) * chip.l2 == pytest.approx(loaded, rel=1e-3)
