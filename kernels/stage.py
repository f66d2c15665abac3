"""A bottleneck's tail and the next one's head with the kernel and the tile that suit them."""

from __future__ import annotations

from .choice import chip_of
from .cost import LATENCY, Ceilings, Gemm, expand_shift_cost, predicted
from .expand_shift import bind_expand_shift, refusal
from .expand_shift_tma import bind_expand_shift_tma
from .gpu import Gpu
from .tiles import StageTile

__all__ = ["bind_stage", "choose_stage_tile", "predicted_seconds", "refusal"]

#: the largest tiles that compile without a spill (`make codegen`), by (TMA, width of the 3x3, downsample branch):
#: block_m, block_n, warps
TILES = {
    (True, 64, False): (128, 64, 8),
    (True, 64, True): (64, 64, 4),
    (True, 128, False): (128, 32, 8),
    (True, 128, True): (64, 32, 4),
    (True, 256, False): (128, 32, 8),
    (True, 256, True): (64, 32, 8),
    (False, 64, False): (128, 32, 8),
    (False, 64, True): (64, 32, 4),
    (False, 128, False): (64, 32, 4),
    (False, 128, True): (64, 32, 8),
    (False, 256, False): (64, 64, 8),
    (False, 256, True): (64, 32, 8),
}
SMALL_SHARED = 100 << 10  # shared memory of GeForce and workstation chips, where the widest tiles are too large


def choose_stage_tile(width: int, outputs: int, itemsize: int, second: bool, gpu: Gpu) -> StageTile | None:
    """The tile for a width of the 3x3, or None where no kernel is right for it.

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
        return None
    block_m, block_n, warps = TILES[gpu.tma, known, second]
    stages, chunk_stages = (3 if itemsize == 2 else 2), 2
    if gpu.capability // 10 == 10:  # all accumulators pass through registers
        if known == 256:
            block_m, block_n, warps = 64, 64, 8
        elif second and itemsize == 4:
            block_m, block_n, warps = 64, 32, 4
    elif chip_of(gpu).shared <= SMALL_SHARED and (known == 256 or itemsize == 4):
        block_m, block_n, warps = 64, 32, 4 if known == 64 else 8
        stages, chunk_stages = 2, 1 if itemsize == 4 and known == 128 else 2
    return StageTile(block_m, block_n, min(width, 128 // itemsize), warps, stages, chunk_stages, gpu.tma)


def predicted_seconds(
    conv: Gemm,
    expand: Gemm,
    itemsize: int,
    tile: StageTile,
    chip: Ceilings,
    *,
    second: Gemm | None = None,
    reduce: Gemm | None = None,
) -> float:
    """What a tail should take with a tile on a chip; arguments are those of `cost.expand_shift_cost`."""
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
    return predicted(cost, programs, resident, chip, step_seconds=taps * tap + chunks * chunk)


def bind_stage(h, conv, expand, other, shortcut, reduce, tile: StageTile):
    """Prepare the kernel that the tile is for; arguments and result are those of `bind_expand_shift`."""
    odd = conv.stride[0] == 2 and (h.shape[2] % 2 or h.shape[3] % 2)
    odd = odd or (shortcut is not None and shortcut.stride[0] == 2 and (other.shape[2] % 2 or other.shape[3] % 2))
    bind = bind_expand_shift_tma if tile.tma and not odd else bind_expand_shift
    return bind(h, conv, expand, other, shortcut, reduce, tile)
