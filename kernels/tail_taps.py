"""The 3x3 of `expand_shift_ring`: which pixels a tile's taps read, where they lie, and the products.

A box with a row more above and below serves three taps, one column to the left, in the middle or to the right: 64
channels of a tile come three times with that halo, not nine times without. Rows are the outermost axis of a box, before
images, so that the pixels of every tap lie in shared memory as those of a box without halo would.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .boxes import Box
from .ring import WIDTH
from .tail_moves import load_filters, load_pixels, rows_of, turned_slot
from .taps import swizzled, view


def rows_first(x: torch.Tensor, size: tuple[int, int, int, int], box: Box, rows: int = 0) -> TensorDescriptor:
    """A descriptor of channels_last images of `(N, H, W, C)`, seen as `[H, N, W, C]`, in boxes of 64 channels.

    `rows` is another number of rows than the box's.
    """
    n, h, w, c = size
    block = [rows or box.rows, box.images, box.columns, WIDTH]
    return TensorDescriptor(x, [h, n, w, c], [w * c, h * w * c, c, 1], block, swizzled(4))


@gluon.jit
def convolve(
    acc,  # [BLOCK_M, C], to be written over
    used,  # slots and phases of the pixels and of the filters that are used next
    coming,  # what is loaded next, of pixels and of filters
    memory,  # pool of pixels, ring of filters
    descs,  # images, weights; see `tail_moves`
    sizes,
    LOADS: gl.constexpr,
    CHUNKS: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """The 3x3 of a tile, which has ended; what is used next, and what is loaded next."""
    slot, phase, at, turned = used
    box, block = coming
    pool, ring = memory
    images, weights = descs
    pixels, bars = pool
    filters, filter_bars = ring
    STAGES: gl.constexpr = bars.shape[0]
    HEIGHT: gl.constexpr = pixels.shape[0] // STAGES
    ROWS: gl.constexpr = images[0].block_shape[0]
    EACH: gl.constexpr = 9 * acc.shape[1] // filters.shape[2] // LOADS  # taps of a load

    for load in range(LOADS):
        mbarrier.wait(bars.index(slot), phase)
        for row in gl.static_range(EACH):
            mbarrier.wait(filter_bars.index(at), turned)
            a = view(rows_of(pixels, slot, row, ROWS, HEIGHT), [acc.shape[0], filters.shape[2]], filters.layout)
            b = filters.index(at).permute((1, 0))
            acc = warpgroup_mma(a, b, acc, use_acc=load + row > 0, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])
            if load + row > 0:  # what the product before this one has used is free
                block = load_filters(weights, ring, block, sizes, CHUNKS, GROUPS)
                if row == 0:
                    box = load_pixels(images, pool, box, sizes, LOADS, CHUNKS)
            at, turned = turned_slot(at, turned, filters.shape[0])
        slot, phase = turned_slot(slot, phase, STAGES)
    acc = warpgroup_mma_wait(0, [acc])
    box = load_pixels(images, pool, box, sizes, LOADS, CHUNKS)
    block = load_filters(weights, ring, block, sizes, CHUNKS, GROUPS)
    return acc, (slot, phase, at, turned), (box, block)
