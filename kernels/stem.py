"""The stem of a ResNet in one pass: a strided convolution of 3 channels, batch norm, ReLU and 3x3 max-pool.

Between kernels the stem is expensive: its convolution's output has four times the pixels of the pooled one and sixteen
times the bytes of the image, and is written and read by the norm, the ReLU and the pool in turn. Here it stays in
registers: a program computes rows of the convolution one by one and keeps the maximum of three.

Three channels are a poor fit for 16-byte loads. A small kernel first copies the image, whatever its layout, into
`[N, H + padding, W + padding, 4]` with zeros around it. With stride 2 the filter's window in a row then begins at a
multiple of 16 bytes, and its `S` columns (and one in front of them, of weight 0, where the padding is odd) are one
contiguous run: an implicit GEMM with K = 4 * columns for each row of the filter, without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu, scale_shift
from .gpu import gpu_of
from .launch import Launch, accumulator, dot_precision, interpreted
from .pool import is_stem_pool
from .tiles import StemTile

LANES = 4  # channels of the copy


@triton.jit
def _pack_kernel(
    x_ptr,  # [N, C, H, W] of any strides
    y_ptr,  # [N, HEIGHT, WIDTH, 4]
    H,
    W,
    HEIGHT,
    WIDTH,
    STRIDE_N,
    STRIDE_C,
    STRIDE_H,
    STRIDE_W,
    C: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,  # see `dependent`
):
    """y[n, TOP + h, LEFT + w, c] = x[n, c, h, w]; 0 around it and behind its channels."""
    row = tl.program_id(0)  # of all images' rows
    n = (row // HEIGHT).to(tl.int64)
    h = row % HEIGHT - TOP
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w = columns - LEFT
    c = tl.arange(0, 4)
    inside = (w >= 0) & (w < tl.where((h >= 0) & (h < H), W, 0))  # no column, where the row is outside
    offs = n * STRIDE_N + h.to(tl.int64) * STRIDE_H + w[:, None] * STRIDE_W + c[None, :] * STRIDE_C
    wait_for_input(PDL)
    x = tl.load(x_ptr + offs, mask=inside[:, None] & (c < C)[None, :], other=0.0)
    target = (row.to(tl.int64) * WIDTH + columns[:, None]) * 4 + c[None, :]
    tl.store(y_ptr + target, x, mask=(columns < WIDTH)[:, None])


@triton.jit
def _row(
    x_rows,  # [BLOCK_Q, TAPS] pointers to the windows of a row of pixels, for the filter's first row
    w_cols,  # [TAPS, BLOCK_K] pointers to the filter's first row
    mask_q,  # [BLOCK_Q]
    scale,  # [BLOCK_K]
    shift,
    PITCH,  # elements of a row of the copy
    R: tl.constexpr,
    TAPS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A row of relu(norm(conv)), [BLOCK_Q, BLOCK_K] in KEPT; 0 where there is no pixel."""
    acc = tl.zeros((BLOCK_Q, BLOCK_K), ACC)
    for r in tl.range(0, R, num_stages=1):  # plain loads: the windows overlap, and L1 holds them
        x = tl.load(x_rows + r * PITCH, mask=mask_q[:, None], other=0.0)
        w = tl.load(w_cols + r * TAPS)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
    z = nan_relu(acc * scale[None, :] + shift[None, :])
    return tl.where(mask_q[:, None], z, 0.0).to(KEPT)


