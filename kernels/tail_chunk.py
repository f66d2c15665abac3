"""A chunk of `expand_shift_ring`: 64 channels of y, from their products to the next reduce.

While a chunk is finished, the matrix units make the one behind it and reduce the one in front of it. What a turn asks
for ends in it: else the assembler would wait for each product by itself.
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
def expand(
    h2,  # [C/64, BLOCK_M, 64]
    ring,  # filters and barriers
    at,  # slot of the filters that are used next, and its phase
    turned,
):
    """Ask for a chunk's products, which are not waited for; what is used next."""
    filters, bars = ring
    BLOCK_M: gl.constexpr = h2.shape[1]
    WIDTH: gl.constexpr = h2.shape[2]
    HALVES: gl.constexpr = h2.shape[0]
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    zero = unknown_zero(at)
    mbarrier.wait(bars.index(at), turned)
    sums = gl.zeros([BLOCK_M, WIDTH], gl.float32, PIECE)
    for half in gl.static_range(HALVES):
        b = filters.index(at).slice(half * WIDTH, WIDTH).permute((1, 0))
        sums = warpgroup_mma(h2.index(half + zero), b, sums, use_acc=half > 0, is_async=True)
    at, turned = turned_slot(at, turned, filters.shape[0])
    return sums, at, turned


@gluon.jit
def reduce(buffer, ring, at, turned, reduced, j):
    """Ask for a chunk's part of the next reduce, which is not waited for; what is used next."""
    filters, bars = ring
    if len(reduced) == 0:
        return reduced, at, turned
    else:
        mbarrier.wait(bars.index(at), turned)
        b = filters.index(at).permute((1, 0))
        first = warpgroup_mma(buffer, b, reduced[0], use_acc=j > 0, is_async=True)
        at, turned = turned_slot(at, turned, filters.shape[0])
        rest, at, turned = reduce(buffer, ring, at, turned, reduced[1:], j)
        return (first,) + rest, at, turned  # noqa: RUF005 - Gluon knows no stars


@gluon.jit
def ended(reduced):
    """Sums of the next reduce, with no product under way."""
    if len(reduced) == 0:
        return reduced
    else:
        return (warpgroup_mma_wait(0, [reduced[0]]),) + ended(reduced[1:])  # noqa: RUF005


@gluon.jit
def buffer_of(pool, slot, y_desc):
    """The part of a slot in which the residual comes and y leaves: [BLOCK_M, 64]."""
    pixels, bars = pool
    ROWS: gl.constexpr = y_desc.block_shape[0]
    WIDTH: gl.constexpr = y_desc.block_shape[3]
    BLOCK_M: gl.constexpr = ROWS * y_desc.block_shape[1] * y_desc.block_shape[2]
    rows = rows_of(pixels, slot, 0, ROWS, pixels.shape[0] // bars.shape[0])
    return view(rows, [BLOCK_M, WIDTH], pixels.layout)


@gluon.jit
def chunk(
    j,
    sums,  # of `expand`, for this chunk; they have ended
    reduced,  # of the next reduce, up to the last chunk but one
    before,  # slot of the chunk before
    used,  # slots and phases of the pixels and of the filters that are used next
    coming,  # what is loaded next, of pixels and of filters
    memory,  # pool of pixels, ring of filters, h2
    descs,  # images, weights, y
    norm3,
    where,  # of the tile: n, p, q
    sizes,
    LOADS: gl.constexpr,
    CHUNKS: gl.constexpr,
    FIRST: gl.constexpr,  # whether it is the tile's first chunk, or its last
    LAST: gl.constexpr,
):
    """Finish a chunk, make the one behind it and reduce the one in front of it; the state behind that."""
    slot, phase, at, turned = used
    box, block = coming
    pool, ring, h2 = memory
    images, weights, y_desc = descs
    WIDTH: gl.constexpr = h2.shape[2]
    GROUPS: gl.constexpr = len(reduced)

    following = sums
    if not LAST:
        following, at, turned = expand(h2, ring, at, turned)
    if not FIRST:
        reduced, at, turned = reduce(buffer_of(pool, before, y_desc), ring, at, turned, reduced, j - 1)
    buffer = buffer_of(pool, slot, y_desc)
    z = scaled(sums, norm3, j)
    mbarrier.wait(pool[1].index(slot), phase)
    y = nan_relu(z + buffer.load(sums.type.layout).to(gl.float32)).to(h2.dtype)
    if not LAST:
        following = warpgroup_mma_wait(0, [following])
        block = load_filters(weights, ring, block, sizes, CHUNKS, GROUPS)
    if not FIRST:
        reduced = ended(reduced)
        for _ in gl.static_range(GROUPS):
            block = load_filters(weights, ring, block, sizes, CHUNKS, GROUPS)
        tma.store_wait(0)  # the chunk before has left
        box = load_pixels(images, pool, box, sizes, LOADS, CHUNKS)
    buffer.store(y)
    fence_async_shared()
    tma_store(y_desc, [where[1], where[0], where[2], j * WIDTH], view(buffer, y_desc.block_shape, y_desc.layout))
    after, phase = turned_slot(slot, phase, pool[1].shape[0])
    return following, reduced, slot, (after, phase, at, turned), (box, block)
