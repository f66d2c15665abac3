"""A design that was weighed and is not built: a whole bottleneck as one kernel, its reduced tile in L2.

A program takes a band of an image's rows. It computes the reduce of the band and of the halo around it into a scratch
of its own, which stays in L2, then reads the nine taps from there tile by tile, expands, adds and stores. Device memory
sees the block's input and output alone. L2, which is what binds, sees more than with the stage kernel: the input once
more as the residual, the scratch written and read, and the halo computed twice.
"""

from __future__ import annotations

from fused_resblock.kernels.cost import Ceilings, Cost, Gemm, predicted
from fused_resblock.kernels.tiles import StageTile

#: rows of the output in a band; the best of them counts
BANDS = (4, 7, 8, 14, 16, 28)
WIDEST = 128  # channels of the 3x3; of more, the filters alone overflow what a program can share


def whole_cost(
    reduce: Gemm, conv: Gemm, expand: Gemm, second: Gemm | None, itemsize: int, tile: StageTile, halo: float
) -> Cost:
    """Bytes and operations of a bottleneck as one kernel.

    Args:
        reduce, conv, expand: its convolutions.
        second: the downsample branch, or None for a plain residual.
        itemsize: bytes of an element.
        tile: of the second half; only its `block_m` counts.
        halo: rows of the 3x3's input that a band computes, over those that are its own.
    """
    x, scratch = reduce.m * reduce.k * itemsize, reduce.m * reduce.n * itemsize
    y = conv.m * expand.n * itemsize
    branch = None if second is None else second.m * second.k * itemsize
    filters = itemsize * sum(g.n * g.k * g.taps for g in (reduce, conv, expand, second) if g is not None)
    taps = conv.m * conv.k * conv.taps * itemsize
    tiles = -(-conv.m // tile.block_m)
    l2 = round(halo * (x + scratch)) + taps + (y if branch is None else branch) + y + tiles * filters
    flops = round(halo * reduce.flops) + conv.flops + expand.flops + (0 if second is None else second.flops)
    return Cost(x + y + filters, l2, flops)


def whole_seconds(
    reduce: Gemm,
    conv: Gemm,
    expand: Gemm,
    second: Gemm | None,
    itemsize: int,
    tile: StageTile,
    batch: int,
    size: int,
    chip: Ceilings,
) -> float | None:
    """What it should take with its best band, for `size` output rows an image; None where it is too wide."""
    if conv.n > WIDEST or conv.groups > 1:
        return None
    stride = round((reduce.m / conv.m) ** 0.5)

    def seconds(rows: int) -> float:
        halo = 1 if rows >= size else (stride * rows + 3 - stride) / (stride * rows)
        cost = whole_cost(reduce, conv, expand, second, itemsize, tile, halo)
        return predicted(cost, batch * -(-size // rows), 1, chip)

    return min(seconds(rows) for rows in BANDS)
