"""A design that was weighed and is not built: a whole bottleneck as one kernel, its reduced tile in L2.

A program takes a band of an image's rows. It computes the reduce of the band and of the halo around it into a scratch
of its own, which stays in L2, then reads the nine taps from there tile by tile, expands, adds and stores. Device memory
sees the block's input and output alone. L2 sees more than with the stage kernel: the input once more as the residual,
the scratch written and read, and the halo computed twice. In one program the first half, which reads the input, and the
second, which writes the output, follow one another; only the programs beside it can use what the one leaves idle.
"""

from __future__ import annotations

from fused_resblock.kernels.cost import LAUNCH, Ceilings, Cost, Gemm, predicted
from fused_resblock.kernels.tiles import StageTile

#: rows of the output in a band; the best of them counts
BANDS = (4, 7, 8, 14, 16, 28)
WIDEST = 128  # channels of the 3x3; of more, the filters alone overflow what a program can share


def whole_cost(
    reduce: Gemm, conv: Gemm, expand: Gemm, second: Gemm | None, itemsize: int, tile: StageTile, halo: float
) -> tuple[Cost, Cost]:
    """Bytes and operations of a bottleneck as one kernel: of its reduce, and of the rest.

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
    filters = itemsize * sum(g.n * g.k * g.taps for g in (conv, expand, second) if g is not None)
    taps = conv.m * conv.k * conv.taps * itemsize
    tiles = -(-conv.m // tile.block_m)
    head = itemsize * reduce.n * reduce.k
    first = Cost(x + head, round(halo * (x + scratch)) + tiles * head, round(halo * reduce.flops))
    l2 = taps + (y if branch is None else branch) + y + tiles * filters
    flops = conv.flops + expand.flops + (0 if second is None else second.flops)
    return first, Cost(y + filters, l2, flops)


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
) -> tuple[float, float] | None:
    """What it should take with its best band, for `size` output rows an image; None where it is too wide.

    Where its halves overlap perfectly, and where they follow one another.
    """
    if conv.n > WIDEST or conv.groups > 1:
        return None
    stride = round((reduce.m / conv.m) ** 0.5)

    def seconds(rows: int) -> tuple[float, float]:
        halo = 1 if rows >= size else (stride * rows + 3 - stride) / (stride * rows)
        first, rest = whole_cost(reduce, conv, expand, second, itemsize, tile, halo)
        programs = batch * -(-size // rows)
        in_turn = predicted(first, programs, 1, chip) + predicted(rest, programs, 1, chip) - LAUNCH
        return predicted(first + rest, programs, 1, chip), in_turn

    together, in_turn = zip(*map(seconds, BANDS), strict=True)
    return min(together), min(in_turn)
