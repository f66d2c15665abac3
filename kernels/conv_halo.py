"""`conv_bn_act` for 3x3s of 64 channels, or in groups, on Hopper: taps from shared memory, filters that stay there.

The same arithmetic. Two programs a multiprocessor keep the filters of 64 channels, 72 KB, and take tile after tile; of
each they load the pixels with their halo (`halo`). While one of them waits for its pixels, the other one multiplies.
Groups of fewer channels share 64, with zeros between them, which are in shared memory alone.
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .boxes import Descriptors, unaligned
from .conv_tma import bind_conv_tma
from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu, scale_shift
from .gpu import gpu_of
from .halo import SIDE, WIDTH, boxes_of, by_boxes, join_groups
from .launch import Launch, interpreted
from .taps import (
    box_of,
    convolve,
    image_box,
    load_box,
    load_halo,
    matrix_box,
    spread_groups,
    tma_load,
    tma_store,
    view,
)
from .tiles import Tile


@gluon.jit
def _conv_halo_kernel(
    x_desc,  # [N, H, W, BLOCKS*C]
    edge_desc,  # the same, in boxes of two rows
    residual_desc,  # [N, H, W, BLOCKS*C], or None
    y_desc,  # [N, H, W, BLOCKS*C]
    w_desc,  # [BLOCKS*C, 9*C]; None for groups of fewer than C channels
    w_ptr,  # of these, [BLOCKS*C, 3, 3, PER_GROUP]
    bias_ptr,  # [BLOCKS*C], or None
    mean_ptr,  # [BLOCKS*C], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    TILES,
    TILES_P,  # boxes along rows and columns of an image
    TILES_Q,
    C: gl.constexpr,
    PER_GROUP: gl.constexpr,  # channels of a group
    BLOCKS: gl.constexpr,  # of C channels, each a convolution of its own
    EPS: gl.constexpr,
    APPLY_RELU: gl.constexpr,
    PROGRAMS: gl.constexpr,  # of a block
    PDL: gl.constexpr,  # see `dependent`
):
    """y = act(scale*conv(x, w) + shift [+ residual]); sums in fp32, rounded once, at the store."""
    ROWS: gl.constexpr = x_desc.block_shape[1]
    BLOCK_M: gl.constexpr = 8 * ROWS  # a row of a box is eight pixels
    RESIDUAL: gl.constexpr = residual_desc is not None
    dtype: gl.constexpr = x_desc.dtype
    MATRIX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])

    x_smem = gl.allocate_shared_memory(dtype, [3 * (ROWS + 2), 8, C], MATRIX)
    w_smem = gl.allocate_shared_memory(dtype, [9, C, C], MATRIX)
    y_smem = gl.allocate_shared_memory(dtype, [BLOCK_M, C], MATRIX)  # a residual comes, y leaves
    bars = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for bar in gl.static_range(3):
        mbarrier.init(bars.index(bar), count=1)
    fence_async_shared()
    c = gl.program_id(0) % BLOCKS * C
    if PER_GROUP < C:
        spread_groups(w_ptr, w_smem, c, PER_GROUP)
    else:
        mbarrier.expect(bars.index(0), 2 * 9 * C * C)
        for tap in gl.static_range(9):
            tma_load(w_desc, [c, tap * C], bars.index(0), w_smem.index(tap))

    tile = gl.program_id(0) // BLOCKS
    n, p, q = box_of(tile, TILES_P, TILES_Q, x_desc)
    wait_for_input(PDL)
    load_halo(x_desc, edge_desc, x_smem, bars.index(1), n, p, q, c, True)
    if RESIDUAL:
        load_box(residual_desc, [n, p, q, c], bars.index(2), y_smem, True)
    offs = c + gl.arange(0, C, gl.SliceLayout(0, MMA))
    scale, shift = scale_shift(
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs, offs < BLOCKS * C, EPS, tl.float32
    )
    zeros = gl.zeros([BLOCK_M, C], gl.float32, MMA)
    if PER_GROUP == C:
        mbarrier.wait(bars.index(0), 0)
    turn = 0
    while tile < TILES:
        tile += PROGRAMS  # the next one
        n_next, p_next, q_next = box_of(tile, TILES_P, TILES_Q, x_desc)
        mbarrier.wait(bars.index(1), turn & 1)
        acc = convolve(x_smem, w_smem, zeros, turn)
        load_halo(x_desc, edge_desc, x_smem, bars.index(1), n_next, p_next, q_next, c, tile < TILES)
        z = acc * scale[None, :] + shift[None, :]
        if RESIDUAL:
            mbarrier.wait(bars.index(2), turn & 1)
            z += y_smem.load(MMA).to(gl.float32)
        if APPLY_RELU:
            z = nan_relu(z)
        if not RESIDUAL:
            tma.store_wait(0)
        y_smem.store(z.to(dtype))
        fence_async_shared()
        tma_store(y_desc, [n, p, q, c], view(y_smem, y_desc.block_shape, y_desc.layout))
        if RESIDUAL:
            tma.store_wait(0)
            load_box(residual_desc, [n_next, p_next, q_next, c], bars.index(2), y_smem, tile < TILES)
        n, p, q = n_next, p_next, q_next
        turn += 1
    tma.store_wait(0)


def bind_conv_halo(x, conv, other, epilogue, tile: Tile, *, overwrite: bool = False):
    """Prepare `_conv_halo_kernel` for parameters and shapes; arguments and result are those of `bind_conv_bn_act`.

    A call with an activation that is no multiple of 16 bytes into its memory, and one in the interpreter, which knows
    no Gluon, runs `conv_tma`.

    Args:
        x, conv, other, epilogue: see `bind_conv_bn_act`; `halo.conv_refusal` must be None.
        tile: of 64 pixels and 64 channels; `persistent` programs a multiprocessor.
        overwrite: write the result over a residual.
    """
    n, channels, h, w = x.shape
    size = (n, h, w, channels)
    width = conv.weight.shape[1]
    like = [None if t is None else t.new_empty(()).expand(t.shape) for t in (x, other)]  # of no memory

    def bind_stand_in():
        joined = conv
        if width < WIDTH:
            weight = join_groups(conv.weight.detach(), conv.groups, WIDTH // width)
            joined = conv._replace(weight=weight, groups=channels // WIDTH)
        return bind_conv_tma(like[0], joined, like[1], epilogue, by_boxes(joined, tile), overwrite=overwrite)

    if interpreted():
        return bind_stand_in()
    stand_in = bind_stand_in() if width == WIDTH else None  # joined groups take memory
    parts = channels // WIDTH
    tiles, down, across = boxes_of(n, h, w)
    programs = min(tiles, max(1, tile.persistent * gpu_of(x.device).multiprocessors // parts))
    launch = Launch(
        _conv_halo_kernel,
        (programs * parts,),
        (
            None if width < WIDTH else matrix_box(conv.weight, channels, 9 * WIDTH, (WIDTH, WIDTH)),
            conv.weight if width < WIDTH else None,
            *layer_vectors(conv),
            *(tiles, down, across),
            *(WIDTH, width, parts, eps_of(conv.norm), epilogue.relu, programs),
        ),
        x.device,
        num_warps=tile.num_warps,
    )
    whole, edge = (Descriptors(image_box, size, rows) for rows in (SIDE, 2))
    in_place = overwrite and other is not None

    def run(x, other):
        nonlocal stand_in
        if unaligned(x, other):
            stand_in = stand_in or bind_stand_in()
            return stand_in(x, other)
        y = other if in_place else torch.empty_like(x, memory_format=torch.channels_last)
        launch(whole(x), edge(x), None if other is None else whole(other), whole(y))
        return y

    return run
