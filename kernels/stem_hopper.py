"""`stem` on Hopper: windows go from L1 straight into the registers that the matrix units read, the filter stays.

The same arithmetic on the same copy of the image. A thread of a warpgroup multiplies pixels g and g + 8 of sixteen:
here those are the two columns of the convolution of which a pooled pixel keeps the larger, and the sixteen of a warp
are eight pooled pixels, the first of them the one in front that the second needs. So the pool stays within a warp, and
28 pooled columns are a tile of 64: two of them are ResNet's 56. A row of the convolution shares five of its seven rows
of the image with the next one: their windows stay in registers, and the other two are asked for while products are
under way. 16-bit images and seven rows of a filter alone.
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .dependent import wait_for_input
from .epilogue import nan_relu, scale_shift
from .gpu import gpu_of
from .halo import WIDTH
from .launch import Launch
from .taps import tma_load

#: pooled columns of a tile
COLUMNS = 28


@gluon.jit
def _pixels(
    x,  # [64, TAPS], TAPS / 4 taps in a row a thread
    MMA: gl.constexpr,
):
    """The left factor of a product, its taps in another order so that no thread gives any away."""
    STEPS: gl.constexpr = x.shape[1] // 16
    x = x.reshape([64, 4, STEPS, 2, 2]).permute([0, 2, 3, 1, 4]).reshape(x.shape)
    return gl.convert_layout(x, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _column(
    q0,  # the pooled column in front of the tile
    warp,
    place,  # of eight, of which the first is what the warp before ends with
):
    """A pooled column of the tile."""
    return q0 + warp * 7 + place


@gluon.jit
def _row(
    x,  # seven rows of the image, each [64, TAPS] as `_pixels` gives it
    coming,  # [64, TAPS] pointers to the windows of the two rows behind them
    pitch,
    w_smem,  # [7, K, TAPS], its taps in the order of `matrix_order`
    norm,  # [2, K] scale and shift, which would take too many registers
    inside,  # [64] whether there is such a pixel
    zeros,  # [64, K]
):
    """A row of norm(conv), [64, K] in fp32, before the ReLU, 0 where there is no pixel; and the next row's seven."""
    MMA: gl.constexpr = zeros.type.layout
    acc = zeros
    for r in gl.static_range(7):
        acc = warpgroup_mma(x[r], w_smem.index(r).permute((1, 0)), acc, use_acc=r > 0, is_async=True)
    first, second = gl.load(coming), gl.load(coming + pitch)  # on their way while the products are
    acc = warpgroup_mma_wait(0, [acc])
    CHANNELS: gl.constexpr = gl.SliceLayout(0, MMA)
    z = acc * norm.index(0).load(CHANNELS)[None, :] + norm.index(1).load(CHANNELS)[None, :]
    x = (x[2], x[3], x[4], x[5], x[6], _pixels(first, MMA), _pixels(second, MMA))
    return gl.where(inside[:, None], z, 0.0), x


