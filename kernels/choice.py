"""The tile of a convolution where none was measured: the candidate with the least predicted time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from .cost import (
    LATENCY,
    LAUNCH,
    Ceilings,
    Cost,
    Gemm,
    conv_bn_act_cost,
    conv_halo_cost,
    elementwise_cost,
    predicted,
    resident_programs,
)
from .gpu import Gpu, triton_release
from .halo import blocks_of
from .ring import WIDTH
from .tiles import Tile

#: by generation: vendors' figures of device memory and dense fp16 rates, at what kernels reach of them (80 to 90 and
#: 70 %), and L2 as measured by others; relative sizes are what counts here. An H100's tiles come from L2 faster than
#: that; how near to the fastest those are that are picked tells `benchmarks.predictions`
CHIPS = {
    80: Ceilings("A100", 1.7e12, 4.0e12, 220e12, 108, 164 << 10),
    86: Ceilings("RTX 3090", 0.8e12, 2.0e12, 100e12, 82, 100 << 10),
    89: Ceilings("RTX 4090", 0.9e12, 4.5e12, 230e12, 128, 100 << 10),
    90: Ceilings("H100", 3.0e12, 5.5e12, 700e12, 132, 228 << 10),
    100: Ceilings("B200", 7.0e12, 10e12, 1500e12, 148, 228 << 10),
    120: Ceilings("RTX 5090", 1.6e12, 6.0e12, 290e12, 170, 100 << 10),
}
#: (block_m, block_n, warps): no larger accumulator fits, and wgmma needs 64 rows
SHAPES = (
    (64, 32, 4),
    (64, 64, 4),
    (128, 64, 4),
    (128, 64, 8),
    (64, 128, 8),
    (128, 128, 8),
    (256, 64, 8),
    (128, 256, 8),
    (256, 128, 8),
)
SPLITS = (1, 2, 4, 8, 16)
#: of `conv_halo`, of which two programs fit a multiprocessor
HALO = Tile(64, 64, 64, 4, 1, persistent=2, halo=True)
#: of `conv_pair`, the one that loads least first
RINGS = tuple(
    Tile(block_m, block_n, 64, 8, stages, persistent=programs, ring=True)
    for block_m, block_n, stages, programs in ((128, 256, 4, 1), (128, 128, 3, 2), (128, 128, 5, 1))
)
#: of `conv_ring` with a residual, whose pieces leave room for so many stages
RESIDUAL_RINGS = tuple(Tile(128, n, 64, 8, stages, persistent=1, ring=True) for n, stages in ((256, 3), (128, 5)))


def chip_of(gpu: Gpu) -> Ceilings:
    """The ceilings of a GPU's generation, for as many multiprocessors as it has."""
    nearest = max((known for known in CHIPS if known <= gpu.capability), default=80)
    chip = CHIPS[nearest]
    share = gpu.multiprocessors / chip.multiprocessors
    rates = {"dram": chip.dram * share, "l2": chip.l2 * share, "matrix": chip.matrix * share}
    return replace(chip, multiprocessors=gpu.multiprocessors, **rates)


def power_of_two(value: int, high: int) -> int:
    """The smallest power of two that is >= value, kept within [16, high]."""
    return min(high, max(16, 1 << max(0, value - 1).bit_length()))


def _spills_with_3_9(gemm: Gemm, itemsize: int) -> bool:
    """Whether Triton 3.9 for sm_100 leaves a part of a 64x64 tile on the stack: a TF32 1x1 of at most 64 channels."""
    return itemsize == 4 and gemm.taps == 1 and gemm.n // gemm.groups <= 64 and triton_release() >= (3, 9)


def _one_by_one(gemm: Gemm, warps: int, gpu: Gpu) -> bool:
    """Whether each wgmma of the kernel with pointers would be waited for: where 8 warps split a 1x1.

    Triton before 3.7 touches sums or operands that are under way, and the assembler keeps the results right by
    serializing (`make codegen` tells).
    """
    return gpu.capability == 90 and triton_release() < (3, 7) and gemm.taps == 1 and warps == 8


