"""The reference arithmetic in plain torch: supports everything, and is what every other backend is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..params import BatchNorm, Bound, Conv, Epilogue
from ..transforms import composed
from .folding import scale_shift
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
    if x.is_cuda and composed((x,)):  # torch cannot tell the memory format of what `vmap` maps over
        return _by_hand(x, norm)
    weight = norm.weight
    if weight is None and norm.bias is not None:  # on CUDA torch has no gradient of a bias alone
        weight = torch.ones_like(norm.bias)
    # not F.batch_norm: in torch 2.11 it refuses the eps 0 of a frozen norm
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, norm.bias, norm.mean, norm.var, False, 0.0, norm.eps, cudnn)


def _by_hand(x: Tensor, norm: BatchNorm) -> Tensor:
    """Batch norm in elementwise operations, with statistics as wide as x at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift = scale_shift(norm, wide)
    return (x.to(wide) * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def convolve(x: Tensor, conv: Conv) -> Tensor:
    """`norm(conv(x))`."""
    weight, bias = conv.weight.to(x.dtype), None if conv.bias is None else conv.bias.to(x.dtype)
    z = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return normalize(z, conv.norm)


def strided(residual: Tensor, stride: int) -> Tensor:
    """Every `stride`-th row and column, as a view."""
    return residual if stride == 1 else residual[:, :, ::stride, ::stride]


def conv_bn_act(x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue) -> Tensor:
    """See `functional.conv_bn_act`."""
    return _finish(convolve(x, conv), other, epilogue)


def bn_act(x: Tensor, norm: BatchNorm | None, other: Tensor | None, epilogue: Epilogue) -> Tensor:
    """See `functional.bn_act`."""
    return _finish(normalize(x, norm), other, epilogue)


def _finish(z: Tensor, other: Tensor | None, epilogue: Epilogue) -> Tensor:
    if epilogue.shortcut is not None:
        assert other is not None
        z = z + convolve(other, epilogue.shortcut)
    elif other is not None:
        z = z + normalize(strided(other, epilogue.residual_stride), epilogue.residual_norm)
    return torch.relu(z) if epilogue.relu else z


def dense(x: Tensor) -> Tensor:
    """`x` itself if it is channels_last, as every backend gives it, else a channels_last copy."""
    return x.contiguous(memory_format=torch.channels_last)


def bind_conv_bn_act(x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue, overwrite: bool) -> Bound:
    """See `backends.bind_conv_bn_act`."""
    return lambda x, other: dense(conv_bn_act(x, conv, other, epilogue))


def bind_bn_act(x: Tensor, norm: BatchNorm | None, other: Tensor | None, epilogue: Epilogue) -> Bound:
    """See `backends.bind_bn_act`."""
    return lambda x, other: dense(bn_act(x, norm, other, epilogue))
