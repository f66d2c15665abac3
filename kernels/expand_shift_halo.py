"""`expand_shift` for 64 channels on Hopper: taps from shared memory, and filters that stay there.

The same arithmetic as `expand_shift`. A program keeps all filters of the block, some 136 KB, and takes tile after tile;
of each it loads the pixels with their halo (`halo`), and the residual a chunk at a time, ahead of its use. So from L2
come 3.75 boxes of h instead of 9 and no filters, and what is left to bind is device memory.
"""

from __future__ import annotations

from dataclasses import replace

import triton.language as tl
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

from .boxes import Descriptors
from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu, scale_shift
from .expand_shift_tma import bind_expand_shift_tma
from .gpu import gpu_of
from .halo import SIDE, boxes_of
from .launch import Launch, interpreted
from .tail_call import tail_call
from .taps import (
    blocks,
    box_of,
    convolve,
    image_box,
    load_box,
    load_halo,
    matrix_box,
    tma_load,
    tma_store,
    view,
)
from .tiles import StageTile


@gluon.jit
def _expand_shift_halo_kernel(
    h_desc,  # [N, P, Q, C] input of the 3x3
    edge_desc,  # the same, in boxes of two rows
    other_desc,  # residual [N, P, Q, K]; with SECOND the input of the downsample branch [N, P, Q, C]
    y_desc,  # [N, P, Q, K] output of the block
    g_desc,  # [N, P, Q, G] output of the next block's reduce, or None
    w_desc,  # [C, 9*C]
    w3_desc,  # [K, C]
    w2_desc,  # [K, C] of the downsample branch, or None
    w1_desc,  # [G, K] of the next reduce, or None
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
    bias2_ptr,
    mean2_ptr,
    var2_ptr,
    gamma2_ptr,
    beta2_ptr,
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
    G: gl.constexpr,
    EPS: gl.constexpr,
    EPS3: gl.constexpr,
    EPS2: gl.constexpr,
    EPS1: gl.constexpr,
    SECOND: gl.constexpr,
    BUFFERS: gl.constexpr,  # for chunks of C expanded channels; divides their number
    PROGRAMS: gl.constexpr,
    PDL: gl.constexpr,  # see `dependent`
):
    """h2 = relu(bn(conv3x3(h))); y = relu(bn3(h2 W3) + (other | bn2(other W2))); g = relu(bn1(y W1)).

    Sums in fp32. h2 and y are rounded to their dtype, as they would be between kernels; g once, at the store.
    """
    ROWS: gl.constexpr = h_desc.block_shape[1]
    BLOCK_M: gl.constexpr = 8 * ROWS  # a row of a box is eight pixels
    CHUNKS: gl.constexpr = K // C
    RESIDUAL: gl.constexpr = not SECOND
    REDUCE: gl.constexpr = g_desc is not None
    dtype: gl.constexpr = h_desc.dtype
    MATRIX: gl.constexpr = w_desc.layout
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    MMA_G: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, G, 16])

    h_smem = gl.allocate_shared_memory(dtype, [3 * (ROWS + 2), 8, C], MATRIX)
    w_smem = gl.allocate_shared_memory(dtype, [9, C, C], MATRIX)
    w3_smem = gl.allocate_shared_memory(dtype, [CHUNKS, C, C], MATRIX)
    chunks = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_M, C], MATRIX)  # a residual comes, y leaves
    bars = gl.allocate_shared_memory(gl.int64, [3 + BUFFERS, 1], mbarrier.MBarrierLayout())
    for bar in gl.static_range(3 + BUFFERS):
        mbarrier.init(bars.index(bar), count=1)
    fence_async_shared()

    filters = bars.index(0)
    mbarrier.expect(filters, 2 * C * (9 * C + K + (K if SECOND else 0)) + (2 * G * K if REDUCE else 0))
    for tap in gl.static_range(9):
        tma_load(w_desc, [0, tap * C], filters, w_smem.index(tap))
    for chunk in gl.static_range(CHUNKS):
        tma_load(w3_desc, [chunk * C, 0], filters, w3_smem.index(chunk))
    if SECOND:
        w2_smem = gl.allocate_shared_memory(dtype, [CHUNKS, C, C], MATRIX)
        x2_smem = gl.allocate_shared_memory(dtype, [1, BLOCK_M, C], MATRIX)
        for chunk in gl.static_range(CHUNKS):
            tma_load(w2_desc, [chunk * C, 0], filters, w2_smem.index(chunk))
    if REDUCE:
        w1_smem = gl.allocate_shared_memory(dtype, [CHUNKS, G, C], MATRIX)
        for chunk in gl.static_range(CHUNKS):
            tma_load(w1_desc, [0, chunk * C], filters, w1_smem.index(chunk))

    tile = gl.program_id(0)
    n, p, q = box_of(tile, TILES_P, TILES_Q, h_desc)
    wait_for_input(PDL)
    load_halo(h_desc, edge_desc, h_smem, bars.index(1), n, p, q, 0, True)
    if SECOND:
        load_box(other_desc, [n, p, q, 0], bars.index(2), x2_smem.index(0), True)
    else:
        for place in gl.static_range(BUFFERS):
            load_box(other_desc, [n, p, q, place * C], bars.index(3 + place), chunks.index(place), True)
    offs_c = gl.arange(0, C, gl.SliceLayout(0, MMA))
    zeros = gl.zeros([BLOCK_M, C], gl.float32, MMA)
    mbarrier.wait(filters, 0)
    turn = 0
    while tile < TILES:
        tile += PROGRAMS  # the next one
        more = tile < TILES
        n_next, p_next, q_next = box_of(tile, TILES_P, TILES_Q, h_desc)
        mbarrier.wait(bars.index(1), turn & 1)
        acc = convolve(h_smem, w_smem, zeros, turn)
        load_halo(h_desc, edge_desc, h_smem, bars.index(1), n_next, p_next, q_next, 0, more)
        scale, shift = scale_shift(
            bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs_c, offs_c < C, EPS, tl.float32
        )
        h2 = nan_relu(acc * scale[None, :] + shift[None, :]).to(dtype)
        h2 = gl.convert_layout(h2, gl.DotOperandLayout(0, MMA, 2))
        e = warpgroup_mma(h2, w3_smem.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if SECOND:
            mbarrier.wait(bars.index(2), turn & 1)
            x2 = x2_smem.index(0)
            down = warpgroup_mma(x2, w2_smem.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
            down = warpgroup_mma_wait(0, [down])
        e = warpgroup_mma_wait(0, [e])
        if REDUCE:
            reduced = warpgroup_mma_init(gl.zeros([BLOCK_M, G], gl.float32, MMA_G))
        for j in range(CHUNKS):
            offs = j * C + offs_c
            scale3, shift3 = scale_shift(
                bias3_ptr, mean3_ptr, var3_ptr, gamma3_ptr, beta3_ptr, offs, offs < K, EPS3, tl.float32
            )
            b = j % BUFFERS
            buffer = chunks.index(b)
            z = e * scale3[None, :] + shift3[None, :]
            if SECOND:
                scale2, shift2 = scale_shift(
                    bias2_ptr, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, offs, offs < K, EPS2, tl.float32
                )
                z += down * scale2[None, :] + shift2[None, :]
            else:
                mbarrier.wait(bars.index(3 + b), (j // BUFFERS + turn * (CHUNKS // BUFFERS)) & 1)
                z += buffer.load(MMA).to(gl.float32)
            y = nan_relu(z).to(dtype)
            if REDUCE:
                reduced = warpgroup_mma_wait(0, [reduced])
            # the next chunk's product is under way while this one leaves (behind the last chunk, one too many)
            following = (j + 1) % CHUNKS
            e = warpgroup_mma(h2, w3_smem.index(following).permute((1, 0)), zeros, use_acc=False, is_async=True)
            if SECOND:
                down = warpgroup_mma(x2, w2_smem.index(following).permute((1, 0)), zeros, use_acc=False, is_async=True)
            buffer.store(y)
            fence_async_shared()
            tma_store(y_desc, [n, p, q, j * C], view(buffer, y_desc.block_shape, y_desc.layout))
            e = warpgroup_mma_wait(0, [e])
            if SECOND:
                down = warpgroup_mma_wait(0, [down])
            if REDUCE:  # under way while the next chunk is scaled and added to
                reduced = warpgroup_mma(buffer, w1_smem.index(j).permute((1, 0)), reduced, is_async=True)
            tma.store_wait(1)  # the chunk before this one has left its buffer
            if RESIDUAL and BUFFERS < CHUNKS:
                coming = j - 1 + BUFFERS
                wanted = (j > 0) & (coming < CHUNKS)
                b = coming % BUFFERS
                load_box(other_desc, [n, p, q, coming * C], bars.index(3 + b), chunks.index(b), wanted)
        if SECOND:
            load_box(other_desc, [n_next, p_next, q_next, 0], bars.index(2), x2_smem.index(0), more)
        if REDUCE:  # g leaves by the buffers of the chunks
            reduced = warpgroup_mma_wait(0, [reduced])
            offs_g = gl.arange(0, G, gl.SliceLayout(0, MMA_G))
            scale1, shift1 = scale_shift(
                bias1_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, offs_g, offs_g < G, EPS1, tl.float32
            )
            g = nan_relu(reduced * scale1[None, :] + shift1[None, :]).to(dtype)
            tma.store_wait(0)
            outgoing = blocks(chunks, 0, G // C)
            view(outgoing, [BLOCK_M, G], MATRIX).store(g)
            fence_async_shared()
            tma_store(g_desc, [n, p, q, 0], view(outgoing, g_desc.block_shape, g_desc.layout))
        tma.store_wait(0)
        if RESIDUAL:
            for place in gl.static_range(BUFFERS):
                load_box(
                    other_desc, [n_next, p_next, q_next, place * C], bars.index(3 + place), chunks.index(place), more
                )
        n, p, q = n_next, p_next, q_next
        turn += 1


def bind_expand_shift_halo(h, conv, expand, other, shortcut, reduce, tile: StageTile, *, overwrite: bool = False):
    """Prepare `_expand_shift_halo_kernel`; arguments and result are those of `bind_expand_shift`.

    A call with an activation that is no multiple of 16 bytes into its memory, and one in the interpreter, which knows
    no Gluon, runs `expand_shift_tma`.

    Args:
        h, conv, expand, other, shortcut, reduce: see `bind_expand_shift`; `halo.tail_refusal` must be None.
        tile: its `block_m` and `block_n` are 64; `chunk_stages` buffers hold chunks, see `halo.halo_buffers`.
        overwrite: see `bind_expand_shift`.
    """
    boxes = replace(tile, halo=False)
    by_boxes = bind_expand_shift_tma(h, conv, expand, other, shortcut, reduce, boxes, overwrite=overwrite)
    if interpreted():
        return by_boxes
    n, c, height, width = h.shape
    k = expand.weight.shape[0]
    outputs = c if reduce is None else reduce.weight.shape[0]
    layers = (conv, expand, shortcut, reduce)
    tiles, down, across = boxes_of(n, height, width)
    programs = min(tiles, gpu_of(h.device).multiprocessors)
    block = (c, c)
    launch = Launch(
        _expand_shift_halo_kernel,
        (programs,),
        (
            matrix_box(conv.weight, c, 9 * c, block),
            matrix_box(expand.weight, k, c, block),
            None if shortcut is None else matrix_box(shortcut.weight, k, c, block),
            None if reduce is None else matrix_box(reduce.weight, outputs, k, (outputs, c)),
            *(v for layer in layers for v in layer_vectors(layer)),
            *(tiles, down, across),
            *(c, k, outputs),
            *(0.0 if layer is None else eps_of(layer.norm) for layer in layers),
            *(shortcut is not None, tile.chunk_stages, programs),
        ),
        h.device,
        num_warps=tile.num_warps,
    )
    of_h, edge_of_h = (Descriptors(image_box, (n, height, width, c), rows) for rows in (SIDE, 2))
    of_other, of_y, of_g = (
        Descriptors(image_box, (n, height, width, channels), SIDE, parts)
        for channels, parts in ((other.shape[1], 1), (k, 1), (outputs, outputs // c))
    )

    def described(h, other, y, g):
        return of_h(h), edge_of_h(h), of_other(other), of_y(y), None if g is None else of_g(g)

    return tail_call(launch, h, conv, expand, reduce, overwrite, described, by_boxes)
