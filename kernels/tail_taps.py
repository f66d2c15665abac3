"""The 3x3 of `expand_shift_ring`: which pixels a tile's taps read, where they lie, and the products.

With stride 1 a box with a row more above and below serves three taps, one column to the left, in the middle or to the
right: 64 channels of a tile's rows come three times, not nine. Rows are therefore the outermost axis of a box, before
images, so that the rows of a tap follow one another in shared memory as they do in the box without that halo.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .boxes import Box, strided_view
from .ring import WIDTH
from .tail_moves import load_filters, load_pixels, rows_of, turned_slot
from .taps import swizzled, view


def rows_first(
    x: torch.Tensor, size: tuple[int, int, int, int], stride: int, box: Box, rows: int = 0
) -> TensorDescriptor:
    """A descriptor of channels_last images of `(N, H, W, C)` in boxes of 64 channels: rows, images, columns.

    The axes are those of `boxes.strided_view`, the first two in turn; `rows` is another number of rows than the box's.
    """
    (n, *shape), (image, *strides) = strided_view(size, stride)
    shape.insert(1, n)
    strides.insert(1, image)
    return TensorDescriptor(x, shape, strides, [rows or box.rows, box.images, 1, box.columns, WIDTH], swizzled(5))


@gluon.jit
def convolve(
    acc,  # [BLOCK_M, C], to be written over
    used,  # slots and phases of the pixels and of the filters that are used next
    coming,  # what is loaded next, of pixels and of filters
    ring,  # filters and barriers
    pool,  # pixels and barriers
    images,  # see `load_pixels`
    weights,  # see `load_filters`
    sizes,  # TILES, TILES_P, TILES_Q
    STEPS: gl.constexpr,  # C, HALF, LOADS, TAPS, CHUNKS, PAIRS, GROUPS, PROGRAMS
):
    """The 3x3 of a tile, which has ended; what is used next, and what is loaded next."""
    slot, phase, at, turned = used
    box, block = coming
    pixels, bars = pool
    filters, filter_bars = ring
    C: gl.constexpr = STEPS[0]
    HALF: gl.constexpr = STEPS[1]
    LOADS: gl.constexpr = STEPS[2]
    TAPS: gl.constexpr = STEPS[3]
    CHUNKS: gl.constexpr = STEPS[4]
    PAIRS: gl.constexpr = STEPS[5]
    GROUPS: gl.constexpr = STEPS[6]
    PROGRAMS: gl.constexpr = STEPS[7]
    STAGES: gl.constexpr = bars.shape[0]
    HEIGHT: gl.constexpr = pixels.shape[0] // STAGES
    ROWS: gl.constexpr = images[0].block_shape[0]

    for load in range(LOADS):
        mbarrier.wait(bars.index(slot), phase)
        for row in gl.static_range(TAPS // LOADS):
            mbarrier.wait(filter_bars.index(at), turned)
            a = view(rows_of(pixels, slot, row, ROWS, HEIGHT), [acc.shape[0], filters.shape[2]], filters.layout)
            b = filters.index(at).permute((1, 0))
            acc = warpgroup_mma(a, b, acc, use_acc=(load > 0) | (row > 0), is_async=True)
            acc = warpgroup_mma_wait(1, [acc])
            if load + row > 0:  # what the product before this one has used is free
                block = load_filters(weights, ring, block, sizes[0], C, TAPS, CHUNKS, PAIRS, GROUPS, PROGRAMS)
            if row == 0:  # noqa: SIM102 - known when it is compiled
                if load > 0:
                    box = load_pixels(images, pool, box, sizes, C, HALF, LOADS, LOADS + CHUNKS, PROGRAMS)
            at, turned = turned_slot(at, turned, filters.shape[0])
        slot, phase = turned_slot(slot, phase, STAGES)
    acc = warpgroup_mma_wait(0, [acc])
    box = load_pixels(images, pool, box, sizes, C, HALF, LOADS, LOADS + CHUNKS, PROGRAMS)
    block = load_filters(weights, ring, block, sizes[0], C, TAPS, CHUNKS, PAIRS, GROUPS, PROGRAMS)
    return acc, (slot, phase, at, turned), (box, block)
