"""A bottleneck's tail and the next one's head with the kernel and the tile that suit them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import tail_ring
from .choice import chip_of
from .cost import LATENCY, Ceilings, Gemm, expand_shift_cost, expand_shift_halo_cost, predicted
from .expand_shift import bind_expand_shift, refusal
from .expand_shift_tma import bind_expand_shift_tma
from .gpu import Gpu, right_on, triton_release
from .halo import PIXELS, boxes_of, halo_buffers, tail_refusal
from .tiles import StageTile

__all__ = ["TailGemms", "bind_stage", "candidates", "choose_stage_tile", "gemms_of", "predicted_seconds", "refusal"]

#: tiles that compile without a spill (`make codegen`), by (TMA, width of the 3x3, downsample branch):
#: block_m, block_n, warps
TILES = {
    (True, 64, False): ((128, 64, 8),),
    (True, 64, True): ((64, 64, 4),),
    (True, 128, False): ((128, 32, 8),),
    (True, 128, True): ((64, 32, 4),),
    (True, 256, False): ((64, 64, 8),),
    (True, 256, True): ((64, 32, 8),),
    (False, 64, False): ((64, 32, 4),),
    (False, 64, True): ((64, 32, 4),),
    (False, 128, False): ((64, 32, 4),),
    (False, 128, True): ((64, 32, 8),),
    (False, 256, False): ((64, 64, 8),),
    (False, 256, True): ((64, 32, 8),),
}
#: on sm_90, whose matrix units read both operands from shared memory, in fp16 and bf16 these fit as well
MORE = {
    (64, False): ((256, 32, 16), (64, 64, 4)),
    (64, True): ((128, 32, 8),),
    (128, False): ((128, 32, 16),),
    (128, True): ((128, 32, 8),),
}
SMALL_SHARED = 100 << 10  # shared memory of GeForce and workstation chips, where the widest tiles are too large


class TailGemms(NamedTuple):
    """The convolutions of a tail as GEMMs; see `cost.expand_shift_cost`."""

    conv: Gemm
    expand: Gemm
    second: Gemm | None
    reduce: Gemm | None


def gemms_of(size: Sequence[int], conv, expand, shortcut, reduce) -> TailGemms:
    """The GEMMs of a tail, given the size `[N, C, H, W]` of its input and its convolutions."""
    n, c, h, w = size
    p, q = conv.output_size(h, w)
    m, k = n * p * q, expand.weight.shape[0]
    taps = conv.weight.shape[2] * conv.weight.shape[3]
    return TailGemms(
        Gemm(m, conv.weight.shape[0], c, taps, n * h * w, boxes=boxes_of(n, p, q)[0]),
        Gemm(m, k, expand.weight.shape[1], 1, m),
        None if shortcut is None else Gemm(m, k, shortcut.weight.shape[1], 1, m),
        None if reduce is None else Gemm(m, reduce.weight.shape[0], k, 1, m),
    )


def candidates(width: int, outputs: int, itemsize: int, second: bool, gpu: Gpu) -> list[StageTile]:
    """The tiles for a width of the 3x3; none where no kernel is right for it.

    Args:
        width: channels of the 3x3.
        outputs: channels of the next reduce, 0 without one.
        itemsize: bytes of an element.
        second: whether there is a downsample branch.
        gpu: where it runs.
    """
    known = max(64, 1 << (max(width, outputs) - 1).bit_length())
    widest = {2: 256, 4: 128}.get(itemsize, 0)  # more TF32 operands than that do not fit the registers
    if known > widest:
        return []
    blocks = TILES[gpu.tail_tma, known, second]
    stages, chunk_stages = (3 if itemsize == 2 else 2), 2
    if gpu.capability == 90 and known == 128 and itemsize == 4:  # four warps have too few registers
        blocks = ((64, 32, 8),)
    elif gpu.capability == 90 and itemsize == 2:
        more = MORE.get((known, second), ())
        blocks += tuple(tile for tile in more if tile[0] < 256 or triton_release() < (3, 9))  # there it spills 8 bytes
    elif gpu.capability // 10 == 10 and second and itemsize == 4:  # all accumulators pass through registers
        blocks = ((64, 32, 4),)
    elif chip_of(gpu).shared <= SMALL_SHARED and (known == 256 or itemsize == 4):
        blocks = ((64, 32, 4 if known == 64 else 8),)
        crowded = known == 128 if itemsize == 4 else known == 256 and gpu.capability >= 120 and not gpu.tma
        stages, chunk_stages = 2, 1 if crowded else 2
    block_k = min(width, 128 // itemsize)
    # where it fits the registers, and without fewer programs a multiprocessor
    held = second and gpu.tail_tma and itemsize == 2 and known == 64
    tiles = [StageTile(m, n, block_k, warps, stages, chunk_stages, gpu.tail_tma, False, held) for m, n, warps in blocks]
    buffers = halo_buffers(width, 4 * width, outputs, second)
    if buffers and gpu.gluon and itemsize == 2:
        tiles.append(StageTile(PIXELS, width, width, 4, 1, buffers, True, True))
    if gpu.gluon and itemsize == 2:
        tiles += tail_ring.tiles_for(width, 4 * width, outputs, 2 * width if second else 0)
    return tiles


def fitting(gemms: TailGemms, itemsize: int, gpu: Gpu) -> list[StageTile]:
    """The candidates whose kernels may take a tail; the refusals ask the rest."""
    outputs = 0 if gemms.reduce is None else gemms.reduce.n
    tiles = candidates(gemms.conv.n, outputs, itemsize, gemms.second is not None, gpu)
    return [tile for tile in tiles if _fits(gemms, tile)]


def choose_stage_tile(gemms: TailGemms, itemsize: int, gpu: Gpu) -> StageTile | None:
    """The candidate with the least predicted time, or None where there is none.

    What no GPU has timed yet runs where a search found it the fastest.
    """
    tiles = [tile for tile in fitting(gemms, itemsize, gpu) if tail_ring.is_timed(tile)]
    chip = chip_of(gpu)

    def seconds(tile: StageTile) -> float:
        return predicted_seconds(gemms, itemsize, tile, chip)

    return min(tiles, key=seconds, default=None)


def _fits(gemms: TailGemms, tile: StageTile) -> bool:
    """Whether the kernel of a tile that was made for the width may take a tail."""
    conv, expand, second, _ = gemms
    branch = 0 if second is None else second.k
    same = (conv.taps, conv.k, expand.n) == (9, conv.n, 4 * conv.n)
    if tile.halo:
        return same and conv.in_pixels == conv.m and branch in (0, conv.n)
    return not tile.ring or (same and conv.in_pixels == conv.m and not branch)


def predicted_seconds(gemms: TailGemms, itemsize: int, tile: StageTile, chip: Ceilings) -> float:
    """What a tail should take with a tile on a chip."""
    conv, expand, second, reduce = gemms
    if tile.halo:
        return _halo_seconds(gemms, itemsize, tile, chip)
    if tile.ring:
        return _ring_seconds(gemms, itemsize, tile, chip)
    cost = expand_shift_cost(conv, expand, itemsize, tile, second=second, reduce=reduce)
    outputs = 0 if reduce is None else reduce.n
    branch = 0 if second is None else second.k
    rate = chip.multiprocessors / chip.l2, 2 * chip.multiprocessors / chip.matrix
    taps = conv.taps * -(-conv.k // tile.block_k)
    loaded = (tile.block_m + conv.n) * tile.block_k * itemsize
    tap = max(
        LATENCY / max(0.7, tile.tap_stages - 1),
        loaded * rate[0],
        tile.block_m * conv.n * tile.block_k * rate[1],
    )
    chunks = -(-expand.n // tile.block_n)
    loaded = (conv.n + outputs + branch + tile.block_m) * tile.block_n * itemsize
    chunk = max(
        LATENCY / max(0.7, tile.chunk_stages - 1),
        loaded * rate[0],
        tile.block_m * tile.block_n * (conv.n + outputs + branch) * rate[1],
    )
    # a thread's share of the 3x3's result, of the next reduce's sums and of a chunk's, and addresses
    threads = 32 * tile.num_warps
    chunk_sums = (1 if second is None else 2) * tile.block_n
    registers = tile.block_m * (conv.n // 2 + outputs + chunk_sums) // threads + 40
    resident = max(1, 65536 // (-(-registers // 8) * 8 * threads))
    programs = -(-conv.m // tile.block_m)
    return predicted(cost, programs, resident, chip, step_seconds=taps * tap + chunks * chunk, hindered=True)


def _halo_seconds(gemms: TailGemms, itemsize: int, tile: StageTile, chip: Ceilings) -> float:
    """One program a multiprocessor, whose steps wait for each other: filters, 3x3, chunk after chunk, next reduce."""
    conv, expand, second, reduce = gemms
    tiles = conv.boxes or -(-conv.m // tile.block_m)
    cost = expand_shift_halo_cost(conv, expand, itemsize, 0, second=second, reduce=reduce)  # filters come at the start
    filters = itemsize * sum(gemm.filters for gemm in gemms if gemm is not None)
    start = filters * chip.multiprocessors / chip.l2
    rate = 2 * tile.block_m * chip.multiprocessors / chip.matrix
    width = conv.n + (0 if second is None else second.k) + (0 if reduce is None else reduce.n)
    chunk = max(LATENCY, tile.block_n * width * rate)
    step = conv.taps * conv.k * conv.n * rate + expand.n // tile.block_n * chunk + 2 * LATENCY
    return start + predicted(cost, tiles, 1, chip, step_seconds=step, hindered=True)


def _ring_seconds(gemms: TailGemms, itemsize: int, tile: StageTile, chip: Ceilings) -> float:
    """One program a multiprocessor, whose loads run ahead: products, and a chunk's way through the registers."""
    conv, expand, second, reduce = gemms
    cost = expand_shift_cost(conv, expand, itemsize, tile, second=second, reduce=reduce)
    rate = 2 * tile.block_m * chip.multiprocessors / chip.matrix
    products = rate * sum(gemm.filters for gemm in gemms if gemm is not None)
    chunks = expand.n // tile.block_n
    step = products + chunks * LATENCY / 2
    return predicted(cost, -(-conv.m // tile.block_m), 1, chip, step_seconds=step, hindered=True)


def _boxes_hold(x, conv) -> bool:
    """Whether `boxes.image_box` can see the image at the convolution's stride: 1, or 2 with even height and width."""
    return conv.stride == (1, 1) or (conv.stride == (2, 2) and x.shape[2] % 2 == x.shape[3] % 2 == 0)


def kernel_of(tile: StageTile) -> str:
    """The kernel that a tile is for."""
    ring = "_wide" if tail_ring.is_wide(tile) else "_ring"
    return "expand_shift" + (ring if tile.ring else "_halo" if tile.halo else "_tma" if tile.tma else "")


def takes(h, conv, expand, shortcut, reduce, tile: StageTile) -> bool:
    """Whether the kernel that a tile is for runs a tail; else `bind_stage` has another one stand in."""
    if tile.halo:
        return tail_refusal(h, conv, expand, shortcut, reduce, tile) is None
    return not tile.ring or tail_ring.refusal(h, conv, expand, shortcut, reduce, tile) is None


def bind_stage(h, conv, expand, other, shortcut, reduce, tile: StageTile, *, overwrite: bool = False):
    """Prepare the kernel that the tile is for; arguments and result are those of `bind_expand_shift`.

    What a downsample branch reads is not written over, whatever `overwrite` is.
    """
    overwrite = overwrite and shortcut is None
    taken = takes(h, conv, expand, shortcut, reduce, tile)
    if tile.halo and taken:
        from .expand_shift_halo import bind_expand_shift_halo

        return bind_expand_shift_halo(h, conv, expand, other, shortcut, reduce, tile, overwrite=overwrite)
    boxes = _boxes_hold(h, conv) and (shortcut is None or _boxes_hold(other, shortcut))
    if tile.ring:
        if taken:
            if tail_ring.is_wide(tile):
                from .expand_shift_wide import bind_expand_shift_wide as bind_ring
            else:
                from .expand_shift_ring import bind_expand_shift_ring as bind_ring

            return bind_ring(h, conv, expand, other, shortcut, reduce, tile, overwrite=overwrite)
        tile = tail_ring.by_boxes(tile)
    boxes = boxes and right_on(h.device, lambda gpu: gpu.tail_tma)
    bind = bind_expand_shift_tma if tile.tma and boxes else bind_expand_shift
    return bind(h, conv, expand, other, shortcut, reduce, tile, overwrite=overwrite)
