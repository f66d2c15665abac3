"""`conv_bn_act` with a downsample branch on Hopper: both GEMMs of a tile go through one ring of loads.

`conv_tma` computes the same, but its two loops keep each other's loads apart: every tile waits twice for the memory.
Here a tile is one sequence of steps, each of 64 channels of h, then of x, and TMA runs `STAGES - 1` steps ahead of the
matrix units, from one GEMM to the other and from one tile to the next.

One accumulator does for both GEMMs, and so tiles of 128x256 fit the registers, which load a quarter less than those of
128x128: `scale*a + scale2*b = base * (scale/base * a + b)`, where `base` is scale2 (`_ratio`).
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .boxes import Descriptors, choose_box, tiles_of, unaligned
from .conv_tma import bind_conv_tma
from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu, scale_shift
from .gpu import gpu_of
from .launch import Launch, interpreted
from .ring import WIDTH, buffers_of, by_boxes
from .taps import columns, matrix_box, strided_box, strided_box_of, tma_load, tma_store, view
from .tiles import Tile


@gluon.jit
def _place_of(
    tile,
    TILES_P,  # boxes along rows and columns of an image
    TILES_Q,
    y_desc,  # in such boxes
    TILES_K: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """First image, row, column and output channel of a tile; neighbours share their pixels in L2."""
    n, p, q = strided_box_of(tile // TILES_K, TILES_P, TILES_Q, y_desc)
    return n, p, q, tile % TILES_K * BLOCK_N


@gluon.jit
def _load(
    images,  # descriptors of h, x and y
    weights,  # of w and w2
    memory,  # pixels [BLOCK_M, 64], filters [BLOCK_N, 64] and a barrier
    place,  # n, p, q, k
    step,
    STEPS: gl.constexpr,  # of the first GEMM
    wanted,
):
    """Ask for the pixels and the filters of a step, if it is wanted; the barrier tells when they have come."""
    h_desc, x_desc, _ = images
    w_desc, w2_desc = weights
    pixels, filters, bar = memory
    n, p, q, k = place
    mbarrier.expect(bar, h_desc.block_type.nbytes + w_desc.block_type.nbytes, pred=wanted)
    box = view(pixels, h_desc.block_shape, h_desc.layout)
    c = step * w_desc.block_shape[1]
    if step < STEPS:
        tma_load(h_desc, [n, p, 0, q, c], bar, box, pred=wanted)
        tma_load(w_desc, [k, c], bar, filters, pred=wanted)
    else:
        c -= STEPS * w_desc.block_shape[1]
        tma_load(x_desc, [n, p, 0, q, c], bar, box, pred=wanted)
        tma_load(w2_desc, [k, c], bar, filters, pred=wanted)


@gluon.jit
def _gemm(
    images,
    weights,
    memory,  # pixels [STAGES, BLOCK_M, 64], filters [STAGES, BLOCK_N, 64] and barriers
    acc,  # [BLOCK_M, BLOCK_N]
    ring,  # slots of the next step and of the one before it, phase of the next one's barrier
    coming,  # the step that is loaded next: its tile, the tile's n, p, q, k, and its number there
    sizes,  # TILES, TILES_P, TILES_Q
    TILES_K: gl.constexpr,
    STEPS: gl.constexpr,  # of the first GEMM
    ALL: gl.constexpr,  # of both
    PROGRAMS: gl.constexpr,
    SECOND: gl.constexpr,  # whether to add to the sums of the first
):
    """One of a tile's GEMMs, while the loads of what comes after it go on; the new acc, ring and coming."""
    pixels, filters, bars = memory
    slot, before, phase = ring
    tile, n, p, q, k, step = coming
    TILES, TILES_P, TILES_Q = sizes
    for now in range(ALL - STEPS if SECOND else STEPS):
        mbarrier.wait(bars.index(slot), phase)
        adds = now >= 0 if SECOND else now > 0
        b = filters.index(slot).permute((1, 0))
        acc = warpgroup_mma(pixels.index(slot), b, acc, use_acc=adds, is_async=True)
        acc = warpgroup_mma_wait(1, [acc])  # so the slot before this one is free
        free = (pixels.index(before), filters.index(before), bars.index(before))
        _load(images, weights, free, (n, p, q, k), step, STEPS, tile < TILES)
        step += 1
        if step == ALL:
            step = 0
            tile += PROGRAMS
            n, p, q, k = _place_of(tile, TILES_P, TILES_Q, images[2], TILES_K, filters.shape[1])
        before = slot
        slot += 1
        if slot == pixels.shape[0]:
            slot = 0
            phase ^= 1
    return warpgroup_mma_wait(0, [acc]), (slot, before, phase), (tile, n, p, q, k, step)


