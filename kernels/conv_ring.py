"""`conv_bn_act` for 1x1s of stride 1 on Hopper: loads run ahead through a ring, and residuals come before their sums.

`conv_tma` asks for a tile's residual when its sums are ready, and then waits for it. Here TMA runs `STAGES - 1` steps
of 64 channels ahead of the matrix units, from one tile to the next. The residual comes in pieces, 64 channels of a
tile, to the buffers that y leaves by: once a piece of y has been read out, its buffer takes the next piece of the
residual that has none, up to two tiles ahead.
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

from .boxes import Descriptors, unaligned
from .conv_tma import bind_conv_tma
from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu, scale_shift
from .gpu import gpu_of
from .launch import Launch, interpreted
from .ring import WIDTH, buffers_of, by_boxes
from .taps import columns, matrix_box, tma_load, tma_store
from .tiles import Tile


@gluon.jit
def _load_step(
    x_desc,
    w_desc,
    memory,  # pixels [STAGES, BLOCK_M, 64], filters [STAGES, BLOCK_N, 64] and barriers
    slot,
    tile,
    step,
    TILES_K: gl.constexpr,
    wanted,
):
    """Ask for the pixels and the filters of a step, if it is wanted; the slot's barrier tells when they have come."""
    pixels, filters, bars = memory
    pixels, filters, bar = pixels.index(slot), filters.index(slot), bars.index(slot)
    m, k = tile // TILES_K * x_desc.block_shape[0], tile % TILES_K * w_desc.block_shape[0]
    mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes, pred=wanted)
    tma_load(x_desc, [m, step * x_desc.block_shape[1]], bar, pixels, pred=wanted)
    tma_load(w_desc, [k, step * x_desc.block_shape[1]], bar, filters, pred=wanted)