def candidates(
    gemm: Gemm, itemsize: int, *, residual: bool, second: bool, tma: bool, gpu: Gpu, ieee: bool = False
) -> Iterator[Tile]:
    """Tiles that fit the chip and are no wider than the convolution.

    In `ieee` (fp32 products not rounded to TF32) there are no matrix units, and operands pass through registers.

    On sm_100 the accumulator lies in tensor memory and passes through registers whole: 64 columns at most, and with a
    second GEMM (two of them) a quarter of the registers. R x S kernels without TMA stay at 4 warps: with 8, a
    flattened loop over taps and channels has miscompiled (pytorch#173068).
    """
    if tma and not second and takes_halo(gemm, itemsize, gpu):
        yield HALO
    shared = chip_of(gpu).shared
    width = power_of_two(gemm.n // gemm.groups, 256)
    block_k = power_of_two(gemm.k // gemm.groups, 128 // itemsize)
    for block_m, block_n, warps in SHAPES:
        if block_n > max(width, 32) or (gpu.capability // 10 == 10 and block_n > 64):
            continue
        if ieee and (second or block_m * block_n // (32 * warps) > 32) and (block_m, block_n) != (64, 32):
            continue
        if (block_m, block_n) == (256, 128) and gpu.capability != 90:  # elsewhere operands take registers, too
            continue
        if tma and (block_m, block_n) == (64, 64) and gpu.capability // 10 == 10 and _spills_with_3_9(gemm, itemsize):
            continue
        if tma and not gpu.conv_tma_right(min(block_n, width)):
            continue
        one_by_one = not tma and _one_by_one(gemm, warps, gpu)
        crowded = gpu.capability // 10 == 10 and second
        if crowded and block_m * block_n // (32 * warps) > max(16, 64 // itemsize):
            continue
        if not tma and gemm.taps > 1 and warps > 4:
            continue
        for stages in (4, 3, 2):
            tile = Tile(block_m, min(block_n, width), block_k, warps, stages, persistent=int(tma))
            resident = resident_programs(tile, itemsize, shared, residual=residual, second=second)
            if resident:
                yield replace(tile, persistent=resident if tma else 0)
                if tma or one_by_one:  # the rest split the loop
                    continue
                for split in SPLITS[1:]:
                    if gemm.steps(tile) >= 4 * split:
                        yield replace(tile, split_k=split)


def takes_halo(gemm: Gemm, itemsize: int, gpu: Gpu) -> bool:
    """Whether `conv_halo` takes a 3x3: blocks of 64 channels in 16 bits, as many pixels out as in."""
    fits = gemm.taps == 9 and gemm.m == gemm.in_pixels and blocks_of(gemm.n, gemm.k, gemm.groups) > 0
    return fits and itemsize == 2 and gpu.gluon


def rings(gemm: Gemm, second: Gemm | None, itemsize: int, gpu: Gpu) -> list[Tile]:
    """Tiles of `conv_pair`, or `conv_ring` with a residual, for 1x1s of whole steps, of which programs take several.

    Where there are no more steps than GEMMs, smaller tiles without a ring, several a multiprocessor, are faster.
    """
    channels = [one.k for one in (gemm, second) if one is not None]
    if not gpu.gluon or itemsize != 2 or gemm.taps > 1 or gemm.groups > 1 or any(k % WIDTH for k in channels):
        return []
    if max(channels) <= WIDTH:
        return []
    tiles = RESIDUAL_RINGS if second is None else RINGS
    return [t for t in tiles if gemm.n % t.block_n == 0 and gemm.pieces(t) >= 2 * t.persistent * gpu.multiprocessors]


def _halo_seconds(gemm: Gemm, itemsize: int, tile: Tile, chip: Ceilings, residual: bool) -> float:
    """Programs that load their filters, then wait for their pixels, their products and their sums in each tile."""
    blocks = gemm.n // tile.block_n
    tiles = (gemm.boxes or -(-gemm.m // tile.block_m)) * blocks
    programs = min(tiles, tile.persistent * chip.multiprocessors)
    cost = conv_halo_cost(replace(gemm, groups=blocks), itemsize, 0, residual=residual)  # filters come at the start
    filters = tile.block_n * tile.block_k * gemm.taps * itemsize
    start = filters * max(programs, chip.multiprocessors) / chip.l2
    product = 2 * tile.block_m * filters // itemsize * chip.multiprocessors / chip.matrix
    return start + predicted(cost, tiles, tile.persistent, chip, step_seconds=product + 3 * LATENCY, hindered=True)


def predicted_seconds(
    gemm: Gemm, itemsize: int, tile: Tile, chip: Ceilings, *, residual: bool = False, second: Gemm | None = None
) -> float:
    """What a convolution should take with a tile on a chip."""
    if tile.halo:
        return _halo_seconds(gemm, itemsize, tile, chip, residual)
    if tile.split_k > 1 and second is not None:  # a kernel of its own; what it gives is added to the sums
        branch = predicted_seconds(second, itemsize, replace(tile, split_k=1), chip)
        return LAUNCH + branch + predicted_seconds(gemm, itemsize, tile, chip, residual=True)
    cost = conv_bn_act_cost(gemm, itemsize, tile, residual=residual, second=second)
    whole = Cost(cost.dram, cost.l2, gemm.tile_flops(tile) + (0 if second is None else second.tile_flops(tile)))
    steps = gemm.steps(tile) + (0 if second is None else second.steps(tile))
    loaded = (tile.block_m + tile.block_n) * tile.block_k * itemsize
    step = max(
        LATENCY / max(0.7, tile.num_stages - 1),  # loads are asked for so many steps ahead
        loaded * chip.multiprocessors / chip.l2,
        2 * tile.block_m * tile.block_n * tile.block_k * chip.multiprocessors / chip.matrix,
    )
    pieces = gemm.pieces(tile) * tile.split_k
    resident = resident_programs(tile, itemsize, chip.shared, residual=residual, second=second is not None)
    seconds = predicted(whole, pieces, max(1, resident), chip, step_seconds=-(-steps // tile.split_k) * step)
    if tile.split_k > 1:
        seconds += elementwise_cost(gemm.m * gemm.n, 4, tile.split_k).floor(chip) + LAUNCH
    return seconds


def ranked(
    gemm: Gemm,
    itemsize: int,
    *,
    residual: bool = False,
    second: Gemm | None = None,
    tma: bool = False,
    gpu: Gpu | None = None,
    ieee: bool = False,
) -> list[Tile]:
    """The candidates for a convolution, the one with the least predicted time first.

    Args:
        gemm: the convolution.
        itemsize: bytes of an element.
        residual: whether a residual is added.
        second: the 1x1 convolution that is accumulated beside it, or None.
        tma: whether `conv_tma` may run it.
        gpu: where it runs; an H100 unless told.
        ieee: whether fp32 products must not be rounded to TF32.
    """
    gpu = gpu or Gpu()
    chip = chip_of(gpu)
    kinds = (True, False) if tma and gpu.tma and not ieee else (False,)
    options = {"residual": residual, "second": second is not None, "gpu": gpu, "ieee": ieee}
    tiles = [tile for kind in kinds for tile in candidates(gemm, itemsize, tma=kind, **options)]  # type: ignore[arg-type]
    if tma and (residual or second is not None):
        tiles += rings(gemm, second, itemsize, gpu)

    def order(tile: Tile) -> tuple[int, bool, int]:
        """Time to 10 ns, then TMA, then how much is being loaded at any moment."""
        seconds = predicted_seconds(gemm, itemsize, tile, chip, residual=residual, second=second)
        resident = resident_programs(tile, itemsize, chip.shared, residual=residual, second=second is not None)
        loading = resident * (tile.num_stages - 1) * (tile.block_m + tile.block_n)
        return round(seconds * 1e8), not tile.persistent, -loading

    return sorted(tiles, key=order)


@lru_cache(maxsize=4096)
def choose_tile(gemm: Gemm, itemsize: int, **options: Any) -> Tile:
    """The first of `ranked`."""
    return ranked(gemm, itemsize, **options)[0]