@gluon.jit
def _ratio(scale, scale2):
    """base and scale / base, with base = scale2 unless that is so small that the ratio could overflow.

    Then `base` is 2^-60 of scale: what the other GEMM adds, at most 2^42 with 16-bit factors, is lost in rounding.
    """
    small = tl.abs(scale) * 8.673617379884035e-19
    base = tl.where(tl.abs(scale2) < small, small, scale2)
    return base, tl.where(base == 0.0, 0.0, scale / base)


@gluon.jit
def _scaled(acc, scale, vector):
    """`acc * scale` for a scale of each column, one a thread, which pass through shared memory."""
    vector.store(scale)
    return acc * vector.load(gl.SliceLayout(0, acc.type.layout))[None, :]


@gluon.jit
def _conv_pair_kernel(
    h_desc,  # [N, P, 1, Q, C]
    x_desc,  # [N, P, STRIDE, Q, STRIDE*C2]
    y_desc,  # [N, P, 1, Q, K], in boxes of 64 channels
    w_desc,  # [K, C]
    w2_desc,  # [K, C2]
    bias_ptr,  # [K], or None
    mean_ptr,  # [K], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    bias2_ptr,
    mean2_ptr,
    var2_ptr,
    gamma2_ptr,
    beta2_ptr,
    TILES,
    TILES_P,  # boxes along rows and columns of an image
    TILES_Q,
    C: gl.constexpr,
    C2: gl.constexpr,
    K: gl.constexpr,
    EPS: gl.constexpr,
    EPS2: gl.constexpr,
    APPLY_RELU: gl.constexpr,
    STAGES: gl.constexpr,  # of the ring
    BUFFERS: gl.constexpr,  # for pieces of the result; divides their number
    PROGRAMS: gl.constexpr,
    PDL: gl.constexpr,  # see `dependent`
):
    """y = act(scale*(h w) + shift + scale2*(x w2) + shift2); sums in fp32, rounded once, at the store."""
    BLOCK_M: gl.constexpr = h_desc.block_shape[0] * h_desc.block_shape[1] * h_desc.block_shape[3]
    BLOCK_N: gl.constexpr = w_desc.block_shape[0]
    WIDTH: gl.constexpr = w_desc.block_shape[1]
    STEPS: gl.constexpr = C // WIDTH
    ALL: gl.constexpr = STEPS + C2 // WIDTH
    PIECES: gl.constexpr = BLOCK_N // WIDTH
    TILES_K: gl.constexpr = K // BLOCK_N
    dtype: gl.constexpr = h_desc.dtype
    MATRIX: gl.constexpr = w_desc.layout
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    COLUMNS: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])

    pixels = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, WIDTH], MATRIX)
    filters = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, WIDTH], MATRIX)
    pieces = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_M, WIDTH], MATRIX)
    vector = gl.allocate_shared_memory(gl.float32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for bar in gl.static_range(STAGES):
        mbarrier.init(bars.index(bar), count=1)
    fence_async_shared()

    images, weights, memory = (h_desc, x_desc, y_desc), (w_desc, w2_desc), (pixels, filters, bars)
    sizes = (TILES, TILES_P, TILES_Q)
    tile = gl.program_id(0)
    coming = tile  # the tile of the step that is loaded next
    n, p, q, k = _place_of(coming, TILES_P, TILES_Q, y_desc, TILES_K, BLOCK_N)
    wait_for_input(PDL)
    for turn in gl.static_range(STAGES - 1):
        free = (pixels.index(turn), filters.index(turn), bars.index(turn))
        _load(images, weights, free, (n, p, q, k), turn % ALL, STEPS, coming < TILES)
        if turn % ALL == ALL - 1:
            coming += PROGRAMS
            n, p, q, k = _place_of(coming, TILES_P, TILES_Q, y_desc, TILES_K, BLOCK_N)
    slot, before, phase, step = 0, STAGES - 1, 0, (STAGES - 1) % ALL
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, MMA)
    while tile < TILES:
        offs = tile % TILES_K * BLOCK_N + gl.arange(0, BLOCK_N, COLUMNS)
        scale, shift = scale_shift(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs, offs < K, EPS, tl.float32)
        scale2, shift2 = scale_shift(
            bias2_ptr, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, offs, offs < K, EPS2, tl.float32
        )
        ring, then = (slot, before, phase), (coming, n, p, q, k, step)
        acc, ring, then = _gemm(
            images, weights, memory, acc, ring, then, sizes, TILES_K, STEPS, ALL, PROGRAMS, SECOND=False
        )
        base, ratio = _ratio(scale, scale2)
        acc = _scaled(acc, ratio, vector)
        acc, ring, then = _gemm(
            images, weights, memory, acc, ring, then, sizes, TILES_K, STEPS, ALL, PROGRAMS, SECOND=True
        )
        slot, before, phase = ring
        coming, n, p, q, k, step = then
        n_out, p_out, q_out, k_out = _place_of(tile, TILES_P, TILES_Q, y_desc, TILES_K, BLOCK_N)
        sums = columns(_scaled(acc, base, vector), PIECES)
        vector.store(shift + shift2)
        for piece in gl.static_range(PIECES):
            shift = vector.slice(piece * WIDTH, WIDTH).load(gl.SliceLayout(0, PIECE))
            z = gl.convert_layout(sums[piece], PIECE, assert_trivial=True) + shift[None, :]
            if APPLY_RELU:
                z = nan_relu(z)
            tma.store_wait(BUFFERS - 1)
            buffer = pieces.index(piece % BUFFERS)
            buffer.store(z.to(dtype))
            fence_async_shared()
            place = [n_out, p_out, 0, q_out, k_out + piece * WIDTH]
            tma_store(y_desc, place, view(buffer, y_desc.block_shape, y_desc.layout))
        tile += PROGRAMS
    tma.store_wait(0)


