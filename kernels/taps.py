"""Taps of a 3x3 from shared memory, and what else the Gluon kernels share: those of `halo`, and those of `ring`.

Only Gluon lets a kernel say where its operands lie. It is an experimental part of Triton, so that this is imported
where `Gpu.gluon` says that its release is known; and it has no interpreter, so that the tests run the compiled code
(`benchmarks.emulate`).
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .boxes import Box, strided_view
from .gpu import triton_release
from .halo import SIDE, WIDTH

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.8
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


def _plain(value):
    return value.value if isinstance(value, gl.constexpr) else value


@builtin
def view(memory, shape, layout, _semantic=None):
    """A block of shared memory, seen as `shape` in `layout`."""
    shape = [_plain(size) for size in _plain(shape)]
    return _semantic.memdesc_reinterpret(memory, memory.dtype, shape, _plain(layout))


@builtin
def blocks(memory, first, count, zero=0, _semantic=None):
    """`count` blocks of shared memory from `first` on, along its first axis, for a `view` of them.

    Triton before 3.8 slices by powers of two alone and lets a view go on behind its block; later ones do not, and know
    where a slice begins without `unknown_zero`.
    """
    first, count = _plain(first), _plain(count)
    if triton_release() < (3, 8):
        return _semantic.memdesc_index(
            memory, _semantic.add(_semantic.to_tensor(first), _semantic.to_tensor(zero), True)
        )
    return _semantic.memdesc_slice(memory, first, count, 0)


@gluon.jit
def unknown_zero(value):
    """0, of which the compiler knows nothing: what is addressed with it stays in the loop.

    Else the operands' descriptors, two registers each, are formed ahead of it and do not fit.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [value], gl.int32, is_pure=False, pack=1)


