"""What `expand_shift_ring` moves by TMA: the next box of pixels, the next block of filters, and g at the end.

Loads come in the order of their use: the taps of a tile, its chunks, and on to the program's next tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .epilogue import nan_relu
from .gpu import triton_release
from .kept_norms import scaled
from .taps import columns, tma_load, tma_store, view


@gluon.jit
def _next(slot, STAGES: gl.constexpr):
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
def tile_at(
    tile,
    TILES_P,  # boxes along rows and columns of an image
    TILES_Q,
    desc,  # of images, in such boxes; see `tail_taps.rows_first`
):
    """First image, row and column of a tile."""
    n = tile // (TILES_Q * TILES_P) * desc.block_shape[1]
    p = tile // TILES_Q % TILES_P * desc.block_shape[0]
    q = tile % TILES_Q * desc.block_shape[3]
    return n, p, q


@builtin
def rows_of(memory, slot, first, count, height, _semantic=None):
    """`count` rows of a slot of `height`, from the row `first` on, of pixels `[STAGES*height, ACROSS, 64]`.

    Triton before 3.8 slices by powers of two alone, and lets a view of what is indexed go on behind it; later ones know
    where a slice begins only if it is a constant.
    """
    first, count, height = (size.value if isinstance(size, gl.constexpr) else size for size in (first, count, height))
    if triton_release() < (3, 8):
        row = _semantic.mul(slot, _semantic.to_tensor(height), True)
        return _semantic.memdesc_index(memory, _semantic.add(row, _semantic.to_tensor(first), True))
    total, across, width = memory.shape
    slots = [total // height, height * across, width]
    of_slot = _semantic.memdesc_index(_semantic.memdesc_reinterpret(memory, memory.dtype, slots, memory.layout), slot)
    return _semantic.memdesc_slice(of_slot, first * across, count * across, 0)


@gluon.jit
def load_pixels(
    images,  # descriptors of h, of the edge below it or None, and of the residual or None
    ring,  # pixels [STAGES*HEIGHT, ACROSS, 64] and barriers
    coming,  # what is loaded next: slot, step, tile and the tile's n, p, q
    sizes,  # TILES, TILES_P, TILES_Q
    C: gl.constexpr,
    HALF: gl.constexpr,
    TAPS: gl.constexpr,  # steps of the 3x3
    STEPS: gl.constexpr,  # of a tile
    PROGRAMS: gl.constexpr,
):
    """Ask for the pixels of the step that is loaded next; the one after it."""
    h_desc, edge_desc, other_desc = images
    pixels, bars = ring
    slot, step, tile, n, p, q = coming
    TILES, TILES_P, TILES_Q = sizes
    STAGES: gl.constexpr = bars.shape[0]
    HEIGHT: gl.constexpr = pixels.shape[0] // STAGES
    ROWS: gl.constexpr = h_desc.block_shape[0]
    wanted = tile < TILES
    bar, box = bars.index(slot), view(rows_of(pixels, slot, 0, ROWS, HEIGHT), h_desc.block_shape, h_desc.layout)
    if step < TAPS:
        if edge_desc is not None:
            EDGE: gl.constexpr = edge_desc.block_shape[0]
            mbarrier.expect(bar, h_desc.block_type.nbytes + edge_desc.block_type.nbytes, pred=wanted)
            w = q + step % 3 - 1
            c = step // 3 * h_desc.block_shape[4]
            tma_load(h_desc, [p - 1, n, 0, w, c], bar, box, pred=wanted)
            below = view(rows_of(pixels, slot, ROWS, EDGE, HEIGHT), edge_desc.block_shape, edge_desc.layout)
            tma_load(edge_desc, [p - 1 + ROWS, n, 0, w, c], bar, below, pred=wanted)
        else:
            h = step % 3 - 1  # of the tap, from the pixel STRIDE*p
            w = step % 9 // 3 - 1
            mbarrier.expect(bar, h_desc.block_type.nbytes, pred=wanted)
            c = (w & HALF) * C + step // 9 * h_desc.block_shape[4]
            tma_load(h_desc, [p + (h >> HALF), n, h & HALF, q + (w >> HALF), c], bar, box, pred=wanted)
    else:
        if other_desc is not None:
            mbarrier.expect(bar, other_desc.block_type.nbytes, pred=wanted)
            c = (step - TAPS) * other_desc.block_shape[4]
            tma_load(other_desc, [p, n, 0, q, c], bar, box, pred=wanted)
        else:  # nothing comes, and the barrier's phase ends as if it had
            mbarrier.expect(bar, 0, pred=wanted)
    step += 1
    if step == STEPS:
        step = 0
        tile += PROGRAMS
        n, p, q = tile_at(tile, TILES_P, TILES_Q, h_desc)
    return _next(slot, STAGES), step, tile, n, p, q


@gluon.jit
def _load_halves(desc, k, c, bar, block, wanted):
    """Ask for 64 filters' channels from c on, 64 of them and the 64 behind them."""
    WIDTH: gl.constexpr = desc.block_shape[1]
    for half in gl.static_range(2):
        tma_load(desc, [k, c + half * WIDTH], bar, block.slice(half * WIDTH, WIDTH), pred=wanted)


