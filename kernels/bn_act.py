"""Batch norm, residual add and ReLU, elementwise, in one pass.

For the places where there is no convolution to hang the epilogue on: the normalisation that opens a pre-activation
block, and the tail behind a convolution that cuDNN runs. Each element is read once and written once, where eager
PyTorch does so for the norm, the add and the ReLU in turn. Activations are channels_last, seen as `[M, C]`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..params import PLAIN
from .epilogue import nan_relu, scale_shift, strided_rows
from .launch import accumulator, device_of


@triton.jit
def _bn_act_kernel(
    x_ptr,  # [M, C]
    mean_ptr,  # [C]
    var_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,
    residual_ptr,  # [N, H2, W2, C], or None
    mean2_ptr,  # [C] norm of the residual, or None
    var2_ptr,
    gamma2_ptr,
    beta2_ptr,
    y_ptr,  # [M, C]
    M,
    P,
    Q,
    H2,
    W2,
    C: tl.constexpr,
    STRIDE2: tl.constexpr,  # of the residual
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = act(scale*x + shift [+ residual | + scale2*residual + shift2]); ACC arithmetic, one rounding at the store."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m[:, None].to(tl.int64) * C + offs_c[None, :]  # [BLOCK_M, BLOCK_C]
    scale, shift = scale_shift(None, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs_c, mask_c, EPS, ACC)
    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC) * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        rows2 = strided_rows(offs_m, H2, W2, P, Q, STRIDE2)
        residual = tl.load(residual_ptr + rows2[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        scale2, shift2 = scale_shift(None, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, offs_c, mask_c, EPS2, ACC)
        z += residual * scale2[None, :] + shift2[None, :]
    if APPLY_RELU:
        z = nan_relu(z)
    tl.store(y_ptr + offs, z.to(y_ptr.dtype.element_ty), mask=mask)


def bn_act(x, norm, other=None, epilogue=PLAIN):
    """Launch `_bn_act_kernel`; see `fused_resblock.functional.bn_act` for the operation.

    Args:
        x: `[N, C, P, Q]` channels_last.
        norm: a `fused_resblock.params.BatchNorm`, or None.
        other: the residual, `[N, C, H2, W2]` channels_last, or None.
        epilogue: a `fused_resblock.params.Epilogue` without a shortcut.
    """
    n, c, p, q = x.shape
    m = n * p * q
    y = torch.empty_like(x, memory_format=torch.channels_last)
    h2, w2 = (1, 1) if other is None else other.shape[2:]
    norm2 = epilogue.residual_norm
    block_c = min(triton.next_power_of_2(c), 128)
    block_m = 4096 // block_c
    with device_of(x):
        _bn_act_kernel[(triton.cdiv(m, block_m), triton.cdiv(c, block_c))](
            x,
            *(norm[:4] if norm is not None else (None,) * 4),
            other,
            *(norm2[:4] if norm2 is not None else (None,) * 4),
            y,
            m,
            p,
            q,
            h2,
            w2,
            C=c,
            STRIDE2=epilogue.residual_stride,
            EPS=0.0 if norm is None else norm.eps,
            EPS2=0.0 if norm2 is None else norm2.eps,
            APPLY_RELU=epilogue.relu,
            ACC=accumulator(x.dtype),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return y
