"""cuDNN's fused convolutions on folded weights: `relu(conv + bias)` and `relu(conv + residual + bias)`.

cuDNN fuses only what ends in a ReLU; a convolution without one runs plain, with the residual added behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..params import Bound, Conv, Epilogue
from .eager import bind_bn_act, strided
from .folding import TensorCache, fold
from .select import Problem

__all__ = ["bind_bn_act", "bind_conv_bn_act", "unavailable", "unsupported"]  # elementwise: cuDNN has no such operation

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


def bind_conv_bn_act(x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue, overwrite: bool) -> Bound:
    """See `backends.bind_conv_bn_act`."""
    weight, bias = _folded.get(conv.tensors(), (x.dtype, conv.eps), lambda: fold(conv, x.dtype))
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    if other is None:
        if not epilogue.relu:
            return lambda x, _: F.conv2d(x, weight, bias, *geometry)
        return lambda x, _: torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    branch = None
    if epilogue.shortcut is not None:
        branch = bind_conv_bn_act(other, epilogue.shortcut, None, Epilogue(relu=False), False)

    def run(x: Tensor, other: Tensor | None) -> Tensor:
        assert other is not None
        residual = strided(other, epilogue.residual_stride) if branch is None else branch(other, None)
        if not epilogue.relu:
            return F.conv2d(x, weight, bias, *geometry) + residual
        # the fused op copies a residual of another layout silently: do it where it can be seen
        residual = residual.contiguous(memory_format=torch.channels_last)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)

    return run