@triton.jit
def _stem_kernel(
    x_ptr,  # [N, HEIGHT, WIDTH, 4] as `_pack_kernel` leaves it
    y_ptr,  # [N, P2, Q2, K]
    w_ptr,  # [K, R, TAPS], TAPS = 4 * columns of the window
    bias_ptr,  # [K], or None
    mean_ptr,  # [K], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    P,  # rows and columns of the convolution's output
    Q,
    P2,  # of the pooled output
    Q2,
    HEIGHT,
    WIDTH,
    K: tl.constexpr,
    R: tl.constexpr,
    TAPS: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,  # fp32; fp64 for fp64 inputs
    PRECISION: tl.constexpr,  # of an fp32 dot: "tf32" or "ieee"
    UPCAST: tl.constexpr,  # the interpreter has no bf16 dot
    KEPT: tl.constexpr,  # type in which rows are kept: y's, since rounding does not change which one is the largest
    ROWS: tl.constexpr,  # pooled rows of a program
    BLOCK_Q: tl.constexpr,  # columns of the convolution's output, two for each pooled one and two in front
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,  # see `dependent`
):
    """y = maxpool3x3(relu(scale*conv(x, w) + shift)), stride 2 and padding 1 of the pool.

    ReLU leaves nothing below 0, so 0 stands for what lies outside. Rounds once.
    """
    n = tl.program_id(1).to(tl.int64)
    half: tl.constexpr = BLOCK_Q // 2
    tiles_q = tl.cdiv(Q2, half - 1)
    first = (tl.program_id(0) // tiles_q) * ROWS
    q0 = (tl.program_id(0) % tiles_q) * (half - 1) - 1  # pooled column of the tile's first pair
    offs_q = 2 * q0 + tl.arange(0, BLOCK_Q)
    offs_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    taps = tl.arange(0, TAPS)
    mask_q = (offs_q >= 0) & (offs_q < Q)
    scale, shift = scale_shift(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs_k, offs_k < K, EPS, ACC)
    pitch = WIDTH * 4
    x_rows = x_ptr + n * HEIGHT * pitch + offs_q[:, None] * 8 + taps[None, :]  # stride 2 of 4 channels
    w_cols = w_ptr + offs_k[None, :] * (R * TAPS) + taps[:, None]
    pooled_q = q0 + tl.arange(0, half)
    mask = ((tl.arange(0, half) > 0) & (pooled_q < Q2))[:, None] & (offs_k < K)[None, :]
    before = tl.maximum(tl.arange(0, half) - 1, 0)[:, None].broadcast_to(half, BLOCK_K)
    wait_for_input(PDL)
    above = tl.zeros((BLOCK_Q, BLOCK_K), KEPT)  # the last row of the convolution that the pooled row shares
    if first > 0:
        rows = x_rows + (2 * first - 1) * 2 * pitch
        above = _row(rows, w_cols, mask_q, scale, shift, pitch, R, TAPS, ACC, PRECISION, UPCAST, KEPT, BLOCK_Q, BLOCK_K)
    for i in range(first, min(first + ROWS, P2)):
        rows = x_rows + 4 * i * pitch
        even = _row(rows, w_cols, mask_q, scale, shift, pitch, R, TAPS, ACC, PRECISION, UPCAST, KEPT, BLOCK_Q, BLOCK_K)
        z = tl.maximum(above, even, propagate_nan=tl.PropagateNan.ALL)
        rows = rows + 2 * pitch
        there = mask_q & (tl.full((BLOCK_Q,), 2 * i + 1, tl.int32) < P)  # a block: Triton 3.9 interprets no scalar mask
        above = _row(rows, w_cols, there, scale, shift, pitch, R, TAPS, ACC, PRECISION, UPCAST, KEPT, BLOCK_Q, BLOCK_K)
        z = tl.maximum(z, above, propagate_nan=tl.PropagateNan.ALL)
        left, right = tl.split(tl.permute(tl.reshape(z, (half, 2, BLOCK_K)), (0, 2, 1)))
        z = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
        z = tl.maximum(z, tl.gather(right, before, 0), propagate_nan=tl.PropagateNan.ALL)
        offs = ((n * P2 + i) * Q2 + pooled_q[:, None]) * K + offs_k[None, :]
        tl.store(y_ptr + offs, z.to(y_ptr.dtype.element_ty), mask=mask)


def refusal(conv, relu: bool, pool) -> str | None:
    """Why the kernels cannot run a stem; None when they can.

    Args:
        conv: a `fused_resblock.params.Conv`.
        relu: whether a ReLU stands between norm and pool.
        pool: kernel size, stride, padding, dilation and ceil_mode of the max-pool, each a number or a pair.
    """
    k, c, r, s = conv.weight.shape
    if not is_stem_pool(pool):
        return "not a 3x3 max-pool of stride 2"
    if not relu:
        return "no ReLU in front of the pool"
    if c > LANES or conv.groups != 1 or conv.stride != (2, 2) or conv.dilation != (1, 1):
        return "not a convolution of stride 2 on at most 4 channels"
    if max(r, s) > 15:
        return "a filter wider than 15"
    if k % 16 or (k % 64 if k > 64 else k & (k - 1)):
        return "output channels that are neither 16, 32 nor a multiple of 64"
    return None


def pack_weight(weight: torch.Tensor, odd: bool) -> torch.Tensor:
    """`[K, R, columns * 4]` of a filter `[K, C, R, S]`: columns padded to a power of two, in front by one if `odd`."""
    k, c, r, s = weight.shape
    columns = triton.next_power_of_2(max(s + odd, 4))
    packed = weight.new_zeros(k, r, columns, LANES)
    packed[:, :, int(odd) : s + int(odd), :c] = weight.permute(0, 2, 3, 1)
    return packed.reshape(k, r, columns * LANES)


def _kept(dtype: torch.dtype) -> tl.dtype:
    """A Triton type for `KEPT`; the interpreter computes in bf16 by way of fp32."""
    if dtype == torch.bfloat16 and interpreted():
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, accumulator(dtype))


