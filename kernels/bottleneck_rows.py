"""A whole bottleneck as one kernel on Hopper, row after row: what lies between its convolutions stays on the chip.

A program goes down a band of rows, of as many images side by side as make 64 or 128 pixels. Of each row it computes the
reduce into shared memory, where the last three rows of it are kept; the nine taps of the row in between are these rows,
each begun at one of three columns; the expand, with the residual, leaves as it is computed. So device memory sees the
block's input and output alone, 16 bytes a pixel and channel of the 3x3, where `expand_shift` needs 20; the input comes
from L2 a second time, as the residual. Only the row above a band and the one below it are computed twice. Pixels and
filters come through two rings that TMA fills ahead of the matrix units, as in `expand_shift_ring`.

A row lies in shared memory with the column to its left, which is zeros, and as many to its right as make 2^n, so that a
tap is a matrix that begins up to two pixels later, 128 bytes each: the swizzle goes by the address, not by the place in
the matrix. Source: NVIDIA, CUTLASS, `mma_traits_sm90_gmma.hpp`, whose layouts are a swizzle of pointer and offset.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .bottleneck import WARPS, bands_of, box_of
from .bottleneck_moves import leave, load_filters, load_pixels, place_of, refill
from .boxes import Descriptors
from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu
from .gpu import gpu_of
from .kept_norms import keep_norm, norm_vectors, scaled
from .launch import Launch
from .ring import WIDTH as STEP
from .tail_moves import turned_slot
from .taps import columns, matrix_box, strided_box, view
from .tiles import StageTile


@gluon.jit
def _expanded(h2, x2, ring, at, turned, SECOND: gl.constexpr, HELD: gl.constexpr):
    """A chunk of the expand, and of the downsample branch or None, under way; the place in the ring behind it."""
    filters, bars = ring
    BLOCK_M: gl.constexpr = h2.shape[0]
    WIDTH: gl.constexpr = filters.shape[2]
    PIECE: gl.constexpr = h2.type.layout.parent
    b = view(filters.index(at), [WIDTH, h2.shape[1]], filters.layout).permute((1, 0))
    if not HELD:
        mbarrier.wait(bars.index(at), turned)
    e = warpgroup_mma(h2, b, gl.zeros([BLOCK_M, WIDTH], gl.float32, PIECE), use_acc=False, is_async=True)
    at, turned = turned_slot(at, turned, filters.shape[0])
    d = e
    if SECOND:
        b = view(filters.index(at), [WIDTH, WIDTH], filters.layout).permute((1, 0))
        if not HELD:
            mbarrier.wait(bars.index(at), turned)
        d = warpgroup_mma(x2, b, gl.zeros([BLOCK_M, WIDTH], gl.float32, PIECE), use_acc=False, is_async=True)
        at, turned = turned_slot(at, turned, filters.shape[0])
    return e, d, at, turned


@gluon.jit
def _arrived(e, d, SECOND: gl.constexpr):
    """Both, when they are there."""
    if SECOND:
        return warpgroup_mma_wait(0, [e, d])
    else:
        e = warpgroup_mma_wait(0, [e])
        return e, e


@gluon.jit
def _bottleneck_rows_kernel(
    x_desc,  # [N, H, 1, W, CIN] input; boxes of a row of some images, of 64 channels
    y_desc,  # [N, H, 1, W, K] output
    w1_desc,  # [C, CIN] of the reduce, in blocks of Cx64
    w_desc,  # [C, 9*C], in blocks of Cx64
    w3_desc,  # [K, C] of the expand, in blocks of 64xC
    w2_desc,  # [K, CIN] of the downsample branch, in blocks of 64x64, or None: CIN is K, and x the residual
    bias1_ptr,  # [C], or None
    mean1_ptr,  # [C], or None for no normalisation
    var1_ptr,
    gamma1_ptr,
    beta1_ptr,
    bias_ptr,  # [C], or None
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    bias3_ptr,  # [K], or None
    mean3_ptr,
    var3_ptr,
    gamma3_ptr,
    beta3_ptr,
    bias2_ptr,
    mean2_ptr,
    var2_ptr,
    gamma2_ptr,
    beta2_ptr,
    TILES,  # bands of all images
    BANDS,  # of an image
    ROWS,  # of a band
    H,
    W,
    CIN: gl.constexpr,  # 64 with a downsample branch
    K: gl.constexpr,  # two chunks of 64 or more
    EPS1: gl.constexpr,
    EPS: gl.constexpr,
    EPS3: gl.constexpr,
    EPS2: gl.constexpr,
    PIXEL_STAGES: gl.constexpr,
    FILTER_STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    HELD: gl.constexpr,  # whether all filters are in their ring, and stay
    PDL: gl.constexpr,  # see `dependent`
):
    """h1 = relu(bn1(x W1)); h2 = relu(bn(conv3x3(h1))); y = relu(bn3(h2 W3) + (x | bn2(x W2))).

    Sums in fp32. h1, h2 and y are rounded to their dtype, as they would be between kernels.
    """
    C: gl.constexpr = w_desc.block_shape[0]
    WIDTH: gl.constexpr = w_desc.block_shape[1]
    COLUMNS: gl.constexpr = x_desc.block_shape[3]
    BLOCK_M: gl.constexpr = x_desc.block_shape[0] * COLUMNS
    HALVES: gl.constexpr = C // WIDTH
    PIECES: gl.constexpr = CIN // WIDTH
    CHUNKS: gl.constexpr = K // WIDTH
    SECOND: gl.constexpr = w2_desc is not None
    dtype: gl.constexpr = x_desc.dtype
    MATRIX: gl.constexpr = w_desc.layout
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PIECE, 2)

    pixels = gl.allocate_shared_memory(dtype, [PIXEL_STAGES, BLOCK_M, WIDTH], MATRIX)
    filters = gl.allocate_shared_memory(dtype, [FILTER_STAGES, C, WIDTH], MATRIX)
    # h1 by pixels, three rows of it; the last tap ends two pixels behind them
    kept = gl.allocate_shared_memory(dtype, [3 * HALVES * BLOCK_M + 8, WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    out = pixels  # where y leaves from
    if SECOND:
        out = gl.allocate_shared_memory(dtype, [2, BLOCK_M, WIDTH], MATRIX)
    pixel_bars = gl.allocate_shared_memory(gl.int64, [PIXEL_STAGES, 1], mbarrier.MBarrierLayout())
    filter_bars = gl.allocate_shared_memory(gl.int64, [FILTER_STAGES, 1], mbarrier.MBarrierLayout())
    norm1, norm, norm3 = norm_vectors(C), norm_vectors(C), norm_vectors(K)
    norms = norm3, norm_vectors(K) if SECOND else norm3
    for bar in gl.static_range(PIXEL_STAGES):
        mbarrier.init(pixel_bars.index(bar), count=1)
    for bar in gl.static_range(FILTER_STAGES):
        mbarrier.init(filter_bars.index(bar), count=1)
    fence_async_shared()

    band = gl.program_id(0)
    weights, ring, pool = (w1_desc, w_desc, w3_desc, w2_desc), (filters, filter_bars), (pixels, pixel_bars)
    sizes = TILES, BANDS, ROWS
    block = (0, 0, 2 if HELD else 0, band)  # of filters that is loaded next
    for _ in gl.static_range(FILTER_STAGES):
        block = load_filters(weights, ring, block, sizes, PIECES, CHUNKS, PROGRAMS)
    keep_norm(norm1, bias1_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, EPS1)
    keep_norm(norm, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS)
    keep_norm(norm3, bias3_ptr, mean3_ptr, var3_ptr, gamma3_ptr, beta3_ptr, EPS3)
    if SECOND:
        keep_norm(norms[1], bias2_ptr, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, EPS2)
    wait_for_input(PDL)
    box = (0, 0, 0, band)  # of pixels that is loaded next
    for _ in gl.static_range(PIXEL_STAGES):
        box = load_pixels(x_desc, pool, box, sizes, PIECES, PROGRAMS)
    if HELD:
        for stage in gl.static_range(FILTER_STAGES):
            mbarrier.wait(filter_bars.index(stage), 0)
    column = gl.arange(0, BLOCK_M, gl.SliceLayout(1, PIECE)) % COLUMNS - 1
    slot, phase = 0, 0  # of the pixels that are used next
    at, turned = 0, 0  # likewise of the filters
    leaving = 0  # whether the slot before that one still holds a y
    while band < TILES:
        n, above = place_of(band, sizes, x_desc)
        oldest = 0  # of the rows that are kept; the next one takes its place
        for row in range(ROWS + 2):
            if HELD:
                at = 0
            acc = gl.zeros([BLOCK_M, C], gl.float32, MMA)
            for step in range(PIECES):
                mbarrier.wait(pixel_bars.index(slot), phase)
                if not HELD:
                    mbarrier.wait(filter_bars.index(at), turned)
                b = filters.index(at).permute((1, 0))
                acc = warpgroup_mma(pixels.index(slot), b, acc, use_acc=step > 0, is_async=True)
                acc = warpgroup_mma_wait(1, [acc])
                if step + leaving > 0:  # what the step before this one has used is free
                    tma.store_wait(0)
                    box = load_pixels(x_desc, pool, box, sizes, PIECES, PROGRAMS)
                    leaving = 0
                if step > 0:
                    block = refill(weights, ring, block, sizes, PIECES, CHUNKS, PROGRAMS, HELD)
                slot, phase = turned_slot(slot, phase, PIXEL_STAGES)
                at, turned = turned_slot(at, turned, FILTER_STAGES)
            acc = warpgroup_mma_wait(0, [acc])
            box = load_pixels(x_desc, pool, box, sizes, PIECES, PROGRAMS)
            block = refill(weights, ring, block, sizes, PIECES, CHUNKS, PROGRAMS, HELD)
            inside = (column >= 0) & (column < W) & (above + row >= 0) & (above + row < H)
            sums = columns(acc, HALVES)
            for half in gl.static_range(HALVES):
                z = nan_relu(scaled(gl.convert_layout(sums[half], PIECE, assert_trivial=True), norm1, half))
                h1 = gl.where(inside[:, None], z, 0.0).to(dtype)
                view(kept.index((oldest * HALVES + half) * BLOCK_M), [BLOCK_M, WIDTH], MATRIX).store(h1)
            fence_async_shared()
            oldest += 1
            if oldest == 3:
                oldest = 0
            at_y = n, above + row - 1
            if row >= 2:
                acc = gl.zeros([BLOCK_M, C], gl.float32, MMA)
                for step in range(9 * HALVES):
                    tap, of_tap = step // HALVES, step % HALVES
                    line = oldest + tap // 3
                    line = gl.where(line >= 3, line - 3, line)
                    a = view(kept.index((line * HALVES + of_tap) * BLOCK_M + tap % 3), [BLOCK_M, WIDTH], MATRIX)
                    if not HELD:
                        mbarrier.wait(filter_bars.index(at), turned)
                    acc = warpgroup_mma(a, filters.index(at).permute((1, 0)), acc, use_acc=step > 0, is_async=True)
                    acc = warpgroup_mma_wait(1, [acc])
                    if step > 0:
                        block = refill(weights, ring, block, sizes, PIECES, CHUNKS, PROGRAMS, HELD)
                    at, turned = turned_slot(at, turned, FILTER_STAGES)
                acc = warpgroup_mma_wait(0, [acc])
                block = refill(weights, ring, block, sizes, PIECES, CHUNKS, PROGRAMS, HELD)
                h2 = gl.convert_layout(nan_relu(scaled(acc, norm, 0)).to(dtype), LEFT, assert_trivial=True)
                x2 = pixels.index(slot)
                if SECOND:
                    mbarrier.wait(pixel_bars.index(slot), phase)
                e, d, at, turned = _expanded(h2, x2, ring, at, turned, SECOND, HELD)
                e, d = _arrived(e, d, SECOND)
                for _ in gl.static_range(1 + SECOND):
                    block = refill(weights, ring, block, sizes, PIECES, CHUNKS, PROGRAMS, HELD)
                for j in range(CHUNKS - 1):
                    coming, branch, at, turned = _expanded(h2, x2, ring, at, turned, SECOND, HELD)
                    if not SECOND:
                        tma.store_wait(0)  # the last chunk has been read
                        if j > 0:
                            box = load_pixels(x_desc, pool, box, sizes, PIECES, PROGRAMS)
                    slot, phase = leave(y_desc, e, d, norms, pool, out, slot, phase, at_y, j, SECOND)
                    e, d = _arrived(coming, branch, SECOND)
                    for _ in gl.static_range(1 + SECOND):
                        block = refill(weights, ring, block, sizes, PIECES, CHUNKS, PROGRAMS, HELD)
                if SECOND:  # its pixels have been multiplied for the last time
                    box = load_pixels(x_desc, pool, box, sizes, PIECES, PROGRAMS)
                    slot, phase = turned_slot(slot, phase, PIXEL_STAGES)
                else:
                    tma.store_wait(0)
                    box = load_pixels(x_desc, pool, box, sizes, PIECES, PROGRAMS)
                    leaving = 1
                slot, phase = leave(y_desc, e, d, norms, pool, out, slot, phase, at_y, CHUNKS - 1, SECOND)
        band += PROGRAMS
    tma.store_wait(0)


def bind_bottleneck_rows(x, reduce, conv, expand, shortcut, tile: StageTile):
    """Prepare `_bottleneck_rows_kernel` for parameters and shapes.

    Args:
        x: an example of the block's input `[N, CIN, H, W]`, fp16 or bf16, channels_last.
        reduce, conv, expand, shortcut: its convolutions as `fused_resblock.params.Conv`, the last one None for a plain
            residual; weights are channels_last. `bottleneck.refusal` must be None.
        tile: `tap_stages` pieces of pixels and `chunk_stages` blocks of filters are in the rings.

    Returns:
        A function of x, at a multiple of 16 bytes, that gives y `[N, K, H, W]`, channels_last.
    """
    n, channels, h, w = x.shape
    c, k = conv.weight.shape[0], expand.weight.shape[0]
    box = box_of(tile, w)
    units = gpu_of(x.device).multiprocessors
    groups, bands, rows, programs = bands_of(x.shape, tile, c, k, shortcut is not None, units)
    layers = (reduce, conv, expand, shortcut)
    launch = Launch(
        _bottleneck_rows_kernel,
        (programs,),
        (
            matrix_box(reduce.weight, c, channels, (c, STEP)),
            matrix_box(conv.weight, c, 9 * c, (c, STEP)),
            matrix_box(expand.weight, k, c, (STEP, c)),
            None if shortcut is None else matrix_box(shortcut.weight, k, channels, (STEP, STEP)),
            *(v for layer in layers for v in layer_vectors(layer)),
            *(groups * bands, bands, rows, h, w, channels, k),
            *(0.0 if layer is None else eps_of(layer.norm) for layer in layers),
            *(tile.tap_stages, tile.chunk_stages, programs, tile.held),
        ),
        x.device,
        num_warps=WARPS[tile.block_m],
    )
    of_x, of_y = (Descriptors(strided_box, (n, h, w, size), 1, box) for size in (channels, k))
    empty = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}

    def run(x):
        y = torch.empty((n, k, h, w), **empty)
        launch(of_x(x), of_y(y))
        return y

    return run
