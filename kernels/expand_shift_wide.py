"""`expand_shift` for 128 channels on Hopper in wide steps: a tap of all channels, and 128 expanded ones, at a time.

The arithmetic and the two rings of `expand_shift_ring`. With as many pixels that has twice the steps, each of which
waits and asks for loads once, and an eighth more traffic in shared memory, which moves 128 bytes a clock: 27,200 lines
of them for a tile of 128 pixels, here 23,900 (`benchmarks.emulate`). h2, and up to Triton 3.8 y, are multiplied from
the registers that they are in, and g leaves by the memory of the tile's last chunk. A slot of a ring is asked for again
in the step behind the one that used it.
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
from .gpu import triton_release
from .kept_norms import keep_norm, norm_vectors, scaled
from .tail_moves import load_filters, load_pixels, turned_slot
from .taps import strided_box_of, tma_store, view
from .tiles import StageTile


@gluon.jit
def _leave(desc, memory, z, n, p, q, channel):
    """Pixels go out by a slot: written into it, and on their way to a box of a tensor."""
    memory.store(z)
    fence_async_shared()
    tma_store(desc, [n, p, 0, q, channel], view(memory, desc.block_shape, desc.layout))


@gluon.jit
def _expand_shift_wide_kernel(
    h_desc,  # [N, H, 1, W, C] input of the 3x3; boxes of C channels, as all images here
    other_desc,  # residual [N, P, 1, Q, K]
    y_desc,  # [N, P, 1, Q, K] output of the block
    g_desc,  # [N, P, 1, Q, C] output of the next block's reduce, or None
    w_desc,  # [C, 9*C], in blocks of CxC, as all weights here
    w3_desc,  # [K, C]
    w1_desc,  # [C, K] of the next reduce, or None
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
    bias1_ptr,  # [C], or None
    mean1_ptr,
    var1_ptr,
    gamma1_ptr,
    beta1_ptr,
    TILES,
    TILES_P,  # boxes along rows and columns of an image
    TILES_Q,
    C: gl.constexpr,
    K: gl.constexpr,
    G: gl.constexpr,  # C, or 0 without a next reduce
    EPS: gl.constexpr,
    EPS3: gl.constexpr,
    EPS1: gl.constexpr,
    PIXEL_STAGES: gl.constexpr,
    FILTER_STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    Y_IN_REGISTERS: gl.constexpr,  # whether the next reduce reads y there, and not in shared memory
    PDL: gl.constexpr,  # see `dependent`
):
    """h2 = relu(bn(conv3x3(h))); y = relu(bn3(h2 W3) + other); g = relu(bn1(y W1)).

    Sums in fp32. h2 and y are rounded to their dtype, as they would be between kernels; g once, at the store.
    """
    BLOCK_M: gl.constexpr = h_desc.block_shape[0] * h_desc.block_shape[1] * h_desc.block_shape[3]
    CHUNKS: gl.constexpr = K // C
    REDUCES: gl.constexpr = G // C
    dtype: gl.constexpr = h_desc.dtype
    MATRIX: gl.constexpr = w_desc.layout
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)

    pixels = gl.allocate_shared_memory(dtype, [PIXEL_STAGES, BLOCK_M, C], MATRIX)
    filters = gl.allocate_shared_memory(dtype, [FILTER_STAGES, C, C], MATRIX)
    pixel_bars = gl.allocate_shared_memory(gl.int64, [PIXEL_STAGES, 1], mbarrier.MBarrierLayout())
    filter_bars = gl.allocate_shared_memory(gl.int64, [FILTER_STAGES, 1], mbarrier.MBarrierLayout())
    norm, norm3 = norm_vectors(C), norm_vectors(K)
    for bar in gl.static_range(PIXEL_STAGES):
        mbarrier.init(pixel_bars.index(bar), count=1)
    for bar in gl.static_range(FILTER_STAGES):
        mbarrier.init(filter_bars.index(bar), count=1)
    if REDUCES:
        norm1 = norm_vectors(C)
    fence_async_shared()

    tile = gl.program_id(0)
    n, p, q = strided_box_of(tile, TILES_P, TILES_Q, h_desc)
    weights, ring = (w_desc, w3_desc, w1_desc), (filters, filter_bars)
    images, pool, sizes = (h_desc, other_desc), (pixels, pixel_bars), (TILES, TILES_P, TILES_Q)
    block = (0, 0, tile)  # of filters that is loaded next
    for _ in gl.static_range(FILTER_STAGES - 1):
        block = load_filters(weights, ring, block, TILES, C, 9, CHUNKS, REDUCES, PROGRAMS)
    keep_norm(norm, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS)
    keep_norm(norm3, bias3_ptr, mean3_ptr, var3_ptr, gamma3_ptr, beta3_ptr, EPS3)
    if REDUCES:
        keep_norm(norm1, bias1_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, EPS1)
    wait_for_input(PDL)
    box = (0, 0, tile, n, p, q)  # of pixels that is loaded next
    for _ in gl.static_range(PIXEL_STAGES - 1):
        box = load_pixels(images, pool, box, sizes, 9, 9 + CHUNKS, PROGRAMS)

    slot, phase = 0, 0  # of the pixels that are used next
    at, turned = 0, 0  # likewise of the filters
    while tile < TILES:
        n, p, q = strided_box_of(tile, TILES_P, TILES_Q, h_desc)
        acc = gl.zeros([BLOCK_M, C], gl.float32, MMA)
        for tap in range(9):
            mbarrier.wait(pixel_bars.index(slot), phase)
            mbarrier.wait(filter_bars.index(at), turned)
            b = filters.index(at).permute((1, 0))
            acc = warpgroup_mma(pixels.index(slot), b, acc, use_acc=tap > 0, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])
            if tap == 0:
                tma.store_wait(0)  # the last y or g has left
            box = load_pixels(images, pool, box, sizes, 9, 9 + CHUNKS, PROGRAMS)
            block = load_filters(weights, ring, block, TILES, C, 9, CHUNKS, REDUCES, PROGRAMS)
            slot, phase = turned_slot(slot, phase, PIXEL_STAGES)
            at, turned = turned_slot(at, turned, FILTER_STAGES)
        acc = warpgroup_mma_wait(0, [acc])
        h2 = gl.convert_layout(nan_relu(scaled(acc, norm, 0)).to(dtype), LEFT, assert_trivial=True)
        if REDUCES:
            sums = warpgroup_mma_init(gl.zeros([BLOCK_M, C], gl.float32, MMA))
        for j in range(CHUNKS):
            mbarrier.wait(filter_bars.index(at), turned)
            e = gl.zeros([BLOCK_M, C], gl.float32, MMA)
            e = warpgroup_mma(h2, filters.index(at).permute((1, 0)), e, use_acc=False, is_async=True)
            at, turned = turned_slot(at, turned, FILTER_STAGES)
            if REDUCES:
                sums = warpgroup_mma_wait(1, [sums])
            tma.store_wait(0)  # the chunk before this one has been read
            box = load_pixels(images, pool, box, sizes, 9, 9 + CHUNKS, PROGRAMS)
            block = load_filters(weights, ring, block, TILES, C, 9, CHUNKS, REDUCES, PROGRAMS)
            mbarrier.wait(pixel_bars.index(slot), phase)
            buffer = pixels.index(slot)
            e = warpgroup_mma_wait(0, [e])
            z = scaled(e, norm3, j) + buffer.load(MMA).to(gl.float32)
            y = nan_relu(z).to(dtype)
            _leave(y_desc, buffer, y, n, p, q, j * C)
            if REDUCES:
                block = load_filters(weights, ring, block, TILES, C, 9, CHUNKS, REDUCES, PROGRAMS)
                mbarrier.wait(filter_bars.index(at), turned)
                left = gl.convert_layout(y, LEFT, assert_trivial=True) if Y_IN_REGISTERS else buffer
                b = filters.index(at).permute((1, 0))
                sums = warpgroup_mma(left, b, sums, use_acc=j > 0, is_async=True)
                at, turned = turned_slot(at, turned, FILTER_STAGES)
            slot, phase = turned_slot(slot, phase, PIXEL_STAGES)
        tile += PROGRAMS
        if REDUCES:
            sums = warpgroup_mma_wait(0, [sums])
            tma.store_wait(0)
            last = (slot + PIXEL_STAGES - 1) % PIXEL_STAGES
            _leave(g_desc, pixels.index(last), nan_relu(scaled(sums, norm1, 0)).to(dtype), n, p, q, 0)
    tma.store_wait(0)


def bind_expand_shift_wide(h, conv, expand, other, shortcut, reduce, tile: StageTile, *, overwrite: bool = False):
    """Prepare `_expand_shift_wide_kernel`; see `bind_by_rings`."""
    layers = h, conv, expand, other, shortcut, reduce
    in_registers = triton_release() < (3, 9)  # from there on such products are waited for one by one
    return bind_by_rings(_expand_shift_wide_kernel, *layers, tile, overwrite, (in_registers,))