@gluon.jit
def _stem_hopper_kernel(
    x_ptr,  # [N, HEIGHT, WIDTH, 4] as `stem` leaves it
    y_ptr,  # [N, P2, Q2, CHANNELS]
    w_desc,  # [CHANNELS, 7*TAPS]
    bias_ptr,  # [CHANNELS], or None
    mean_ptr,  # [CHANNELS], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    P,  # rows and columns of the convolution's output
    Q,
    P2,  # of the pooled output
    Q2,
    HEIGHT,
    WIDTH,
    CHANNELS: gl.constexpr,
    TAPS: gl.constexpr,
    EPS: gl.constexpr,
    ROWS: gl.constexpr,  # pooled rows of a program
    COLUMNS: gl.constexpr,  # of a tile
    PIXELS: gl.constexpr,  # layout of the windows, see `_windows`
    PDL: gl.constexpr,  # see `dependent`
):
    """y = maxpool3x3(relu(scale*conv(x, w) + shift)), stride 2 and padding 1 of the pool; rounds once."""
    K: gl.constexpr = w_desc.block_shape[0]
    dtype: gl.constexpr = w_desc.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])

    w_smem = gl.allocate_shared_memory(dtype, [7, K, TAPS], w_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    k = gl.program_id(2) * K
    mbarrier.expect(bar, 2 * 7 * K * TAPS)
    for r in gl.static_range(7):
        tma_load(w_desc, [k, r * TAPS], bar, w_smem.index(r))

    tiles_q = gl.cdiv(Q2, COLUMNS)
    first = gl.program_id(0) // tiles_q * ROWS
    q0 = gl.program_id(0) % tiles_q * COLUMNS - 1  # the pooled column in front of the tile
    image = x_ptr + gl.program_id(1).to(gl.int64) * HEIGHT * WIDTH * 4
    pitch = WIDTH * 4
    last = HEIGHT - 2  # two rows can be read from here
    m = gl.arange(0, 64, gl.SliceLayout(1, PIXELS))
    q = 2 * _column(q0, m // 16, m % 8) + m // 8 % 2
    taps = gl.arange(0, TAPS, gl.SliceLayout(0, PIXELS))
    windows = image + (gl.minimum(gl.maximum(q, 0), Q - 1) * 8)[:, None] + taps[None, :]  # stride 2 of 4 channels
    m = gl.arange(0, 64, gl.SliceLayout(1, MMA))
    q = 2 * _column(q0, m // 16, m % 8) + m // 8 % 2
    inside = (q >= 0) & (q < Q)
    offs_k = k + gl.arange(0, K, gl.BlockedLayout([1], [32], [4], [0]))
    scale, shift = scale_shift(
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs_k, offs_k < CHANNELS, EPS, tl.float32
    )
    norm = gl.allocate_shared_memory(gl.float32, [2, K], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    norm.index(0).store(scale)
    norm.index(1).store(shift)
    j = gl.arange(0, 32, gl.SliceLayout(1, STORED))
    column = _column(q0, j // 8, j % 8)
    stored = ((j % 8 > 0) & (column < Q2))[:, None]
    targets = column[:, None] * CHANNELS + (k + gl.arange(0, K, gl.SliceLayout(0, STORED)))[None, :]
    out = y_ptr + gl.program_id(1).to(gl.int64) * P2 * Q2 * CHANNELS + targets
    zeros = gl.zeros([64, K], gl.float32, MMA)
    wait_for_input(PDL)
    row = gl.maximum(4 * first - 2, 0)  # of the image, where the next row of the convolution begins
    x = (_pixels(gl.load(windows + row * pitch), MMA),)
    for r in gl.static_range(1, 7):
        x = x + (_pixels(gl.load(windows + (row + r) * pitch), MMA),)  # noqa: RUF005  # Triton knows no starred tuple
    mbarrier.wait(bar, 0)
    above = gl.zeros([64, K], dtype, MMA)  # the last row of the convolution that the pooled row shares
    if first > 0:
        z, x = _row(x, windows + (row + 7) * pitch, pitch, w_smem, norm, inside, zeros)
        above = z.to(dtype)
        row += 2
    for i in range(first, gl.minimum(first + ROWS, P2)):
        z, x = _row(x, windows + gl.minimum(row + 7, last) * pitch, pitch, w_smem, norm, inside, zeros)
        z = gl.maximum(above, z.to(dtype), propagate_nan=tl.PropagateNan.ALL)
        row += 2
        there = inside & (2 * i + 1 < P)
        odd, x = _row(x, windows + gl.minimum(row + 7, last) * pitch, pitch, w_smem, norm, there, zeros)
        row += 2
        above = odd.to(dtype)
        z = gl.maximum(z, above, propagate_nan=tl.PropagateNan.ALL)
        left, right = z.reshape([4, 2, 8, K]).permute([0, 2, 3, 1]).split()
        z = gl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
        z = gl.maximum(z, _before(right, K), propagate_nan=tl.PropagateNan.ALL)
        z = gl.convert_layout(nan_relu(z).reshape([32, K]), STORED)
        gl.store(out + i * Q2 * CHANNELS, z, mask=stored)


@gluon.jit
def _before(right, K: gl.constexpr):
    """[4, 8, K]: along its second axis each element's forerunner; of the first itself."""
    LAYOUT: gl.constexpr = right.type.layout
    LINES: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    index = gl.maximum(gl.arange(0, 8, gl.SliceLayout(0, LINES)) - 1, 0)
    index = index[None, :, None] + gl.zeros([4, 8, K], gl.int32, LAYOUT)
    return gl.gather(right, index, 1)


def _windows(taps: int) -> gl.DistributedLinearLayout:
    """How threads hold windows `[64, taps]`: pixels as they multiply them, a quarter of the taps each."""
    own, bits = taps // 4, (taps // 4).bit_length() - 1
    registers = [[0, 1 << bit] for bit in range(bits)] + [[8, 0]]
    lanes = [[0, own], [0, 2 * own], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, taps])


def matrix_order(packed: torch.Tensor) -> torch.Tensor:
    """`[K, R, TAPS]` with the taps as the matrix units number those that `_windows` gives a thread.

    Of 16 factors in a step a thread has 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: those are four neighbours here.
    """
    k, r, taps = packed.shape
    return packed.view(k, r, 4, taps // 16, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(k, r, taps).contiguous()


def choose_rows(programs: int, rows: int, multiprocessors: int) -> int:
    """Pooled rows of a program: as many as keep the last wave of programs short.

    Args:
        programs: for each range of rows.
        rows: of the pooled output.
        multiprocessors: of the chip; each holds two programs.
    """

    def steps(count: int) -> int:  # rows of the convolution one after another; to begin takes as long as three
        waves = -(-programs * -(-rows // count) // (2 * multiprocessors))
        return waves * (2 * count + 4)

    return min(range(1, 17), key=steps)


def launch_of(packed: torch.Tensor, norm: tuple, eps: float, sizes: tuple[int, ...], images: int) -> Launch:
    """The kernel for `packed` weights as `pack_weight` gives them.

    Args:
        packed: `[K, R, TAPS]`; `K` a multiple of 64.
        norm: bias, mean, variance, gamma and beta, each a tensor or None.
        eps: of the norm.
        sizes: P, Q, P2, Q2, HEIGHT, WIDTH.
        images: N.
    """
    k, r, taps = packed.shape
    _, _, p2, q2, _, _ = sizes
    across = -(-q2 // COLUMNS)
    rows = choose_rows(across * images * (k // WIDTH), p2, gpu_of(packed.device).multiprocessors)
    swizzle = gl.NVMMASharedLayout(swizzle_byte_width=2 * taps, element_bitwidth=16, rank=2)
    ordered = matrix_order(packed)
    filters = TensorDescriptor(ordered, [k, r * taps], [r * taps, 1], [WIDTH, taps], swizzle)
    return Launch(
        _stem_hopper_kernel,
        (-(-p2 // rows) * across, images, k // WIDTH),
        (filters, *norm, *sizes, k, taps, eps, rows, COLUMNS, _windows(taps)),
        packed.device,
        num_warps=4,
    )
