"""oneDNN's fused convolutions on the CPU: folded weights, packed once into the blocked layout the primitive wants.

Per-call packing costs more than some of the convolutions themselves (a 7x7 512-channel 3x3 in bf16: 667 us against
210 us), so the packed weight is kept until a tensor that went into it changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..params import BatchNorm, Conv
from . import eager
from .eager import strided
from .folding import TensorCache, fold
from .select import Problem

_packed = TensorCache()


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine; None when it can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return "this torch has no mkldnn::_convolution_pointwise"
    return None


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot run the problem; None when it can."""
    if problem.device != "cpu":
        return f"oneDNN takes CPU tensors here, not {problem.device} ones"
    if problem.overpadded:  # seen with oneDNN 3.12: 3x1, dilation 2, stride 2, padding (0, 1) on a width of 1
        return "oneDNN can crash on a dilated filter that lies in the padding altogether"
    if problem.dtype == torch.float32:
        return None
    if problem.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    if problem.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return None
    return f"oneDNN has no {problem.dtype} convolution on this CPU"


def _pack(x: Tensor, conv: Conv) -> tuple[Tensor, Tensor]:
    weight, bias = fold(conv, x.dtype)
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape)
    )
    return packed, bias


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
    weight, bias = _packed.get(conv.tensors(), (x.dtype, conv.eps, *conv[3:]), lambda: _pack(x, conv))
    args = weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups
    act = "relu" if relu else "none"
    identity = None
    if shortcut is not None:
        identity = conv_bn_act(*shortcut, relu=False)
    elif residual is not None:
        identity = strided(residual, residual_stride).contiguous(memory_format=torch.channels_last)
    if identity is None:
        return torch.ops.mkldnn._convolution_pointwise.default(x, *args, act, [], "")
    if conv.groups > 1:  # the fused sum of a grouped convolution falls back to an add that lacks bf16
        z = torch.ops.mkldnn._convolution_pointwise.default(x, *args, "none", [], "").add_(identity)
        return z.relu_() if relu else z
    epilogue: tuple[Any, ...] = "add", None, "relu" if relu else None, [], None
    if shortcut is not None:  # nobody else sees the downsample branch: sum into it
        return torch.ops.mkldnn._convolution_pointwise_.binary(identity, x, *args, *epilogue)
    return torch.ops.mkldnn._convolution_pointwise.binary(x, identity, *args, *epilogue)


def bn_act(
    x: Tensor,
    norm: BatchNorm | None,
    *,
    residual: Tensor | None = None,
    residual_norm: BatchNorm | None = None,
    residual_stride: int = 1,
    relu: bool = True,
) -> Tensor:
    """See `functional.bn_act`: plain torch, with the ReLU in place on a tensor that nobody else holds."""
    z = eager.bn_act(
        x, norm, residual=residual, residual_norm=residual_norm, residual_stride=residual_stride, relu=False
    )
    if not relu:
        return z
    return z.relu_() if z is not x else z.relu()