def bind_conv_pair(x, conv, other, epilogue, tile: Tile):
    """Prepare `_conv_pair_kernel` for parameters and shapes; arguments and result are those of `bind_conv_bn_act`.

    A call with an activation that is no multiple of 16 bytes into its memory, and one in the interpreter, which knows
    no Gluon, runs `conv_tma`.

    Args:
        x, conv, other, epilogue: see `bind_conv_bn_act`; `ring.refusal` must be None.
        tile: `num_stages` are the ring's; `persistent` programs a multiprocessor.
    """
    stand_in = bind_conv_tma(x, conv, other, epilogue, by_boxes(tile))
    if interpreted():
        return stand_in
    branch = epilogue.shortcut
    n, c, h, w = x.shape
    k, c2 = branch.weight.shape[:2]
    stride = branch.stride[0]
    if stride == 1:  # pixels need not be told apart
        n, h, w = 1, 1, n * h * w
    box = choose_box(tile.block_m, n, h, w)
    count = tiles_of(box, n, h, w) * (k // tile.block_n)
    programs = min(count, tile.persistent * gpu_of(x.device).multiprocessors)
    launch = Launch(
        _conv_pair_kernel,
        (programs,),
        (
            matrix_box(conv.weight, k, c, (tile.block_n, WIDTH)),
            matrix_box(branch.weight, k, c2, (tile.block_n, WIDTH)),
            *layer_vectors(conv),
            *layer_vectors(branch),
            *(count, -(-h // box.rows), -(-w // box.columns)),
            *(c, c2, k, eps_of(conv.norm), eps_of(branch.norm), epilogue.relu),
            *(tile.num_stages, buffers_of(tile, second=True), programs),
        ),
        x.device,
        num_warps=tile.num_warps,
    )
    of_h = Descriptors(strided_box, (n, h, w, c), 1, box)
    of_x = Descriptors(strided_box, (n, h * stride, w * stride, c2), stride, box)
    of_y = Descriptors(strided_box, (n, h, w, k), 1, box)
    shape, options = conv.output_shape(x), {"dtype": x.dtype, "device": x.device}

    def run(x, other):
        if unaligned(x, other):
            return stand_in(x, other)
        y = torch.empty(shape, **options, memory_format=torch.channels_last)
        launch(of_h(x), of_x(other), of_y(y))
        return y

    return run
