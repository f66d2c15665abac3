"""Gradient of the epilogue: ReLU mask and channel sums in one pass.

autograd needs `dz = dy * (y > 0)`, which is also the residual's gradient, and `dbeta = sum of dz over pixels`. Eager
PyTorch reads dz again for the sum; here each tile sums what it has just masked. The partial sums are added in a fixed
order, so results repeat bit for bit. Activations are channels_last, seen as `[M, C]`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import accumulator, current


@triton.jit
def _relu_backward_kernel(
    dy_ptr,  # [M, C]
    y_ptr,  # [M, C] the op's output, or None where it had no ReLU
    dz_ptr,  # [M, C]
    partial_ptr,  # [programs along M, C] in ACC
    M,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz = 0 where y <= 0, else dy (a NaN in y passes dy, as in torch); partial = sum of dz over the tile's rows."""
    pid_m = tl.program_id(0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]
    offs = offs_m[:, None].to(tl.int64) * C + offs_c[None, :]
    dz = tl.load(dy_ptr + offs, mask=mask, other=0.0)
    if y_ptr is not None:
        y = tl.load(y_ptr + offs, mask=mask, other=1.0)
        dz = tl.where(y.to(ACC) <= 0.0, 0.0, dz.to(ACC)).to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + offs, dz, mask=mask)
    tl.store(partial_ptr + pid_m.to(tl.int64) * C + offs_c, tl.sum(dz.to(ACC), axis=0), mask=offs_c < C)


def relu_backward(dy: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`dz` in dy's dtype and its sum over N, H, W as `[C]` in the accumulator type; both inputs channels_last."""
    n, c, p, q = dy.shape
    m = n * p * q
    block_c = min(triton.next_power_of_2(c), 64)
    block_m = 8192 // block_c
    programs = triton.cdiv(m, block_m)
    dz = torch.empty_like(dy, memory_format=torch.channels_last)
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    partial = torch.empty((programs, c), dtype=acc, device=dy.device)
    with current(dy.device):
        _relu_backward_kernel[(programs, triton.cdiv(c, block_c))](
            dy, y, dz, partial, m, C=c, ACC=accumulator(dy.dtype), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4
        )
    return dz, partial.sum(0)
