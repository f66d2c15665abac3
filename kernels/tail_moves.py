"""What `expand_shift_ring` and `expand_shift_wide` move by TMA: the next box of pixels and block of filters, and g.

Loads come in the order of their use: the taps of a tile, its chunks, and on to the program's next tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .epilogue import nan_relu
from .kept_norms import scaled
from .taps import columns, strided_box_of, tma_load, tma_store, view


@gluon.jit
def next_slot(slot, STAGES: gl.constexpr):
    """The slot behind this one in a ring."""
    slot += 1
    if slot == STAGES:
        slot = 0
    return slot


@gluon.jit
def turned_slot(slot, phase, STAGES: gl.constexpr):
    """The slot behind this one in a ring, and the phase of its barrier."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def load_pixels(
    images,  # descriptors of h and of the residual
    ring,  # pixels [STAGES, BLOCK_M, WIDTH] and barriers
    coming,  # what is loaded next: slot, step, tile and the tile's n, p, q
    sizes,  # TILES, TILES_P, TILES_Q
    TAPS: gl.constexpr,  # steps of the 3x3
    STEPS: gl.constexpr,  # of a tile
    PROGRAMS: gl.constexpr,
):
    """Ask for the pixels of the step that is loaded next; the one after it."""
    h_desc, other_desc = images
    pixels, bars = ring
    slot, step, tile, n, p, q = coming
    TILES, TILES_P, TILES_Q = sizes
    wanted = tile < TILES
    bar, box = bars.index(slot), view(pixels.index(slot), h_desc.block_shape, h_desc.layout)
    if step < TAPS:
        mbarrier.expect(bar, h_desc.block_type.nbytes, pred=wanted)
        at = [n, p + step % 9 // 3 - 1, 0, q + step % 3 - 1, step // 9 * h_desc.block_shape[4]]
        tma_load(h_desc, at, bar, box, pred=wanted)
    else:
        mbarrier.expect(bar, other_desc.block_type.nbytes, pred=wanted)
        tma_load(other_desc, [n, p, 0, q, (step - TAPS) * other_desc.block_shape[4]], bar, box, pred=wanted)
    step += 1
    if step == STEPS:
        step = 0
        tile += PROGRAMS
        n, p, q = strided_box_of(tile, TILES_P, TILES_Q, h_desc)
    return next_slot(slot, pixels.shape[0]), step, tile, n, p, q


@gluon.jit
def load_filters(
    weights,  # descriptors of the three layers
    ring,  # filters [STAGES, C, WIDTH] and barriers
    coming,  # what is loaded next: slot, step and tile
    TILES,
    C: gl.constexpr,
    TAPS: gl.constexpr,  # steps of the 3x3
    CHUNKS: gl.constexpr,
    GROUPS: gl.constexpr,  # blocks of a chunk's part of the next reduce
    PROGRAMS: gl.constexpr,
):
    """Ask for the block of filters that is loaded next; the one after it."""
    w_desc, w3_desc, w1_desc = weights
    filters, bars = ring
    slot, step, tile = coming
    WIDTH: gl.constexpr = w_desc.block_shape[1]
    EACH: gl.constexpr = 1 + GROUPS
    wanted = tile < TILES
    bar, block = bars.index(slot), filters.index(slot)
    mbarrier.expect(bar, w_desc.block_type.nbytes, pred=wanted)
    if step < TAPS:
        tma_load(w_desc, [0, step % 9 * C + step // 9 * WIDTH], bar, block, pred=wanted)
    else:
        k = (step - TAPS) // EACH * WIDTH
        part = (step - TAPS) % EACH
        if part == 0:
            for half in gl.static_range(C // WIDTH):
                tma_load(w3_desc, [k, half * WIDTH], bar, block.slice(half * WIDTH, WIDTH), pred=wanted)
        else:
            if GROUPS > 0:
                tma_load(w1_desc, [(part - 1) * C, k], bar, block, pred=wanted)
    step += 1
    if step == TAPS + CHUNKS * EACH:
        step = 0
        tile += PROGRAMS
    return next_slot(slot, filters.shape[0]), step, tile


@gluon.jit
def store_reduced(desc, memory, sums, norm, n, p, q, piece: gl.constexpr):
    """128 channels of g, from a piece of 64 on, leave by the memory of h2."""
    WIDTH: gl.constexpr = memory.shape[2]
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    halves = columns(sums, 2)
    for half in gl.static_range(2):
        z = scaled(gl.convert_layout(halves[half], PIECE, assert_trivial=True), norm, piece + half)
        memory.index(half).store(nan_relu(z).to(memory.dtype))
    fence_async_shared()
    for half in gl.static_range(2):
        box = view(memory.index(half), desc.block_shape, desc.layout)
        tma_store(desc, [n, p, 0, q, (piece + half) * WIDTH], box)