@gluon.jit
def _load_residual(
    desc,
    memory,  # pieces [BUFFERS, BLOCK_M, 64] and barriers
    place,
    tile,
    turn: gl.constexpr,  # of a piece, counted from the tile's first
    TILES,
    TILES_K: gl.constexpr,
    PIECES: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """Ask for a piece of the residual of this tile or a later one, if there is such a tile."""
    pieces, come = memory
    tile += turn // PIECES * PROGRAMS
    m, k = tile // TILES_K * desc.block_shape[0], (tile % TILES_K * PIECES + turn % PIECES) * desc.block_shape[1]
    mbarrier.expect(come.index(place), desc.block_type.nbytes, pred=tile < TILES)
    tma_load(desc, [m, k], come.index(place), pieces.index(place), pred=tile < TILES)


@gluon.jit
def _conv_ring_kernel(
    x_desc,  # [M, C]
    residual_desc,  # [M, K], or None
    y_desc,  # [M, K], in pieces of 64 channels
    w_desc,  # [K, C]
    bias_ptr,  # [K], or None
    mean_ptr,  # [K], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    TILES,
    C: gl.constexpr,
    K: gl.constexpr,
    EPS: gl.constexpr,
    APPLY_RELU: gl.constexpr,
    STAGES: gl.constexpr,  # of the ring
    BUFFERS: gl.constexpr,  # for pieces; with a residual as many as a tile has, or more
    PROGRAMS: gl.constexpr,
    PDL: gl.constexpr,  # see `dependent`
):
    """y = act(scale*(x w) + shift [+ residual]); sums in fp32, rounded once, at the store."""
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    BLOCK_N: gl.constexpr = w_desc.block_shape[0]
    WIDTH: gl.constexpr = w_desc.block_shape[1]
    STEPS: gl.constexpr = C // WIDTH
    PIECES: gl.constexpr = BLOCK_N // WIDTH
    TILES_K: gl.constexpr = K // BLOCK_N  # neighbours share their pixels in L2
    RESIDUAL: gl.constexpr = residual_desc is not None
    LAG: gl.constexpr = 1 if BUFFERS > PIECES else 0  # pieces of y that may be leaving when the next residual is asked
    dtype: gl.constexpr = x_desc.dtype
    MATRIX: gl.constexpr = w_desc.layout
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    COLUMNS: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    pixels = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, WIDTH], MATRIX)
    filters = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, WIDTH], MATRIX)
    pieces = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_M, WIDTH], MATRIX)  # a residual comes, y leaves
    vectors = gl.allocate_shared_memory(gl.float32, [2, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    come = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for bar in gl.static_range(STAGES):
        mbarrier.init(bars.index(bar), count=1)
    for bar in gl.static_range(BUFFERS):
        mbarrier.init(come.index(bar), count=1)
    fence_async_shared()

    tile = gl.program_id(0)
    wait_for_input(PDL)
    memory, buffers = (pixels, filters, bars), (pieces, come)
    for turn in gl.static_range(STAGES - 1):
        coming = tile + turn // STEPS * PROGRAMS
        _load_step(x_desc, w_desc, memory, turn, coming, turn % STEPS, TILES_K, coming < TILES)
    if RESIDUAL:
        for turn in gl.static_range(BUFFERS - LAG):
            _load_residual(residual_desc, buffers, turn, tile, turn, TILES, TILES_K, PIECES, PROGRAMS)
    coming, step = tile + (STAGES - 1) // STEPS * PROGRAMS, (STAGES - 1) % STEPS  # what is loaded next
    slot, before, phase = 0, STAGES - 1, 0  # of the ring: of the next step and the one before it
    place, left, turned = 0, BUFFERS - 1, 0  # likewise of the buffers
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, MMA)
    while tile < TILES:
        k = tile % TILES_K * BLOCK_N
        offs = k + gl.arange(0, BLOCK_N, COLUMNS)
        scale, shift = scale_shift(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs, offs < K, EPS, tl.float32)
        for now in range(STEPS):
            mbarrier.wait(bars.index(slot), phase)
            b = filters.index(slot).permute((1, 0))
            acc = warpgroup_mma(pixels.index(slot), b, acc, use_acc=now > 0, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])  # so the slot before this one is free
            _load_step(x_desc, w_desc, memory, before, coming, step, TILES_K, coming < TILES)
            step += 1
            if step == STEPS:
                step = 0
                coming += PROGRAMS
            before = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, [acc])
        vectors.index(0).store(scale)
        vectors.index(1).store(shift)
        sums = columns(acc, PIECES)
        for piece in gl.static_range(PIECES):
            buffer = pieces.index(place)
            scale = vectors.index(0).slice(piece * WIDTH, WIDTH).load(gl.SliceLayout(0, PIECE))
            shift = vectors.index(1).slice(piece * WIDTH, WIDTH).load(gl.SliceLayout(0, PIECE))
            z = gl.convert_layout(sums[piece], PIECE, assert_trivial=True) * scale[None, :] + shift[None, :]
            if RESIDUAL:
                mbarrier.wait(come.index(place), turned)
                z += buffer.load(PIECE).to(gl.float32)
            if APPLY_RELU:
                z = nan_relu(z)
            if not RESIDUAL:
                tma.store_wait(BUFFERS - 1)
            buffer.store(z.to(dtype))
            fence_async_shared()
            tma_store(y_desc, [tile // TILES_K * BLOCK_M, k + piece * WIDTH], buffer)
            if RESIDUAL:
                tma.store_wait(LAG)
                free = left if LAG else place
                ahead = piece - LAG + BUFFERS
                _load_residual(residual_desc, buffers, free, tile, ahead, TILES, TILES_K, PIECES, PROGRAMS)
            left = place
            place += 1
            if place == BUFFERS:
                place = 0
                turned ^= 1
        tile += PROGRAMS
    tma.store_wait(0)


def bind_conv_ring(x, conv, other, epilogue, tile: Tile, *, overwrite: bool = False):
    """Prepare `_conv_ring_kernel` for parameters and shapes; arguments and result are those of `bind_conv_bn_act`.

    A call with an activation that is no multiple of 16 bytes into its memory, and one in the interpreter, which knows
    no Gluon, runs `conv_tma`.

    Args:
        x, conv, other, epilogue: see `bind_conv_bn_act`; `ring.refusal` must be None, and no shortcut there.
        tile: `num_stages` are the ring's; `persistent` programs a multiprocessor.
        overwrite: write the result over a residual.
    """
    stand_in = bind_conv_tma(x, conv, other, epilogue, by_boxes(tile), overwrite=overwrite)
    if interpreted():
        return stand_in
    n, c, h, w = x.shape
    k, m = conv.weight.shape[0], n * h * w
    count = -(-m // tile.block_m) * (k // tile.block_n)
    programs = min(count, tile.persistent * gpu_of(x.device).multiprocessors)
    launch = Launch(
        _conv_ring_kernel,
        (programs,),
        (
            matrix_box(conv.weight, k, c, (tile.block_n, WIDTH)),
            *layer_vectors(conv),
            *(count, c, k, eps_of(conv.norm), epilogue.relu),
            *(tile.num_stages, buffers_of(tile, residual=other is not None), programs),
        ),
        x.device,
        num_warps=tile.num_warps,
    )
    of_x, of_y = (Descriptors(matrix_box, m, channels, (tile.block_m, WIDTH)) for channels in (c, k))
    shape, options = conv.output_shape(x), {"dtype": x.dtype, "device": x.device}
    in_place = overwrite and other is not None

    def run(x, other):
        if unaligned(x, other):
            return stand_in(x, other)
        y = other if in_place else torch.empty(shape, **options, memory_format=torch.channels_last)
        launch(of_x(x), None if other is None else of_y(other), of_y(y))
        return y

    return run