@gluon.jit
def box_of(
    tile,
    TILES_P,  # boxes along rows and columns of an image
    TILES_Q,
    desc,  # of images, in such boxes
):
    """Image, first row and first column of a tile."""
    n = tile // (TILES_Q * TILES_P)
    p = (tile // TILES_Q % TILES_P) * desc.block_shape[1]
    q = (tile % TILES_Q) * desc.block_shape[2]
    return n, p, q


@gluon.jit
def strided_box_of(
    tile,
    TILES_P,  # boxes along rows and columns of an image
    TILES_Q,
    desc,  # of images, in such boxes; see `strided_box`
):
    """First image, row and column of a tile."""
    n = tile // (TILES_Q * TILES_P) * desc.block_shape[0]
    p = tile // TILES_Q % TILES_P * desc.block_shape[1]
    q = tile % TILES_Q * desc.block_shape[3]
    return n, p, q


@gluon.jit
def load_box(desc, coordinates, bar, memory, wanted):
    """Ask for a box, if it is wanted; the barrier tells when it has come."""
    mbarrier.expect(bar, desc.block_type.nbytes, pred=wanted)
    tma_load(desc, coordinates, bar, view(memory, desc.block_shape, desc.layout), pred=wanted)


@gluon.jit
def load_halo(
    x_desc,  # [N, H, W, C], in boxes as they are computed
    edge_desc,  # the same, in boxes of two rows
    x_smem,  # [3*(ROWS + 2), 8, C]: rows of the shifted boxes
    bar,
    n,
    p,
    q,
    c,  # first channel
    wanted,  # whether there is such a tile
):
    """Ask for a tile's pixels with their halo, three times: one column to the left, as they are, one to the right."""
    ROWS: gl.constexpr = x_desc.block_shape[1]
    mbarrier.expect(bar, 3 * (x_desc.block_type.nbytes + edge_desc.block_type.nbytes), pred=wanted)
    for s in gl.static_range(3):
        above = blocks(x_smem, s * (ROWS + 2), ROWS)
        below = blocks(x_smem, s * (ROWS + 2) + ROWS, 2)
        tma_load(x_desc, [n, p - 1, q + s - 1, c], bar, view(above, x_desc.block_shape, x_desc.layout), pred=wanted)
        below = view(below, edge_desc.block_shape, edge_desc.layout)
        tma_load(edge_desc, [n, p + ROWS - 1, q + s - 1, c], bar, below, pred=wanted)


@gluon.jit
def spread_groups(
    w_ptr,  # [K, 3, 3, PER_GROUP]
    w_smem,  # [9, C, C]
    first,  # output channel
    PER_GROUP: gl.constexpr,  # channels of a group, in and out; divides C
):
    """The filters of C channels in groups, with zeros between these.

    w_smem[tap, k, c] = w[first + k, tap, c % PER_GROUP] where k and c are of one group.
    """
    C: gl.constexpr = w_smem.shape[2]
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // C, C // 8], [gl.num_warps(), 1], [1, 0])
    k = gl.arange(0, C, gl.SliceLayout(1, LOADED))
    c = gl.arange(0, C, gl.SliceLayout(0, LOADED))
    own = (k // PER_GROUP)[:, None] == (c // PER_GROUP)[None, :]
    rows = w_ptr + ((first + k) * (9 * PER_GROUP))[:, None] + (c % PER_GROUP)[None, :]
    for tap in gl.static_range(9):
        w_smem.index(tap).store(gl.load(rows + tap * PER_GROUP, mask=own, other=0.0))
    fence_async_shared()


@gluon.jit
def convolve(
    x_smem,  # as `load_halo` fills it
    w_smem,  # [9, K, C]
    acc,  # [8*ROWS, K], to be written over
    turn,  # any number
):
    """The 3x3 of a tile: nine products of what lies in shared memory."""
    BLOCK_M: gl.constexpr = acc.shape[0]
    HEIGHT: gl.constexpr = x_smem.shape[0] // 3  # of a box with its halo
    zero = unknown_zero(turn)
    for tap in gl.static_range(9):
        rows = blocks(x_smem, tap % 3 * HEIGHT + tap // 3, HEIGHT - 2, zero)
        x = view(rows, [BLOCK_M, w_smem.shape[2]], w_smem.layout)
        acc = warpgroup_mma(x, w_smem.index(tap + zero).permute((1, 0)), acc, use_acc=tap > 0, is_async=True)
    return warpgroup_mma_wait(0, [acc])


@gluon.jit
def columns(acc, PARTS: gl.constexpr):
    """The columns of a matrix in so many pieces, side by side; they stay in their registers."""
    if PARTS == 1:
        return (acc,)
    else:  # what follows a return is compiled as well
        left, right = acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute((0, 2, 1)).split()
        return columns(left, PARTS // 2) + columns(right, PARTS // 2)


def swizzled(rank: int) -> gl.NVMMASharedLayout:
    """How 16-bit channels lie in shared memory: in pieces of 64, which are 128 bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def image_box(x: torch.Tensor, size: tuple[int, int, int, int], rows: int, parts: int = 1):
    """A descriptor of channels_last images of `(N, H, W, C)`: boxes of `rows` rows, 8 columns, `64*parts` channels."""
    n, h, w, c = size
    block = [1, rows, SIDE, parts * WIDTH]
    return TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], block, swizzled(4))


def strided_box(
    x: torch.Tensor, size: tuple[int, int, int, int], stride: int, box: Box, channels: int = WIDTH
) -> TensorDescriptor:
    """A descriptor of channels_last images of `(N, H, W, C)` in boxes of some channels; see `boxes.image_box`."""
    block = [box.images, box.rows, 1, box.columns, channels]
    return TensorDescriptor(x, *strided_view(size, stride), block, swizzled(5))


def matrix_box(weight: torch.Tensor, rows: int, columns: int, block: tuple[int, int]):
    """A descriptor of a weight seen as a row-major matrix, in blocks of 64 columns or a multiple."""
    return TensorDescriptor(weight, [rows, columns], [columns, 1], list(block), swizzled(2))
