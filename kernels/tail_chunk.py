"""A chunk of `expand_shift_ring`: 64 channels of y, from their products to the next reduce.

A chunk's products are asked for before what the chunk in front of it adds to the next reduce, so that this runs while
the chunk is finished. What a turn of the loop asks for ends in it: else the assembler would wait for each by itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .epilogue import nan_relu
from .kept_norms import scaled
from .tail_moves import load_filters, load_pixels, rows_of, turned_slot
from .taps import tma_store, unknown_zero, view


@gluon.jit
def _product(images, first: gl.constexpr, b, acc, zero):
    """acc + 128 channels of images, from a piece of 64 on, times a block of filters; it is not waited for."""
    WIDTH: gl.constexpr = b.shape[1]
    for half in gl.static_range(2):
        filters = b.slice(half * WIDTH, WIDTH).permute((1, 0))
        acc = warpgroup_mma(images.index(first + half + zero), filters, acc, use_acc=first + half > 0, is_async=True)
    return acc


@gluon.jit
def expand(
    h2,  # [2, BLOCK_M, 64]
    x2,  # input of the downsample branch [C2/64, BLOCK_M, 64], or None
    ring,  # filters and barriers
    at,  # slot of the filters that are used next, and its phase
    turned,
):
    """Ask for a chunk's products: h2 W3, and x2 W2 where there is a branch; they are not waited for."""
    filters, bars = ring
    BLOCK_M: gl.constexpr = h2.shape[1]
    WIDTH: gl.constexpr = h2.shape[2]
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    zero = unknown_zero(at)
    mbarrier.wait(bars.index(at), turned)
    main = _product(h2, 0, filters.index(at), gl.zeros([BLOCK_M, WIDTH], gl.float32, PIECE), zero)
    at, turned = turned_slot(at, turned, filters.shape[0])
    if x2 is None:
        return (main,), at, turned
    else:
        branch = gl.zeros([BLOCK_M, WIDTH], gl.float32, PIECE)
        for pair in gl.static_range(x2.shape[0] // 2):
            mbarrier.wait(bars.index(at), turned)
            branch = _product(x2, 2 * pair, filters.index(at), branch, zero)
            at, turned = turned_slot(at, turned, filters.shape[0])
        return (main, branch), at, turned


@gluon.jit
def waited(COUNT: gl.constexpr, sums):
    """Sums, all but the last COUNT groups of products asked for having ended."""
    if len(sums) == 0:
        return sums
    elif len(sums) == 1:
        return (warpgroup_mma_wait(COUNT, [sums[0]]),)
    else:
        return warpgroup_mma_wait(COUNT, [sums[0], sums[1]])


@gluon.jit
def reduce(buffer, ring, at, turned, sums, j):
    """Ask for a chunk's part of the next reduce; it is not waited for."""
    filters, bars = ring
    if len(sums) == 0:
        return sums, at, turned
    else:
        mbarrier.wait(bars.index(at), turned)
        first = warpgroup_mma(buffer, filters.index(at).permute((1, 0)), sums[0], use_acc=j > 0, is_async=True)
        at, turned = turned_slot(at, turned, filters.shape[0])
        if len(sums) == 1:
            return (first,), at, turned
        else:
            mbarrier.wait(bars.index(at), turned)
            second = warpgroup_mma(buffer, filters.index(at).permute((1, 0)), sums[1], use_acc=j > 0, is_async=True)
            at, turned = turned_slot(at, turned, filters.shape[0])
            return (first, second), at, turned


@gluon.jit
def buffer_of(pool, slot, y_desc):
    """The part of a slot in which the residual comes and y leaves: [BLOCK_M, 64]."""
    pixels, bars = pool
    ROWS: gl.constexpr = y_desc.block_shape[0]
    WIDTH: gl.constexpr = y_desc.block_shape[4]
    BLOCK_M: gl.constexpr = ROWS * y_desc.block_shape[1] * y_desc.block_shape[3]
    rows = rows_of(pixels, slot, 0, ROWS, pixels.shape[0] // bars.shape[0])
    return view(rows, [BLOCK_M, WIDTH], pixels.layout)


@gluon.jit
def finish(
    j,
    sums,  # of `expand`, for this chunk; they have ended
    reduced,  # of the next reduce, up to the chunk before; under way
    used,  # slot and phase of the pixels that are used next
    coming,  # what is loaded next, of pixels and of filters
    memory,  # h2, x2, the ring of filters and that of pixels
    descs,  # images, weights, y
    norms,  # of the expand, and of the branch or None
    where,  # of the tile: n, p, q
    sizes,  # TILES, TILES_P, TILES_Q
    STEPS: gl.constexpr,  # C, HALF, LOADS, TAPS, CHUNKS, PAIRS, GROUPS, PROGRAMS
    FIRST: gl.constexpr,  # whether this is the tile's first chunk
):
    """y of a chunk, into the slot of its residual and on its way; `reduced`, which has ended, and what comes next."""
    slot, phase = used
    box, block = coming
    h2, x2, ring, pool = memory
    images, weights, y_desc = descs
    bars = pool[1]
    C: gl.constexpr = STEPS[0]
    HALF: gl.constexpr = STEPS[1]
    LOADS: gl.constexpr = STEPS[2]
    TAPS: gl.constexpr = STEPS[3]
    CHUNKS: gl.constexpr = STEPS[4]
    PAIRS: gl.constexpr = STEPS[5]
    GROUPS: gl.constexpr = STEPS[6]
    PROGRAMS: gl.constexpr = STEPS[7]
    WIDTH: gl.constexpr = h2.shape[2]

    for _ in gl.static_range(1 + PAIRS):
        block = load_filters(weights, ring, block, sizes[0], C, TAPS, CHUNKS, PAIRS, GROUPS, PROGRAMS)
    z = scaled(sums[0], norms[0], j)
    buffer = buffer_of(pool, slot, y_desc)
    mbarrier.wait(bars.index(slot), phase)
    if x2 is None:
        z += buffer.load(sums[0].type.layout).to(gl.float32)
    else:
        z += scaled(sums[1], norms[1], j)
    y = nan_relu(z).to(h2.dtype)
    if not FIRST:  # the chunk before this one has been read
        reduced = waited(0, reduced)
        tma.store_wait(0)
        box = load_pixels(images, pool, box, sizes, C, HALF, LOADS, LOADS + CHUNKS, PROGRAMS)
        for _ in gl.static_range(GROUPS):
            block = load_filters(weights, ring, block, sizes[0], C, TAPS, CHUNKS, PAIRS, GROUPS, PROGRAMS)
    buffer.store(y)
    fence_async_shared()
    tma_store(y_desc, [where[1], where[0], 0, where[2], j * WIDTH], view(buffer, y_desc.block_shape, y_desc.layout))
    return reduced, (box, block)
