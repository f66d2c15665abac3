"""Convolution, batch norm, residual add and ReLU in one pass over the output.

Eager PyTorch writes the convolution's result, reads and writes it again for the batch norm, again (with the residual)
for the add and again for the ReLU. Here the accumulator tile becomes the block's output before it leaves the
registers: the activations are read once and the output is written once. With a second GEMM the downsample branch of a
stage's first block is accumulated beside the same tile and never written at all.

The convolution is an implicit GEMM over channels_last memory: M = N*P*Q output pixels, N = output channels,
K = input channels for each of the R*S taps. Activations are `[N, H, W, C]`, weights `[K, R, S, C]` in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..params import PLAIN
from .epilogue import nan_relu, scale_shift, strided_rows
from .launch import accumulator, device_of, dot_precision, gpu_of, interpreted
from .tiles import Tile, choose_tile


@triton.jit
def _conv_bn_act_kernel(
    x_ptr,  # [N, H, W, GROUPS*C]
    w_ptr,  # [GROUPS*K, R, S, C]
    bias_ptr,  # [GROUPS*K], or None
    mean_ptr,  # [GROUPS*K], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    residual_ptr,  # [N, H2, W2, GROUPS*K], or None
    x2_ptr,  # [N, H2, W2, C2] input of the second, 1x1 convolution, or None
    w2_ptr,  # [GROUPS*K, C2]
    bias2_ptr,
    mean2_ptr,
    var2_ptr,
    gamma2_ptr,
    beta2_ptr,
    y_ptr,  # [M, GROUPS*K]
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
    APPLY_RELU: tl.constexpr,
    ACC: tl.constexpr,  # fp32; fp64 for fp64 inputs
    PRECISION: tl.constexpr,  # of an fp32 dot: "tf32" or "ieee"
    UPCAST: tl.constexpr,  # the interpreter has no bf16 dot
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = act(scale*conv(x, w) + shift [+ residual | + scale2*conv1x1(x2, w2) + shift2]).

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

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(R * S * ((C + BLOCK_K - 1) // BLOCK_K)):
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

    scale, shift = scale_shift(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, out_channels, mask_n, EPS, ACC)
    z = acc * scale[None, :] + shift[None, :]
    out_mask = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        rows2 = strided_rows(offs_m, H2, W2, P, Q, STRIDE2)
        residual = residual_ptr + rows2[:, None] * (GROUPS * K) + out_channels[None, :]
        z += tl.load(residual, mask=out_mask, other=0.0).to(ACC)
    if x2_ptr is not None:
        rows2 = strided_rows(offs_m, H2, W2, P, Q, STRIDE2)
        x2_rows = x2_ptr + rows2[:, None] * C2 + offs_k[None, :]
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
    if APPLY_RELU:
        z = nan_relu(z)
    y_rows = y_ptr + offs_m[:, None].to(tl.int64) * (GROUPS * K) + out_channels[None, :]
    tl.store(y_rows, z.to(y_ptr.dtype.element_ty), mask=out_mask)


def conv_bn_act(x, conv, other=None, epilogue=PLAIN, tile: Tile | None = None):
    """Launch `_conv_bn_act_kernel`; see `fused_resblock.functional.conv_bn_act` for the operation.

    Args:
        x: `[N, C, H, W]` channels_last.
        conv: a `fused_resblock.params.Conv` whose weight is channels_last.
        other: channels_last: the residual `[N, K, H2, W2]`, the shortcut's input `[N, C2, H2, W2]`, or None.
        epilogue: a `fused_resblock.params.Epilogue`; its shortcut is the second GEMM.
        tile: None lets `choose_tile` pick.
    """
    n, _, h, w = x.shape
    k, c, r, s = conv.weight.shape
    p, q = conv.output_size(h, w)
    m = n * p * q
    groups = conv.groups
    y = torch.empty((n, k, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if tile is None:
        shape = m, k // groups, c, r * s, x.element_size()
        tile = choose_tile(*shape, second=epilogue.shortcut is not None, gpu=gpu_of(x.device))
    conv2 = epilogue.shortcut
    residual, x2 = (other, None) if conv2 is None else (None, other)
    weight2, bias2, norm2 = (None, None, None) if conv2 is None else conv2[:3]
    h2, w2 = (1, 1) if other is None else other.shape[2:]
    stride2 = epilogue.residual_stride if conv2 is None else conv2.stride[0]
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(k // groups, tile.block_n) * groups,)
    with device_of(x):
        _conv_bn_act_kernel[grid](
            x,
            conv.weight,
            conv.bias,
            *(conv.norm[:4] if conv.norm is not None else (None,) * 4),
            residual,
            x2,
            weight2,
            bias2,
            *(norm2[:4] if norm2 is not None else (None,) * 4),
            y,
            m,
            h,
            w,
            p,
            q,
            h2,
            w2,
            C=c,
            K=k // groups,
            C2=1 if x2 is None else x2.shape[1],
            GROUPS=groups,
            R=r,
            S=s,
            STRIDE_H=conv.stride[0],
            STRIDE_W=conv.stride[1],
            PAD_H=conv.padding[0],
            PAD_W=conv.padding[1],
            DIL_H=conv.dilation[0],
            DIL_W=conv.dilation[1],
            STRIDE2=stride2,
            EPS=0.0 if conv.norm is None else conv.norm.eps,
            EPS2=0.0 if norm2 is None else norm2.eps,
            APPLY_RELU=epilogue.relu,
            ACC=accumulator(x.dtype),
            PRECISION=dot_precision(x.dtype),
            UPCAST=interpreted() and x.dtype == torch.bfloat16,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y
