"""The tail of a bottleneck and the head of the next one in one pass: 3x3, expand, residual, ReLU, next reduce.

Fused conv by conv, a bottleneck of width C moves 32 C elements a pixel: the 3x3's result and the block's output are
written by one kernel and read by the next. Here the fusion is shifted by half a block. A program computes the 3x3 for
its pixels and keeps the result in registers; it then walks over the expanded channels in chunks, as flash attention
walks over keys: expand a chunk, add the residual, apply the ReLU, store it, and multiply it into the next block's
reduce at once. All that follows the 3x3 is pointwise in space, so no pixel is computed twice. 20 C elements a pixel
remain: the input, the residual, the output and the next block's input.

The first block of a stage accumulates its downsample branch beside each chunk; the last one has no next reduce, unless
the next stage begins with one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu, scale_shift, strided_rows
from .launch import Launch, accumulator, dot_precision, interpreted
from .tail_call import tail_call
from .tiles import StageTile


@triton.jit
def _expand_shift_kernel(
    h_ptr,  # [N, H, W, C] input of the 3x3
    other_ptr,  # residual [M, K]; with SECOND the input of the downsample branch [N, H2, W2, C2]
    y_ptr,  # [M, K] output of the block
    g_ptr,  # [M, G] output of the next block's reduce, or None
    w_ptr,  # [C, R, S, C]
    bias_ptr,  # [C], or None
    mean_ptr,  # [C], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    w3_ptr,  # [K, C]
    bias3_ptr,  # [K], or None
    mean3_ptr,
    var3_ptr,
    gamma3_ptr,
    beta3_ptr,
    w2_ptr,  # [K, C2] of the downsample branch, or None
    bias2_ptr,
    mean2_ptr,
    var2_ptr,
    gamma2_ptr,
    beta2_ptr,
    w1_ptr,  # [G, K] of the next reduce, or None
    bias1_ptr,  # [G], or None
    mean1_ptr,
    var1_ptr,
    gamma1_ptr,
    beta1_ptr,
    M,
    H,
    W,
    P,
    Q,
    H2,
    W2,
    C: tl.constexpr,
    K: tl.constexpr,
    C2: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,  # of the 3x3
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    STRIDE2: tl.constexpr,  # of the downsample branch
    EPS: tl.constexpr,
    EPS3: tl.constexpr,
    EPS2: tl.constexpr,
    EPS1: tl.constexpr,
    SECOND: tl.constexpr,
    ACC: tl.constexpr,  # fp32; fp64 for fp64 inputs
    PRECISION: tl.constexpr,  # of an fp32 dot: "tf32" or "ieee"
    UPCAST: tl.constexpr,  # the interpreter has no bf16 dot
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # expanded channels a chunk
    BLOCK_K: tl.constexpr,  # input channels a step of the 3x3 and of the downsample branch
    TAP_STAGES: tl.constexpr,  # of the 3x3's loop; 1: plain loads, which keep the taps' overlap in L1
    CHUNK_STAGES: tl.constexpr,
    PDL: tl.constexpr,  # see `dependent`
):
    """h2 = relu(bn(conv3x3(h))); y = relu(bn3(h2 W3) + (other | bn2(other W2))); g = relu(bn1(y W1)).

    Sums in ACC. h2 and y are rounded to their dtype, as they would be between kernels; g once, at the store.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, C)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    dtype = y_ptr.dtype.element_ty

    # [BLOCK_M] first tap of every output pixel: (h0, w0) may lie in the padding
    h0 = ((offs_m // Q) % P) * STRIDE - PAD_H
    w0 = (offs_m % Q) * STRIDE - PAD_W
    rows = ((offs_m // (P * Q)).to(tl.int64) * H + h0) * W + w0
    h_rows = h_ptr + rows[:, None] * C + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    w_cols = w_ptr + offs_c[None, :] * (R * S * C) + offs_k[:, None]  # [BLOCK_K, C]
    acc = tl.zeros((BLOCK_M, C), ACC)
    wait_for_input(PDL)
    for step in tl.range(0, R * S * (C // BLOCK_K), num_stages=TAP_STAGES):
        # all taps of a channel block before the next block: the taps' overlap is still in cache
        c = (step // (R * S)) * BLOCK_K
        tap = step % (R * S)
        r = tap // S
        s = tap % S
        inside = (h0 + r >= 0) & (h0 + r < H) & (w0 + s >= 0) & (w0 + s < W)
        x = tl.load(h_rows + ((r * W + s) * C + c), mask=(mask_m & inside)[:, None], other=0.0)
        w = tl.load(w_cols + (tap * C + c))
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
    scale, shift = scale_shift(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs_c, offs_c < C, EPS, ACC)
    h2 = nan_relu(acc * scale[None, :] + shift[None, :]).to(dtype)  # [BLOCK_M, C]
    if UPCAST:
        h2 = h2.to(tl.float32)

    offs_g = tl.arange(0, G)
    reduced = tl.zeros((BLOCK_M, G), ACC)
    rows2 = strided_rows(offs_m, H2, W2, P, Q, STRIDE2)
    for n in tl.range(0, K, BLOCK_N, num_stages=CHUNK_STAGES):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < K
        w3 = tl.load(w3_ptr + offs_n[None, :] * C + offs_c[:, None], mask=mask_n[None, :], other=0.0)  # [C, BLOCK_N]
        if UPCAST:
            w3 = w3.to(tl.float32)
        e = tl.dot(h2, w3, input_precision=PRECISION, out_dtype=ACC)
        scale3, shift3 = scale_shift(bias3_ptr, mean3_ptr, var3_ptr, gamma3_ptr, beta3_ptr, offs_n, mask_n, EPS3, ACC)
        z = e * scale3[None, :] + shift3[None, :]
        if SECOND:
            down = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            for c in range(0, C2, BLOCK_K):
                known = (offs_k < C2 - c) if C2 % BLOCK_K != 0 else (offs_k < BLOCK_K)
                x2 = tl.load(
                    other_ptr + rows2[:, None] * C2 + (c + offs_k)[None, :],
                    mask=mask_m[:, None] & known[None, :],
                    other=0.0,
                )
                w2 = tl.load(
                    w2_ptr + offs_n[None, :] * C2 + (c + offs_k)[:, None],
                    mask=mask_n[None, :] & known[:, None],
                    other=0.0,
                )
                if UPCAST:
                    x2 = x2.to(tl.float32)
                    w2 = w2.to(tl.float32)
                down = tl.dot(x2, w2, down, input_precision=PRECISION, out_dtype=ACC)
            scale2, shift2 = scale_shift(
                bias2_ptr, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, offs_n, mask_n, EPS2, ACC
            )
            z += down * scale2[None, :] + shift2[None, :]
        else:
            residual = other_ptr + offs_m[:, None].to(tl.int64) * K + offs_n[None, :]
            z += tl.load(residual, mask=mask_m[:, None] & mask_n[None, :], other=0.0).to(ACC)
        y = nan_relu(z).to(dtype)
        y_rows = y_ptr + offs_m[:, None].to(tl.int64) * K + offs_n[None, :]
        tl.store(y_rows, y, mask=mask_m[:, None] & mask_n[None, :])
        if g_ptr is not None:
            w1 = tl.load(
                w1_ptr + offs_g[None, :] * K + offs_n[:, None], mask=mask_n[:, None], other=0.0
            )  # [BLOCK_N, G]
            if UPCAST:
                y = y.to(tl.float32)
                w1 = w1.to(tl.float32)
            reduced = tl.dot(y, w1, reduced, input_precision=PRECISION, out_dtype=ACC)
    if g_ptr is not None:
        scale1, shift1 = scale_shift(
            bias1_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, offs_g, offs_g < G, EPS1, ACC
        )
        g = nan_relu(reduced * scale1[None, :] + shift1[None, :])
        g_rows = g_ptr + offs_m[:, None].to(tl.int64) * G + offs_g[None, :]
        tl.store(g_rows, g.to(dtype), mask=mask_m[:, None])


def refusal(conv, expand, shortcut, reduce) -> str | None:
    """Why the kernel cannot run these convolutions; None when it can.

    Args:
        conv: the 3x3 as a `fused_resblock.params.Conv`.
        expand: the 1x1 behind it.
        shortcut: the downsample branch, or None.
        reduce: the next block's first 1x1, or None.
    """
    for name, pointwise in (("the block's last", expand), ("the next block's first", reduce)):
        plain = ((1, 1), (0, 0), (1, 1))
        if pointwise is not None and (
            tuple(pointwise.weight.shape[2:]) != (1, 1)
            or (pointwise.stride, pointwise.padding, pointwise.dilation) != plain
            or pointwise.groups != 1
        ):
            return f"{name} convolution is no plain 1x1"
    width = conv.weight.shape[0]
    if conv.weight.shape[1] != width or conv.groups != 1:
        return "the 3x3 changes the channel count or is grouped"
    if conv.dilation != (1, 1) or conv.stride[0] != conv.stride[1]:
        return "the 3x3 is dilated or has two strides"
    for channels in (width, *(() if reduce is None else (reduce.weight.shape[0],))):
        if channels < 16 or channels & (channels - 1):
            return f"{channels} channels are no power of two from 16 up"
    if expand.weight.shape[0] % 8 or (shortcut is not None and shortcut.weight.shape[1] % 8):
        return "channels are no multiple of 8: no 16-byte loads"
    return None


def bind_expand_shift(h, conv, expand, other, shortcut, reduce, tile: StageTile, *, overwrite: bool = False):
    """Prepare `_expand_shift_kernel` for parameters and shapes.

    Args:
        h: an example of the 3x3's input `[N, C, H, W]`, channels_last.
        conv: the 3x3, a `fused_resblock.params.Conv` that `refusal` takes; weights are channels_last.
        expand: the 1x1 to K channels.
        other: an example of the residual `[N, K, P, Q]`, or of the shortcut's input.
        shortcut: the downsample branch as a `Conv`, or None.
        reduce: the next block's first 1x1 as a `Conv`, or None.
        tile: how to run it.
        overwrite: write y over the residual, each piece of which is read by the program that writes it, before it does;
            not with a shortcut.

    Returns:
        A function of h and other that gives y `[N, K, P, Q]` and g `[N, G, P, Q]` (None without `reduce`).
    """
    n, c, height, width = h.shape
    k = expand.weight.shape[0]
    p, q = conv.output_size(height, width)
    m = n * p * q
    outputs = 16 if reduce is None else reduce.weight.shape[0]
    inputs2 = 16 if shortcut is None else shortcut.weight.shape[1]
    launch = Launch(
        _expand_shift_kernel,
        (triton.cdiv(m, tile.block_m),),
        (
            *_parameters(conv),
            *_parameters(expand),
            *_parameters(shortcut),
            *_parameters(reduce),
            *(m, height, width, p, q, *other.shape[2:]),
            *(c, k, inputs2, outputs, *conv.weight.shape[2:]),
            *(conv.stride[0], *conv.padding, 1 if shortcut is None else shortcut.stride[0]),
            *(0.0 if c is None else eps_of(c.norm) for c in (conv, expand, shortcut, reduce)),
            *(shortcut is not None, accumulator(h.dtype), dot_precision(h.dtype)),
            interpreted() and h.dtype == torch.bfloat16,
            *(tile.block_m, tile.block_n, min(tile.block_k, c), tile.tap_stages, tile.chunk_stages),
        ),
        h.device,
        num_warps=tile.num_warps,
        num_stages=max(tile.tap_stages, tile.chunk_stages),
    )
    return tail_call(launch, h, conv, expand, reduce, overwrite, lambda *activations: activations)


def _parameters(conv):
    """Weight, bias and the norm's vectors, None each where they are absent."""
    return (None if conv is None else conv.weight, *layer_vectors(conv))
