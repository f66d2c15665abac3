"""What `bottleneck_rows` moves by TMA: the next pixels and block of filters, in the order of their use, and y.

Of the row above a band and of its first one the reduce alone is computed; of every other row, also the 3x3 and the
expand of the row above it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .epilogue import nan_relu
from .kept_norms import scaled
from .tail_moves import next_slot, turned_slot
from .taps import tma_load, tma_store, view


@gluon.jit
def place_of(band, sizes, desc):
    """First image of a band, and the row above its first one."""
    _, BANDS, ROWS = sizes
    return band // BANDS * desc.block_shape[0], band % BANDS * ROWS - 1


@gluon.jit
def _behind(step, row, band, heads, steps, sizes, PROGRAMS: gl.constexpr):
    """The load behind this one; there are so many `heads` in a band's first two rows, and so many `steps` in others."""
    _, _, ROWS = sizes
    step += 1
    if step == gl.where(row < 2, heads, steps):
        step = 0
        row += 1
        if row == ROWS + 2:
            row = 0
            band += PROGRAMS
    return step, row, band


@gluon.jit
def load_pixels(
    x_desc,
    ring,  # pixels [STAGES, BLOCK_M, WIDTH] and barriers
    coming,  # what is loaded next: slot, step, row of the band with the one above it, band
    sizes,  # TILES, BANDS, ROWS
    PIECES: gl.constexpr,  # steps of the reduce, and of the residual or downsample branch
    PROGRAMS: gl.constexpr,
):
    """Ask for the pixels that are loaded next; the ones after them."""
    pixels, bars = ring
    slot, step, row, band = coming
    TILES, _, _ = sizes
    wanted = band < TILES
    n, above = place_of(band, sizes, x_desc)
    again = step // PIECES  # whether for the second time, a row above, and without the column to the left
    bar = bars.index(slot)
    mbarrier.expect(bar, x_desc.block_type.nbytes, pred=wanted)
    at = [n, above + row - again, 0, again - 1, step % PIECES * x_desc.block_shape[4]]
    tma_load(x_desc, at, bar, view(pixels.index(slot), x_desc.block_shape, x_desc.layout), pred=wanted)
    step, row, band = _behind(step, row, band, PIECES, 2 * PIECES, sizes, PROGRAMS)
    return next_slot(slot, pixels.shape[0]), step, row, band


@gluon.jit
def load_filters(
    weights,  # descriptors of the reduce, the 3x3, the expand and the downsample branch or None
    ring,  # filters [STAGES, C, WIDTH] and barriers
    coming,  # as that of `load_pixels`
    sizes,
    PIECES: gl.constexpr,
    CHUNKS: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """Ask for the block of filters that is loaded next; the one after it."""
    w1_desc, w_desc, w3_desc, w2_desc = weights
    filters, bars = ring
    slot, step, row, band = coming
    TILES, _, _ = sizes
    C: gl.constexpr = w_desc.block_shape[0]
    WIDTH: gl.constexpr = w_desc.block_shape[1]
    HEADS: gl.constexpr = PIECES + 9 * C // WIDTH
    EACH: gl.constexpr = 1 if w2_desc is None else 2
    wanted = band < TILES
    bar, block = bars.index(slot), filters.index(slot)
    k = (step - HEADS) // EACH * WIDTH
    if step < PIECES:
        mbarrier.expect(bar, w1_desc.block_type.nbytes, pred=wanted)
        tma_load(w1_desc, [0, step * WIDTH], bar, block, pred=wanted)
    elif step < HEADS:
        mbarrier.expect(bar, w_desc.block_type.nbytes, pred=wanted)
        tma_load(w_desc, [0, (step - PIECES) * WIDTH], bar, block, pred=wanted)
    elif (step - HEADS) % EACH == 0:
        mbarrier.expect(bar, w3_desc.block_type.nbytes, pred=wanted)
        tma_load(w3_desc, [k, 0], bar, view(block, w3_desc.block_shape, w3_desc.layout), pred=wanted)
    else:
        if w2_desc is not None:
            mbarrier.expect(bar, w2_desc.block_type.nbytes, pred=wanted)
            tma_load(w2_desc, [k, 0], bar, view(block, w2_desc.block_shape, w2_desc.layout), pred=wanted)
    step, row, band = _behind(step, row, band, PIECES, HEADS + CHUNKS * EACH, sizes, PROGRAMS)
    return next_slot(slot, filters.shape[0]), step, row, band


@gluon.jit
def refill(
    weights,
    ring,
    coming,
    sizes,
    PIECES: gl.constexpr,
    CHUNKS: gl.constexpr,
    PROGRAMS: gl.constexpr,
    HELD: gl.constexpr,  # whether all filters are in the ring and stay
):
    """`load_filters` where a block of the ring has become free, unless it is needed again."""
    if not HELD:
        coming = load_filters(weights, ring, coming, sizes, PIECES, CHUNKS, PROGRAMS)
    return coming


@gluon.jit
def leave(y_desc, e, d, norms, pool, out, slot, phase, place, j, SECOND: gl.constexpr):
    """A chunk of y goes out, over the residual's pixels or from memory of its own; the place in their ring."""
    pixels, bars = pool
    n, p = place
    WIDTH: gl.constexpr = pixels.shape[2]
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    z = scaled(e, norms[0], j)
    if SECOND:
        z += scaled(d, norms[1], j)
        tma.store_wait(1)  # the chunk before the last one has been read
        memory = out.index(j % 2)
    else:
        mbarrier.wait(bars.index(slot), phase)
        memory = out.index(slot)
        z += memory.load(PIECE).to(gl.float32)
        slot, phase = turned_slot(slot, phase, pixels.shape[0])
    memory.store(nan_relu(z).to(pixels.dtype))
    fence_async_shared()
    tma_store(y_desc, [n, p, 0, 0, j * WIDTH], view(memory, y_desc.block_shape, y_desc.layout))
    return slot, phase
