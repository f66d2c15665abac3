"""The reference arithmetic in plain torch: supports everything, and is what every other backend is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..params import BatchNorm, Conv
from .select import Problem


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine; None when it can."""
    return None


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot run the problem; None when it can."""
    return None


def normalize(x: Tensor, norm: BatchNorm | None) -> Tensor:
    """Inference batch norm of `x`, or `x` itself."""
    if norm is None:
        return x
    return F.batch_norm(x, norm.mean, norm.var, norm.weight, norm.bias, training=False, eps=norm.eps)


def convolve(x: Tensor, conv: Conv) -> Tensor:
    """`norm(conv(x))`."""
    weight, bias = conv.weight.to(x.dtype), None if conv.bias is None else conv.bias.to(x.dtype)
    z = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return normalize(z, conv.norm)


def strided(residual: Tensor, stride: int) -> Tensor:
    """Every `stride`-th row and column, as a view."""
    return residual if stride == 1 else residual[:, :, ::stride, ::stride]


def conv_bn_act(
    x: Tensor,
    conv: Conv,
    *,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    shortcut: tuple[Tensor, Conv] | None = None,
    relu: bool = True,
) -> Tensor:
    """See `functional.conv_bn_act`."""
    z = convolve(x, conv)
    if residual is not None:
        z = z + strided(residual, residual_stride)
    if shortcut is not None:
        z = z + convolve(*shortcut)
    return torch.relu(z) if relu else z


def bn_act(
    x: Tensor,
    norm: BatchNorm | None,
    *,
    residual: Tensor | None = None,
    residual_norm: BatchNorm | None = None,
    residual_stride: int = 1,
    relu: bool = True,
) -> Tensor:
    """See `functional.bn_act`."""
    z = normalize(x, norm)
    if residual is not None:
        z = z + normalize(strided(residual, residual_stride), residual_norm)
    return torch.relu(z) if relu else z
