"""`expand_shift` for 128 channels on Hopper: pixels and filters come through two rings that never run dry.

The same arithmetic as `expand_shift`, of blocks without a downsample branch. The filters of such a block, 0.5 MB and
more, do not stay in shared memory, and `expand_shift_tma` begins to load anew for every tile and each of its loops.
Here a program takes tile after tile, and TMA runs ahead of the matrix units from the taps of a tile to its chunks and
on to the next tile. One ring holds pixels: those of the 3x3 (`tail_taps`), 64 channels at a time, then the residual, 64
channels a chunk, over which y is written and leaves. The other holds blocks of 128x64 filters in the order of their
use. h2 passes through shared memory; the norms are formed once a program.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .boxes import Descriptors, choose_box, tiles_of, unaligned
from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu
from .expand_shift_tma import bind_expand_shift_tma
from .gpu import gpu_of
from .kept_norms import keep_norm, norm_vectors, scaled
from .launch import Launch, interpreted
from .ring import WIDTH
from .tail_chunk import buffer_of, chunk, ended, expand, reduce
from .tail_moves import ask_ahead, load_filters, load_pixels, store_reduced, tile_at
from .tail_ring import EDGE, by_boxes, halo_stages
from .tail_taps import convolve, rows_first
from .taps import columns, matrix_box
from .tiles import StageTile

PREFETCH = True
STAGGER = 0


@gluon.jit
def _expand_shift_ring_kernel(
    h_desc,  # [H, N, W, C] input of the 3x3; boxes of 64 channels, as all images here
    edge_desc,  # the same in boxes of two rows, where a box serves three taps, or None
    other_desc,  # residual [H, N, W, K]
    y_desc,  # [H, N, W, K] output of the block
    g_desc,  # [H, N, W, G] output of the next block's reduce, or None
    other_ptr,  # the residual itself, where it comes to L2 ahead, or None
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
    N,
    P,
    Q,
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
    PREFETCH: gl.constexpr,  # see `ask_ahead`
    STAGGER: gl.constexpr,
    PDL: gl.constexpr,  # see `dependent`
):
    """h2 = relu(bn(conv3x3(h))); y = relu(bn3(h2 W3) + other); g = relu(bn1(y W1)).

    Sums in fp32. h2 and y are rounded to their dtype, as they would be between kernels; g once, at the store.
    """
    WIDTH: gl.constexpr = w_desc.block_shape[1]
    ROWS: gl.constexpr = h_desc.block_shape[0]
    ACROSS: gl.constexpr = h_desc.block_shape[1] * h_desc.block_shape[2]
    BLOCK_M: gl.constexpr = ROWS * ACROSS
    HEIGHT: gl.constexpr = ROWS if edge_desc is None else ROWS + edge_desc.block_shape[0]
    LOADS: gl.constexpr = (9 if edge_desc is None else 3) * (C // WIDTH)
    CHUNKS: gl.constexpr = K // WIDTH
    GROUPS: gl.constexpr = G // (2 * WIDTH)
    dtype: gl.constexpr = h_desc.dtype
    MATRIX: gl.constexpr = w_desc.layout
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])

    pixels = gl.allocate_shared_memory(dtype, [PIXEL_STAGES * HEIGHT, ACROSS, WIDTH], MATRIX)
    filters = gl.allocate_shared_memory(dtype, [FILTER_STAGES, 2 * WIDTH, WIDTH], MATRIX)
    h2 = gl.allocate_shared_memory(dtype, [C // WIDTH, BLOCK_M, WIDTH], MATRIX)  # and g on its way out
    pixel_bars = gl.allocate_shared_memory(gl.int64, [PIXEL_STAGES, 1], mbarrier.MBarrierLayout())
    filter_bars = gl.allocate_shared_memory(gl.int64, [FILTER_STAGES, 1], mbarrier.MBarrierLayout())
    norm, norm3 = norm_vectors(C), norm_vectors(K)
    for bar in gl.static_range(PIXEL_STAGES):
        mbarrier.init(pixel_bars.index(bar), count=1)
    for bar in gl.static_range(FILTER_STAGES):
        mbarrier.init(filter_bars.index(bar), count=1)
    if GROUPS > 0:
        norm1 = norm_vectors(G)
    fence_async_shared()

    tile = gl.program_id(0)
    n, p, q = tile_at(tile, TILES_P, TILES_Q, h_desc)
    images, weights = (h_desc, edge_desc, other_desc), (w_desc, w3_desc, w1_desc)
    pool, ring, sizes = (pixels, pixel_bars), (filters, filter_bars), (TILES, TILES_P, TILES_Q, PROGRAMS)
    block = (0, 0, tile)  # of filters that is loaded next
    for _ in gl.static_range(FILTER_STAGES):
        block = load_filters(weights, ring, block, sizes, CHUNKS, GROUPS)
    keep_norm(norm, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS)
    keep_norm(norm3, bias3_ptr, mean3_ptr, var3_ptr, gamma3_ptr, beta3_ptr, EPS3)
    if GROUPS > 0:
        keep_norm(norm1, bias1_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, EPS1)
    wait_for_input(PDL)
    box = (0, 0, tile, n, p, q)  # of pixels that is loaded next
    for _ in gl.static_range(PIXEL_STAGES):
        box = load_pixels(images, pool, box, sizes, LOADS, CHUNKS)

    if STAGGER is not None:
        gl.inline_asm_elementwise(STAGGER, "=r,r", [tile % 2], gl.int32, is_pure=False, pack=1)
    used, coming = (0, 0, 0, 0), (box, block)  # slots and phases of the pixels and of the filters that are used next
    memory, descs = (pool, ring, h2), (images, weights, y_desc)
    while tile < TILES:
        where = tile_at(tile, TILES_P, TILES_Q, h_desc)
        if other_ptr is not None:
            ask_ahead(other_ptr, where, N, P, Q, K, other_desc, PREFETCH)
        acc = gl.zeros([BLOCK_M, C], gl.float32, MMA)
        acc, used, coming = convolve(acc, used, coming, (pool, ring), (images, weights), sizes, LOADS, CHUNKS, GROUPS)
        tma.store_wait(0)  # the last g has left
        halves = columns(acc, C // WIDTH)
        for piece in gl.static_range(C // WIDTH):
            z = scaled(gl.convert_layout(halves[piece], PIECE, assert_trivial=True), norm, piece)
            h2.index(piece).store(nan_relu(z).to(dtype))
        fence_async_shared()
        reduced = ()  # sums of the next reduce, of 128 channels each
        for _ in gl.static_range(GROUPS):
            zero = gl.zeros([BLOCK_M, 2 * WIDTH], gl.float32, MMA)
            reduced = reduced + (warpgroup_mma_init(zero),)  # noqa: RUF005 - Gluon knows no stars

        slot, phase, at, turned = used
        box, block = coming
        sums, at, turned = expand(h2, ring, at, turned)
        sums = warpgroup_mma_wait(0, [sums])
        block = load_filters(weights, ring, block, sizes, CHUNKS, GROUPS)
        used, coming = (slot, phase, at, turned), (box, block)
        sums, reduced, before, used, coming = chunk(
            0, sums, reduced, 0, used, coming, memory, descs, norm3, where, sizes, LOADS, CHUNKS, True, False
        )
        for pair in range(CHUNKS // 2 - 1):  # two at a time: sums do not change their registers while under way
            for half in gl.static_range(1, 3):
                j = 2 * pair + half
                sums, reduced, before, used, coming = chunk(
                    j,
                    sums,
                    reduced,
                    before,
                    used,
                    coming,
                    memory,
                    descs,
                    norm3,
                    where,
                    sizes,
                    LOADS,
                    CHUNKS,
                    False,
                    False,
                )
        last: gl.constexpr = CHUNKS - 1
        sums, reduced, before, used, coming = chunk(
            last, sums, reduced, before, used, coming, memory, descs, norm3, where, sizes, LOADS, CHUNKS, False, True
        )
        slot, phase, at, turned = used
        box, block = coming
        reduced, at, turned = reduce(buffer_of(pool, before, y_desc), ring, at, turned, reduced, last)
        reduced = ended(reduced)
        for _ in gl.static_range(GROUPS):
            block = load_filters(weights, ring, block, sizes, CHUNKS, GROUPS)
        tma.store_wait(0)
        box = load_pixels(images, pool, box, sizes, LOADS, CHUNKS)
        used, coming = (slot, phase, at, turned), (box, block)
        for group in gl.static_range(GROUPS):
            tma.store_wait(0)
            store_reduced(g_desc, h2, reduced[group], norm1, where, 2 * group)
        tile += PROGRAMS
    tma.store_wait(0)


def bind_expand_shift_ring(h, conv, expand, other, shortcut, reduce, tile: StageTile, *, overwrite: bool = False):
    """Prepare `_expand_shift_ring_kernel`; arguments and result are those of `bind_expand_shift`.

    A call with an activation that is no multiple of 16 bytes into its memory, and one in the interpreter, which knows
    no Gluon, runs `expand_shift_tma`.

    Args:
        h, conv, expand, other, shortcut, reduce: see `bind_expand_shift`; `tail_ring.refusal` must be None.
        tile: `tap_stages` boxes of pixels and `chunk_stages` blocks of filters are in the rings.
        overwrite: see `bind_expand_shift`.
    """
    boxes = by_boxes(tile)
    stand_in = bind_expand_shift_tma(h, conv, expand, other, shortcut, reduce, boxes, overwrite=overwrite)
    if interpreted():
        return stand_in
    n, c, p, q = h.shape
    k, outputs = expand.weight.shape[0], 0 if reduce is None else reduce.weight.shape[0]
    box = choose_box(tile.block_m, n, p, q)
    count = tiles_of(box, n, p, q)
    programs = min(count, gpu_of(h.device).multiprocessors)
    layers = (conv, expand, reduce)
    with_halo = halo_stages(tile, box)
    part = 2 * k * tile.block_m // (32 * tile.num_warps)  # bytes that a thread asks for
    prefetch = f"cp.async.bulk.prefetch.L2.global [$1], {part}; mov.b32 $0, 0;" if PREFETCH else None
    launch = Launch(
        _expand_shift_ring_kernel,
        (programs,),
        (
            matrix_box(conv.weight, c, 9 * c, (2 * WIDTH, WIDTH)),
            matrix_box(expand.weight, k, c, (WIDTH, WIDTH)),
            None if reduce is None else matrix_box(reduce.weight, outputs, k, (2 * WIDTH, WIDTH)),
            *(v for layer in layers for v in layer_vectors(layer)),
            *(n, p, q, count, -(-p // box.rows), -(-q // box.columns)),
            *(c, k, outputs),
            *(0.0 if layer is None else eps_of(layer.norm) for layer in layers),
            *(with_halo or tile.tap_stages, tile.chunk_stages, programs, prefetch),
            f"{{ .reg .pred p; setp.ne.u32 p, $1, 0; @p nanosleep.u32 {STAGGER}; mov.b32 $0, 0; }}" if STAGGER else None,
        ),
        h.device,
        num_warps=tile.num_warps,
    )
    of_h, of_y, of_g = (Descriptors(rows_first, (n, p, q, channels), box) for channels in (c, k, outputs))
    of_edge = Descriptors(rows_first, (n, p, q, c), box, EDGE)
    of_other = Descriptors(rows_first, (n, p, q, k), box)
    empty = {"dtype": h.dtype, "device": h.device, "memory_format": torch.channels_last}

    def run(h, other):
        if unaligned(h, other):
            return stand_in(h, other)
        y = other if overwrite else torch.empty((n, k, p, q), **empty)
        g = None if reduce is None else torch.empty((n, outputs, p, q), **empty)
        edge = of_edge(h) if with_halo else None
        launch(of_h(h), edge, of_other(other), of_y(y), None if g is None else of_g(g), other if PREFETCH else None)
        return y, g

    return run