def _on_hopper(x, packed) -> bool:
    """Whether `stem_hopper` runs: 16-bit values, blocks of 64 output channels, a filter of seven rows and columns."""
    k, r, taps = packed.shape
    fits = x.element_size() == 2 and k % 64 == 0 and (r, taps) == (7, 32)
    return fits and not interpreted() and gpu_of(x.device).gluon


def _launch_of(dtype: torch.dtype, packed, norm, eps: float, sizes, images: int, tile: StemTile) -> Launch:
    """`_stem_kernel` for packed weights; see `stem_hopper.launch_of`."""
    k, r, taps = packed.shape
    _, _, p2, q2, _, _ = sizes
    half = min(tile.pooled_columns, max(16, triton.next_power_of_2(q2 + 1)))
    block_k = min(64, triton.next_power_of_2(k))
    return Launch(
        _stem_kernel,
        (triton.cdiv(p2, tile.pooled_rows) * triton.cdiv(q2, half - 1), images, triton.cdiv(k, block_k)),
        (
            packed,
            *norm,
            *sizes,
            *(k, r, taps, eps),
            *(accumulator(dtype), dot_precision(dtype), interpreted() and dtype == torch.bfloat16),
            _kept(dtype),
            *(tile.pooled_rows, 2 * half, block_k),
        ),
        packed.device,
        num_warps=tile.num_warps,
        num_stages=1,
    )


def bind_stem(x, conv, packed, tile: StemTile | None = None):
    """Prepare the two kernels for parameters and shapes.

    Args:
        x: an example of the image `[N, C, H, W]`, of any layout.
        conv: a `fused_resblock.params.Conv` that `refusal` takes.
        packed: its weight as `pack_weight` gives it, with `odd` where its column padding is odd.
        tile: how to run the second kernel; None for the usual.

    Returns:
        A function of x that gives `[N, K, P2, Q2]`, channels_last.
    """
    n, c, height, width = x.shape
    k, r, taps = packed.shape
    p, q = conv.output_size(height, width)
    p2, q2 = (p - 1) // 2 + 1, (q - 1) // 2 + 1
    top, left = conv.padding[0], conv.padding[1] + conv.padding[1] % 2
    rows_in = max(height + 2 * top, 2 * (p - 1) + r)
    columns_in = max(width + 2 * left, 2 * (q - 1) + taps // LANES)
    columns_in += -columns_in % 16  # rows begin at multiples of 16 bytes, and the compiler knows
    pack = Launch(
        _pack_kernel,
        (n * rows_in, triton.cdiv(columns_in, 256)),
        (height, width, rows_in, columns_in, *x.stride(), c, top, left, 256),
        x.device,
        num_warps=4,
    )
    norm = layer_vectors(conv)
    sizes = p, q, p2, q2, rows_in, columns_in
    if tile is None and _on_hopper(x, packed):
        from .stem_hopper import launch_of

        launch = launch_of(packed, norm, eps_of(conv.norm), sizes, n)
    else:
        launch = _launch_of(x.dtype, packed, norm, eps_of(conv.norm), sizes, n, tile or StemTile())
    like = {"dtype": x.dtype, "device": x.device}

    def run(x, _=None):
        copy = torch.empty((n, rows_in, columns_in, LANES), **like)
        pack(x, copy)
        y = torch.empty((n, k, p2, q2), memory_format=torch.channels_last, **like)
        launch(copy, y)
        return y

    return run
