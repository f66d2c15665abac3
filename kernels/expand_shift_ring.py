"""`expand_shift` for 128 channels on Hopper: pixels and filters come through two rings that never run dry.

The same arithmetic as `expand_shift`, of blocks without a downsample branch. The filters of such a block, 0.5 MB and
more, do not stay in shared memory, and `expand_shift_tma` begins to load anew for every tile and each of its loops.
Here a program takes tile after tile, and TMA runs ahead of the matrix units from the taps of a tile to its chunks and
on to the next tile. One ring holds pixels: nine taps of 64 channels each, twice, then the residual, 64 channels a
chunk, over which y is written and leaves. The other holds blocks of 128x64 filters in the order of their use. h2 passes
through shared memory; the norms are formed once a program.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .by_rings import bind_by_rings
from .dependent import wait_for_input
from .epilogue import nan_relu
from .kept_norms import keep_norm, norm_vectors, scaled
from .tail_moves import load_filters, load_pixels, store_reduced, turned_slot
from .taps import columns, strided_box_of, tma_store, view
from .tiles import StageTile


@gluon.jit
def _expand_shift_ring_kernel(
    h_desc,  # [N, H, 1, W, C] input of the 3x3; boxes of 64 channels, as all images here
    other_desc,  # residual [N, P, 1, Q, K]
    y_desc,  # [N, P, 1, Q, K] output of the block
    g_desc,  # [N, P, 1, Q, G] output of the next block's reduce, or None
    w_desc,  # [C, 9*C], in blocks of 128x64
    w3_desc,  # [K, C], in blocks of 64x64
    w1_desc,  # [G, K] of the next reduce, or None; in blocks of 128x64
    bias_ptr,  # [C], or None
    mean_ptr,  # [C], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    bias3_ptr,  # [K], or None
    mean3_ptr,
    var3_ptr,
    gamma3_ptr,
    beta3_ptr,
    bias1_ptr,  # [G], or None
    mean1_ptr,
    var1_ptr,
    gamma1_ptr,
    beta1_ptr,
    TILES,
    TILES_P,  # boxes along rows and columns of an image
    TILES_Q,
    C: gl.constexpr,
    K: gl.constexpr,
    G: gl.constexpr,  # 0 without a next reduce
    EPS: gl.constexpr,
    EPS3: gl.constexpr,
    EPS1: gl.constexpr,
    PIXEL_STAGES: gl.constexpr,
    FILTER_STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    PDL: gl.constexpr,  # see `dependent`
):
    """h2 = relu(bn(conv3x3(h))); y = relu(bn3(h2 W3) + other); g = relu(bn1(y W1)).

    Sums in fp32. h2 and y are rounded to their dtype, as they would be between kernels; g once, at the store.
    """
    WIDTH: gl.constexpr = w_desc.block_shape[1]
    BLOCK_M: gl.constexpr = h_desc.block_shape[0] * h_desc.block_shape[1] * h_desc.block_shape[3]
    TAPS: gl.constexpr = 9 * C // WIDTH
    CHUNKS: gl.constexpr = K // WIDTH
    GROUPS: gl.constexpr = G // (2 * WIDTH)
    dtype: gl.constexpr = h_desc.dtype
    MATRIX: gl.constexpr = w_desc.layout
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])

    pixels = gl.allocate_shared_memory(dtype, [PIXEL_STAGES, BLOCK_M, WIDTH], MATRIX)
    filters = gl.allocate_shared_memory(dtype, [FILTER_STAGES, 2 * WIDTH, WIDTH], MATRIX)
    h2 = gl.allocate_shared_memory(dtype, [C // WIDTH, BLOCK_M, WIDTH], MATRIX)  # and g on its way out
    pixel_bars = gl.allocate_shared_memory(gl.int64, [PIXEL_STAGES, 1], mbarrier.MBarrierLayout())
    filter_bars = gl.allocate_shared_memory(gl.int64, [FILTER_STAGES, 1], mbarrier.MBarrierLayout())
    norm, norm3 = norm_vectors(C), norm_vectors(K)
    for bar in gl.static_range(PIXEL_STAGES):
        mbarrier.init(pixel_bars.index(bar), count=1)
    for bar in gl.static_range(FILTER_STAGES):
        mbarrier.init(filter_bars.index(bar), count=1)
    if G > 0:
        norm1 = norm_vectors(G)
    fence_async_shared()

    tile = gl.program_id(0)
    n, p, q = strided_box_of(tile, TILES_P, TILES_Q, h_desc)
    weights, ring = (w_desc, w3_desc, w1_desc), (filters, filter_bars)
    images, pool, sizes = (h_desc, other_desc), (pixels, pixel_bars), (TILES, TILES_P, TILES_Q)
    block = (0, 0, tile)  # of filters that is loaded next
    for _ in gl.static_range(FILTER_STAGES):
        block = load_filters(weights, ring, block, TILES, C, TAPS, CHUNKS, GROUPS, PROGRAMS)
    keep_norm(norm, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS)
    keep_norm(norm3, bias3_ptr, mean3_ptr, var3_ptr, gamma3_ptr, beta3_ptr, EPS3)
    if G > 0:
        keep_norm(norm1, bias1_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, EPS1)
    wait_for_input(PDL)
    box = (0, 0, tile, n, p, q)  # of pixels that is loaded next
    for _ in gl.static_range(PIXEL_STAGES):
        box = load_pixels(images, pool, box, sizes, TAPS, TAPS + CHUNKS, PROGRAMS)

    slot, phase = 0, 0  # of the pixels that are used next
    at, turned = 0, 0  # likewise of the filters
    while tile < TILES:
        n, p, q = strided_box_of(tile, TILES_P, TILES_Q, h_desc)
        acc = gl.zeros([BLOCK_M, C], gl.float32, MMA)
        for step in range(TAPS):
            mbarrier.wait(pixel_bars.index(slot), phase)
            mbarrier.wait(filter_bars.index(at), turned)
            b = filters.index(at).permute((1, 0))
            acc = warpgroup_mma(pixels.index(slot), b, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])
            if step > 0:  # what the step before this one has used is free
                box = load_pixels(images, pool, box, sizes, TAPS, TAPS + CHUNKS, PROGRAMS)
                block = load_filters(weights, ring, block, TILES, C, TAPS, CHUNKS, GROUPS, PROGRAMS)
            slot, phase = turned_slot(slot, phase, PIXEL_STAGES)
            at, turned = turned_slot(at, turned, FILTER_STAGES)
        acc = warpgroup_mma_wait(0, [acc])
        box = load_pixels(images, pool, box, sizes, TAPS, TAPS + CHUNKS, PROGRAMS)
        block = load_filters(weights, ring, block, TILES, C, TAPS, CHUNKS, GROUPS, PROGRAMS)
        tma.store_wait(0)  # the last g has left
        sums = columns(acc, C // WIDTH)
        for piece in gl.static_range(C // WIDTH):
            z = scaled(gl.convert_layout(sums[piece], PIECE, assert_trivial=True), norm, piece)
            h2.index(piece).store(nan_relu(z).to(dtype))
        fence_async_shared()
        if G > 0:  # sums of the next reduce: of its first 128 channels, and of those behind them
            first = warpgroup_mma_init(gl.zeros([BLOCK_M, 2 * WIDTH], gl.float32, MMA))
        if GROUPS > 1:
            second = warpgroup_mma_init(gl.zeros([BLOCK_M, 2 * WIDTH], gl.float32, MMA))
        for j in range(CHUNKS):
            mbarrier.wait(filter_bars.index(at), turned)
            e = gl.zeros([BLOCK_M, WIDTH], gl.float32, PIECE)
            for half in gl.static_range(C // WIDTH):
                b = filters.index(at).slice(half * WIDTH, WIDTH).permute((1, 0))
                e = warpgroup_mma(h2.index(half), b, e, use_acc=half > 0, is_async=True)
            at, turned = turned_slot(at, turned, FILTER_STAGES)
            e = warpgroup_mma_wait(0, [e])
            if G > 0:
                first = warpgroup_mma_wait(0, [first])
            if GROUPS > 1:
                second = warpgroup_mma_wait(0, [second])
            if j > 0:  # the chunk before this one has been read
                tma.store_wait(0)
                box = load_pixels(images, pool, box, sizes, TAPS, TAPS + CHUNKS, PROGRAMS)
                for _ in gl.static_range(GROUPS):
                    block = load_filters(weights, ring, block, TILES, C, TAPS, CHUNKS, GROUPS, PROGRAMS)
            block = load_filters(weights, ring, block, TILES, C, TAPS, CHUNKS, GROUPS, PROGRAMS)
            buffer = pixels.index(slot)
            z = scaled(e, norm3, j)
            mbarrier.wait(pixel_bars.index(slot), phase)
            z += buffer.load(PIECE).to(gl.float32)
            buffer.store(nan_relu(z).to(dtype))
            fence_async_shared()
            tma_store(y_desc, [n, p, 0, q, j * WIDTH], view(buffer, y_desc.block_shape, y_desc.layout))
            if G > 0:
                mbarrier.wait(filter_bars.index(at), turned)
                b = filters.index(at).permute((1, 0))
                first = warpgroup_mma(buffer, b, first, use_acc=j > 0, is_async=True)
                at, turned = turned_slot(at, turned, FILTER_STAGES)
            if GROUPS > 1:
                mbarrier.wait(filter_bars.index(at), turned)
                b = filters.index(at).permute((1, 0))
                second = warpgroup_mma(buffer, b, second, use_acc=j > 0, is_async=True)
                at, turned = turned_slot(at, turned, FILTER_STAGES)
            slot, phase = turned_slot(slot, phase, PIXEL_STAGES)
        if G > 0:
            first = warpgroup_mma_wait(0, [first])
        if GROUPS > 1:
            second = warpgroup_mma_wait(0, [second])
        tile += PROGRAMS
        tma.store_wait(0)
        box = load_pixels(images, pool, box, sizes, TAPS, TAPS + CHUNKS, PROGRAMS)
        for _ in gl.static_range(GROUPS):
            block = load_filters(weights, ring, block, TILES, C, TAPS, CHUNKS, GROUPS, PROGRAMS)
        if G > 0:
            store_reduced(g_desc, h2, first, norm1, n, p, q, 0)
        if GROUPS > 1:
            tma.store_wait(0)
            store_reduced(g_desc, h2, second, norm1, n, p, q, 2)
    tma.store_wait(0)


def bind_expand_shift_ring(h, conv, expand, other, shortcut, reduce, tile: StageTile, *, overwrite: bool = False):
    """Prepare `_expand_shift_ring_kernel`; see `bind_by_rings`."""
    layers = h, conv, expand, other, shortcut, reduce
    return bind_by_rings(_expand_shift_ring_kernel, *layers, tile, overwrite)
