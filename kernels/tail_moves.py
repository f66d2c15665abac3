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
    q = tile % TILES_Q * desc.block_shape[2]
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
    images,  # descriptors of h, of the edge below it or None, and of the residual
    pool,  # pixels [STAGES*HEIGHT, ACROSS, 64] and barriers
    coming,  # what is loaded next: slot, step, tile and the tile's n, p, q
    sizes,  # TILES, TILES_P, TILES_Q, and programs
    LOADS: gl.constexpr,  # steps of the 3x3
    CHUNKS: gl.constexpr,
):
    """Ask for the pixels of the step that is loaded next; the one after it."""
    h_desc, edge_desc, other_desc = images
    pixels, bars = pool
    slot, step, tile, n, p, q = coming
    TILES, TILES_P, TILES_Q, PROGRAMS = sizes
    STAGES: gl.constexpr = bars.shape[0]
    HEIGHT: gl.constexpr = pixels.shape[0] // STAGES
    ROWS: gl.constexpr = h_desc.block_shape[0]
    WIDTH: gl.constexpr = h_desc.block_shape[3]
    wanted = tile < TILES
    bar, box = bars.index(slot), view(rows_of(pixels, slot, 0, ROWS, HEIGHT), h_desc.block_shape, h_desc.layout)
    if step < LOADS:
        if edge_desc is not None:
            EDGE: gl.constexpr = edge_desc.block_shape[0]
            mbarrier.expect(bar, h_desc.block_type.nbytes + edge_desc.block_type.nbytes, pred=wanted)
            c = step // 3 * WIDTH
            tma_load(h_desc, [p - 1, n, q + step % 3 - 1, c], bar, box, pred=wanted)
            below = view(rows_of(pixels, slot, ROWS, EDGE, HEIGHT), edge_desc.block_shape, edge_desc.layout)
            tma_load(edge_desc, [p - 1 + ROWS, n, q + step % 3 - 1, c], bar, below, pred=wanted)
        else:
            mbarrier.expect(bar, h_desc.block_type.nbytes, pred=wanted)
            at = [p + step % 3 - 1, n, q + step % 9 // 3 - 1, step // 9 * WIDTH]
            tma_load(h_desc, at, bar, box, pred=wanted)
    else:
        mbarrier.expect(bar, other_desc.block_type.nbytes, pred=wanted)
        tma_load(other_desc, [p, n, q, (step - LOADS) * WIDTH], bar, box, pred=wanted)
    step += 1
    if step == LOADS + CHUNKS:
        step = 0
        tile += PROGRAMS
        n, p, q = tile_at(tile, TILES_P, TILES_Q, h_desc)
    return _next(slot, STAGES), step, tile, n, p, q


@gluon.jit
def ask_ahead(
    other_ptr,  # residual [N, P, Q, K]
    where,  # of the tile: n, p, q
    N,
    P,
    Q,
    K: gl.constexpr,
    desc,  # of the residual, in boxes of a tile; see `tail_taps.rows_first`
    PREFETCH: gl.constexpr,  # the instruction for a thread's part of the tile
):
    """Have a tile's residual come to L2 while the 3x3 is computed: else device memory would rest until the chunks."""
    ROWS: gl.constexpr = desc.block_shape[0]
    IMAGES: gl.constexpr = desc.block_shape[1]
    COLUMNS: gl.constexpr = desc.block_shape[2]
    THREADS: gl.constexpr = 32 * gl.num_warps()
    PARTS: gl.constexpr = THREADS // (ROWS * IMAGES * COLUMNS)  # of a pixel's channels
    thread = gl.arange(0, THREADS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    pixel = thread // PARTS
    n = gl.minimum(where[0] + pixel // COLUMNS % IMAGES, N - 1)
    p = gl.minimum(where[1] + pixel // (COLUMNS * IMAGES), P - 1)
    q = gl.minimum(where[2] + pixel % COLUMNS, Q - 1)
    part = ((n.to(gl.int64) * P + p) * Q + q) * K + thread % PARTS * (K // PARTS)
    gl.inline_asm_elementwise(PREFETCH, "=r,l", [other_ptr + part], gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_filters(
    weights,  # descriptors of the three layers
    ring,  # filters [STAGES, 128, 64] and barriers
    coming,  # what is loaded next: slot, step and tile
    sizes,  # see `load_pixels`
    CHUNKS: gl.constexpr,
    GROUPS: gl.constexpr,  # blocks of a chunk's part of the next reduce
):
    """Ask for the block of filters that is loaded next; the one after it.

    Behind the taps they come in the order of `tail_chunk`: what makes a chunk, then what reduces the last but one.
    """
    w_desc, w3_desc, w1_desc = weights
    filters, bars = ring
    slot, step, tile = coming
    WIDTH: gl.constexpr = w_desc.block_shape[1]
    PIECES: gl.constexpr = w_desc.block_shape[0] // WIDTH  # of the 3x3's channels
    TAPS: gl.constexpr = 9 * PIECES
    EACH: gl.constexpr = 1 + GROUPS
    wanted = tile < sizes[0]
    bar, block = bars.index(slot), filters.index(slot)
    mbarrier.expect(bar, w_desc.block_type.nbytes, pred=wanted)
    if step < TAPS:
        tap = step % 3 * 3 + step % 9 // 3  # column by column
        tma_load(w_desc, [0, tap * (PIECES * WIDTH) + step // 9 * WIDTH], bar, block, pred=wanted)
    else:
        order = step - TAPS
        order += gl.minimum(order, 2) * GROUPS  # nothing is reduced while the first two chunks are made
        chunk = order // EACH
        part = order % EACH
        if GROUPS > 0:  # noqa: SIM102 - known when it is compiled
            if chunk >= CHUNKS:  # the last two chunks are still to be reduced
                part = 1 + (order - CHUNKS * EACH) % GROUPS
                chunk = CHUNKS + (order - CHUNKS * EACH) // GROUPS
        if part == 0:
            for piece in gl.static_range(PIECES):
                half = block.slice(piece * WIDTH, WIDTH)
                tma_load(w3_desc, [chunk * WIDTH, piece * WIDTH], bar, half, pred=wanted)
        else:
            if GROUPS > 0:
                at = [(part - 1) * (2 * WIDTH), (chunk - 2) * WIDTH]
                tma_load(w1_desc, at, bar, block, pred=wanted)
    step += 1
    if step == TAPS + CHUNKS * EACH:
        step = 0
        tile += sizes[3]
    return _next(slot, filters.shape[0]), step, tile


@gluon.jit
def store_reduced(desc, memory, sums, norm, where, piece: gl.constexpr):
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
        tma_store(desc, [where[1], where[0], where[2], (piece + half) * WIDTH], box)
