"""cuDNN's fused convolutions on folded weights: `relu(conv + bias)` and `relu(conv + residual + bias)`.

cuDNN fuses only what ends in a ReLU; a convolution without one runs plain, with the residual added behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..params import BatchNorm, Conv
from . import eager
from .eager import strided
from .folding import TensorCache, fold
from .select import Problem

_folded = TensorCache()


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine; None when it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if torch.backends.cudnn.is_available() else "this torch was built without cuDNN"


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot run the problem; None when it can."""
    if problem.device != "cuda":
        return f"cuDNN takes CUDA tensors, not {problem.device} ones"
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no fused cuDNN convolution for {problem.dtype}"
    return None


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
    weight, bias = _folded.get(conv.tensors(), (x.dtype, conv.eps), lambda: fold(conv, x.dtype))
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    if shortcut is not None:
        residual, residual_stride = conv_bn_act(*shortcut, relu=False), 1
    if not relu:
        z = F.conv2d(x, weight, bias, *geometry)
        return z if residual is None else z + strided(residual, residual_stride)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    # the fused op copies a residual of another layout silently: do it where it can be seen
    residual = strided(residual, residual_stride).contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


def bn_act(
    x: Tensor,
    norm: BatchNorm | None,
    *,
    residual: Tensor | None = None,
    residual_norm: BatchNorm | None = None,
    residual_stride: int = 1,
    relu: bool = True,
) -> Tensor:
    """See `functional.bn_act`: cuDNN has no such operation, so this is plain torch."""
    return eager.bn_act(
        x,
        norm,
        residual=residual,
        residual_norm=residual_norm,
        residual_stride=residual_stride,
        relu=relu,
    )