@gluon.jit
def load_filters(
    weights,  # descriptors of the four layers
    ring,  # filters [STAGES, 128, 64] and barriers
    coming,  # what is loaded next: slot, step and tile
    TILES,
    C: gl.constexpr,
    TAPS: gl.constexpr,  # steps of the 3x3
    CHUNKS: gl.constexpr,
    PAIRS: gl.constexpr,  # blocks of a chunk's downsample branch
    GROUPS: gl.constexpr,  # blocks of a chunk's part of the next reduce
    PROGRAMS: gl.constexpr,
):
    """Ask for the block of filters that is loaded next; the one after it.

    Behind the taps they come in the order of `tail_chunk`: what makes a chunk goes before what reduces the one in front
    of it.
    """
    w_desc, w3_desc, w2_desc, w1_desc = weights
    filters, bars = ring
    slot, step, tile = coming
    WIDTH: gl.constexpr = w_desc.block_shape[1]
    MAKE: gl.constexpr = 1 + PAIRS  # blocks that make a chunk
    EACH: gl.constexpr = MAKE + GROUPS
    wanted = tile < TILES
    bar, block = bars.index(slot), filters.index(slot)
    mbarrier.expect(bar, w_desc.block_type.nbytes, pred=wanted)
    if step < TAPS:
        tap = step % 3 * 3 + step % 9 // 3  # column by column
        tma_load(w_desc, [0, tap * C + step // 9 * WIDTH], bar, block, pred=wanted)
    else:
        order = step - TAPS
        if order >= MAKE:  # no part of the next reduce goes between the first two chunks
            order += GROUPS
        chunk = order // EACH
        part = order % EACH
        if chunk == CHUNKS:  # only the last part of the next reduce is left
            part += MAKE
        k = chunk * WIDTH
        if part == 0:
            _load_halves(w3_desc, k, 0, bar, block, wanted)
        else:
            if PAIRS > 0:  # noqa: SIM102 - known when it is compiled
                if part < MAKE:
                    _load_halves(w2_desc, k, (part - 1) * (2 * WIDTH), bar, block, wanted)
            if GROUPS > 0:  # noqa: SIM102
                if part >= MAKE:
                    tma_load(w1_desc, [(part - MAKE) * (2 * WIDTH), k - WIDTH], bar, block, pred=wanted)
    step += 1
    if step == TAPS + CHUNKS * EACH:
        step = 0
        tile += PROGRAMS
    return _next(slot, filters.shape[0]), step, tile


@gluon.jit
def load_whole(desc, memory, bar, n, p, q, wanted):
    """Ask for all channels of a tile's pixels."""
    PIECES: gl.constexpr = memory.shape[0]
    mbarrier.expect(bar, PIECES * desc.block_type.nbytes, pred=wanted)
    for piece in gl.static_range(PIECES):
        box = view(memory.index(piece), desc.block_shape, desc.layout)
        tma_load(desc, [p, n, 0, q, piece * desc.block_shape[4]], bar, box, pred=wanted)


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
        tma_store(desc, [p, n, 0, q, (piece + half) * WIDTH], box)
