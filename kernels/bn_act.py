"""Batch norm, residual add and ReLU, elementwise, in one pass.

For the places where there is no convolution to hang the epilogue on: the normalisation that opens a pre-activation
block, the tail behind a convolution that cuDNN runs, and the partial sums of a split-K convolution. Each element is
read once and written once, where eager PyTorch does so for the norm, the add and the ReLU in turn. Activations are
channels_last, seen as `[M, C]`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..params import PLAIN
from .dependent import wait_for_input
from .epilogue import eps_of, nan_relu, scale_shift, strided_rows, vectors
from .launch import Launch, accumulator


@triton.jit
def _bn_act_kernel(
    x_ptr,  # [PARTIALS, M, C]
    residual_ptr,  # [N, H2, W2, C], or None
    y_ptr,  # [M, C]
    bias_ptr,  # [C] added to x, or None
    mean_ptr,  # [C], or None for no normalisation
    var_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,
    mean2_ptr,  # [C] norm of the residual, or None
    var2_ptr,
    gamma2_ptr,
    beta2_ptr,
    M,
    P,
    Q,
    H2,
    W2,
    C: tl.constexpr,
    PARTIALS: tl.constexpr,
    STRIDE2: tl.constexpr,  # of the residual
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,  # see `dependent`
):
    """y = act(scale*sum(x) + shift [+ residual | + scale2*residual + shift2]), sum over the PARTIALS in order.

    ACC arithmetic, one rounding at the store.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m[:, None].to(tl.int64) * C + offs_c[None, :]  # [BLOCK_M, BLOCK_C]
    wait_for_input(PDL)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
    for part in range(1, PARTIALS):
        x += tl.load(x_ptr + offs + part * tl.cast(M, tl.int64) * C, mask=mask, other=0.0).to(ACC)
    scale, shift = scale_shift(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs_c, mask_c, EPS, ACC)
    z = x * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        rows2 = strided_rows(offs_m, H2, W2, P, Q, STRIDE2)
        residual = tl.load(residual_ptr + rows2[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        scale2, shift2 = scale_shift(None, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, offs_c, mask_c, EPS2, ACC)
        z += residual * scale2[None, :] + shift2[None, :]
    if APPLY_RELU:
        z = nan_relu(z)
    tl.store(y_ptr + offs, z.to(y_ptr.dtype.element_ty), mask=mask)


def bind_bn_act(size, dtype, norm, other=None, epilogue=PLAIN, *, device, bias=None, partials: int = 1):
    """Prepare `_bn_act_kernel` for parameters and shapes; see `fused_resblock.functional.bn_act` for the operation.

    Args:
        size: `(N, C, P, Q)` of the result.
        dtype: of the result.
        norm: a `fused_resblock.params.BatchNorm`, or None.
        other: an example of the residual `[N, C, H2, W2]`, or None.
        epilogue: a `fused_resblock.params.Epilogue`; a shortcut in it is not looked at.
        device: of all tensors.
        bias: added in front of the norm, or None.
        partials: how many tensors of this size, one behind the other, x is the sum of.

    Returns:
        A function of x and other, channels_last both, that gives y.
    """
    n, c, p, q = size
    m = n * p * q
    h2, w2 = (1, 1) if other is None else other.shape[2:]
    norm2 = epilogue.residual_norm
    block_c = min(triton.next_power_of_2(c), 128)
    block_m = 4096 // block_c
    if partials > 1:  # few pixels, or K would not have been split: smaller tiles, more programs
        block_m = max(1, block_m // 4)
    launch = Launch(
        _bn_act_kernel,
        (triton.cdiv(m, block_m), triton.cdiv(c, block_c)),
        (
            bias,
            *vectors(norm),
            *vectors(norm2),
            *(m, p, q, h2, w2),
            *(c, partials, epilogue.residual_stride),
            *(eps_of(norm), eps_of(norm2)),
            *(epilogue.relu, accumulator(dtype), block_m, block_c),
        ),
        device,
        num_warps=4,
    )

    def run(x, other):
        y = torch.empty(size, dtype=dtype, device=device, memory_format=torch.channels_last)
        launch(x, other, y)
        return y

    return run


def bn_act(x, norm, other=None, epilogue=PLAIN):
    """Bind and launch once; see `bind_bn_act`."""
    return bind_bn_act(tuple(x.shape), x.dtype, norm, other, epilogue, device=x.device)(x, other)
