"""Convolution, batch norm, residual add and ReLU in one pass over the output.

Eager PyTorch writes the convolution's result, reads and writes it again for the batch norm, again (with the residual)
for the add and again for the ReLU. Here the accumulator tile becomes the block's output before it leaves the
registers: the activations are read once and the output is written once. With a second GEMM the downsample branch of a
stage's first block is accumulated beside the same tile and never written at all.

The convolution is an implicit GEMM over channels_last memory: M = N*P*Q output pixels, N = output channels,
K = input channels for each of the R*S taps. Activations are `[N, H, W, C]`, weights `[K, R, S, C]` in memory. Where M
and N make too few programs for the GPU, the loop over taps and channels is split among several (split-K): each writes
its sum, and `bn_act` adds them in a fixed order and applies the epilogue.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bn_act import bind_bn_act
from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu, scale_shift, strided_rows
from .launch import Launch, accumulator, dot_precision, interpreted
from .tiles import Tile


@triton.jit
def _conv_bn_act_kernel(
    x_ptr,  # [N, H, W, GROUPS*C]
    other_ptr,  # residual [N, H2, W2, GROUPS*K]; with SECOND the second convolution's input [N, H2, W2, C2]; or None
    y_ptr,  # [M, GROUPS*K]; with SPLIT > 1 the partial sums [SPLIT, M, GROUPS*K] in ACC
    w_ptr,  # [GROUPS*K, R, S, C]
    bias_ptr,  # [GROUPS*K], or None
    mean_ptr,  # [GROUPS*K], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    w2_ptr,  # [GROUPS*K, C2] of the second convolution, or None
    bias2_ptr,
    mean2_ptr,
    var2_ptr,
    gamma2_ptr,
    beta2_ptr,
    M,
    H,
    W,
    P,
    Q,
    H2,
    W2,
    C: tl.constexpr,  # input channels of a group
    K: tl.constexpr,  # output channels of a group
    C2: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    STRIDE2: tl.constexpr,  # of the residual, or of the second convolution
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    SECOND: tl.constexpr,  # whether `other` is convolved
    APPLY_RELU: tl.constexpr,
    SPLIT: tl.constexpr,  # programs that share the loop over taps and channels of a tile
    ACC: tl.constexpr,  # fp32; fp64 for fp64 inputs
    PRECISION: tl.constexpr,  # of an fp32 dot: "tf32" or "ieee"
    UPCAST: tl.constexpr,  # the interpreter has no bf16 dot
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,  # see `dependent`
):
    """y = act(scale*conv(x, w) + shift [+ residual | + scale2*conv1x1(other, w2) + shift2]).

    Accumulates in ACC and rounds once, at the store.
    """
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    pid_n = pid % (tiles_n * GROUPS)  # neighbours share their rows of x in L2
    group = pid_n // tiles_n
    offs_m = (pid // (tiles_n * GROUPS)) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid_n % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < K
    out_channels = group * K + offs_n

    # [BLOCK_M] first tap of every output pixel: (h0, w0) may lie in the padding
    pointwise: tl.constexpr = R == 1 and S == 1 and PAD_H == 0 and PAD_W == 0
    if pointwise and STRIDE_H == STRIDE_W:
        rows = strided_rows(offs_m, H, W, P, Q, STRIDE_H)
        h0 = tl.zeros((BLOCK_M,), tl.int32)
        w0 = tl.zeros((BLOCK_M,), tl.int32)
    else:
        h0 = ((offs_m // Q) % P) * STRIDE_H - PAD_H
        w0 = (offs_m % Q) * STRIDE_W - PAD_W
        rows = ((offs_m // (P * Q)).to(tl.int64) * H + h0) * W + w0
    x_rows = x_ptr + rows[:, None] * (GROUPS * C) + group * C + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    w_cols = w_ptr + out_channels[None, :].to(tl.int64) * (R * S * C) + offs_k[:, None]  # [BLOCK_K, BLOCK_N]

    steps: tl.constexpr = R * S * ((C + BLOCK_K - 1) // BLOCK_K)
    share: tl.constexpr = (steps + SPLIT - 1) // SPLIT
    begin = 0
    end = steps
    if SPLIT > 1:
        begin = tl.program_id(1) * share
        end = min(begin + share, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    wait_for_input(PDL)
    for step in range(begin, end):
        # all taps of a channel block before the next block: the taps' overlap is still in cache
        c = (step // (R * S)) * BLOCK_K
        tap = step % (R * S)
        r = tap // S
        s = tap % S
        x_mask = mask_m[:, None]
        if not pointwise:
            h = h0 + r * DIL_H
            w = w0 + s * DIL_W
            x_mask = x_mask & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        w_mask = mask_n[None, :]
        if C % BLOCK_K != 0:
            x_mask = x_mask & (offs_k < C - c)[None, :]
            w_mask = w_mask & (offs_k < C - c)[:, None]
        x = tl.load(x_rows + ((r * DIL_H * W + s * DIL_W) * (GROUPS * C) + c), mask=x_mask, other=0.0)
        w = tl.load(w_cols + (tap * C + c), mask=w_mask, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)

    out_mask = mask_m[:, None] & mask_n[None, :]
    y_rows = y_ptr + offs_m[:, None].to(tl.int64) * (GROUPS * K) + out_channels[None, :]
    if SPLIT > 1:
        tl.store(y_rows + tl.program_id(1).to(tl.int64) * M * (GROUPS * K), acc, mask=out_mask)
    else:
        scale, shift = scale_shift(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, out_channels, mask_n, EPS, ACC)
        z = acc * scale[None, :] + shift[None, :]
        if other_ptr is not None:
            rows2 = strided_rows(offs_m, H2, W2, P, Q, STRIDE2)
            if SECOND:
                x2_rows = other_ptr + rows2[:, None] * C2 + offs_k[None, :]
                w2_cols = w2_ptr + out_channels[None, :].to(tl.int64) * C2 + offs_k[:, None]
                acc2 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
                for c in range(0, C2, BLOCK_K):
                    x_mask = mask_m[:, None]
                    w_mask = mask_n[None, :]
                    if C2 % BLOCK_K != 0:
                        x_mask = x_mask & (offs_k < C2 - c)[None, :]
                        w_mask = w_mask & (offs_k < C2 - c)[:, None]
                    x = tl.load(x2_rows + c, mask=x_mask, other=0.0)
                    w = tl.load(w2_cols + c, mask=w_mask, other=0.0)
                    if UPCAST:
                        x = x.to(tl.float32)
                        w = w.to(tl.float32)
                    acc2 = tl.dot(x, w, acc2, input_precision=PRECISION, out_dtype=ACC)
                scale2, shift2 = scale_shift(
                    bias2_ptr, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, out_channels, mask_n, EPS2, ACC
                )
                z += acc2 * scale2[None, :] + shift2[None, :]
            else:
                residual = other_ptr + rows2[:, None] * (GROUPS * K) + out_channels[None, :]
                z += tl.load(residual, mask=out_mask, other=0.0).to(ACC)
        if APPLY_RELU:
            z = nan_relu(z)
        tl.store(y_rows, z.to(y_ptr.dtype.element_ty), mask=out_mask)


def bind_conv_bn_act(x, conv, other, epilogue, tile: Tile):
    """Prepare `_conv_bn_act_kernel` for parameters and shapes; see `fused_resblock.functional.conv_bn_act`.

    Args:
        x: an example of the input `[N, C, H, W]`, channels_last.
        conv: a `fused_resblock.params.Conv` whose weight is channels_last.
        other: an example of the residual `[N, K, H2, W2]`, of the shortcut's input `[N, C2, H2, W2]`, or None.
        epilogue: a `fused_resblock.params.Epilogue`; its shortcut is the second GEMM.
        tile: with `persistent` 0; with a shortcut its loop is not split.

    Returns:
        A function of x and other, alike in shape and channels_last, that gives y.
    """
    n, _, h, w = x.shape
    k, c, r, s = conv.weight.shape
    groups = conv.groups
    p, q = conv.output_size(h, w)
    m = n * p * q
    branch = epilogue.shortcut
    split = tile.split_k if branch is None else 1
    weight2, norm2 = (None, None) if branch is None else (branch.weight, branch.norm)
    h2, w2 = (1, 1) if other is None else other.shape[2:]
    launch = Launch(
        _conv_bn_act_kernel,
        (triton.cdiv(m, tile.block_m) * triton.cdiv(k // groups, tile.block_n) * groups, split),
        (
            *(conv.weight, *layer_vectors(conv)),
            *(weight2, *layer_vectors(branch)),
            *(m, h, w, p, q, h2, w2),
            *(c, k // groups, 1 if branch is None else branch.weight.shape[1], groups, r, s),
            *(*conv.stride, *conv.padding, *conv.dilation),
            epilogue.residual_stride if branch is None else branch.stride[0],
            *(eps_of(conv.norm), eps_of(norm2)),
            *(branch is not None, epilogue.relu, split),
            *(accumulator(x.dtype), dot_precision(x.dtype), interpreted() and x.dtype == torch.bfloat16),
            *(tile.block_m, tile.block_n, tile.block_k),
        ),
        x.device,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    empty = {"device": x.device, "memory_format": torch.channels_last}
    dtype, size = x.dtype, (n, k, p, q)
    if split == 1:

        def run(x, other):
            y = torch.empty(size, dtype=dtype, **empty)
            launch(x, other, y)
            return y

        return run
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    partial_size = (split * n, k, p, q)
    finish = bind_bn_act(size, dtype, conv.norm, other, epilogue, bias=conv.bias, partials=split, device=x.device)

    def run_split(x, other):
        partial = torch.empty(partial_size, dtype=wide, **empty)
        launch(x, None, partial)
        return finish(partial, other)

    return run_split
