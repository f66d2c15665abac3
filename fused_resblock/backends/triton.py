"""The Triton kernels: CUDA tensors, or CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`), for tests.

Batch norm's tensors go to the kernel as they are, so there is nothing folded here to keep fresh.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..params import BatchNorm, Bound, Conv, Epilogue
from .folding import TensorCache
from .select import Problem

_channels_last_weights = TensorCache()


def interpreting() -> bool:
    """Whether Triton's interpreter is switched on."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET is not set"
    return None


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot run the problem; None when it can."""
    if problem.device == "cpu" and not interpreting():
        return "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    if problem.device not in ("cpu", "cuda"):
        return f"no Triton kernels for {problem.device} tensors"
    if problem.dtype == torch.float64 and problem.device == "cuda":
        return "float64 runs in the interpreter only"
    if problem.pixels >= 2**31 - 256 or problem.tap_reach >= 2**31:
        return "the image has more pixels than a 32-bit index counts"
    return None


def _dense_norm(norm: BatchNorm | None) -> BatchNorm | None:
    """The norm with vectors of stride 1, which they have unless they are columns of a larger table."""
    if norm is None:
        return None
    mean, var, weight, bias = (None if vector is None else vector.contiguous() for vector in norm[:4])
    return BatchNorm(mean, var, weight, bias, norm.eps)  # type: ignore[arg-type]


def _prepare(conv: Conv, dtype: torch.dtype) -> Conv:
    """The convolution with its weight in `dtype` and channels_last, which a model in both formats already has."""
    weight, bias = conv.weight, conv.bias
    if weight.dtype != dtype or not weight.is_contiguous(memory_format=torch.channels_last):
        weight = _channels_last_weights.get(
            (weight,), (dtype,), lambda: conv.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        )
    bias = None if bias is None else bias.contiguous()
    return conv._replace(weight=weight, bias=bias, norm=_dense_norm(conv.norm))


def bind_conv_bn_act(x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue, overwrite: bool) -> Bound:
    """See `backends.bind_conv_bn_act`."""
    from ..kernels.conv_bn_act import conv_bn_act as launch

    conv = _prepare(conv, x.dtype)
    if epilogue.shortcut is not None:
        epilogue = epilogue._replace(shortcut=_prepare(epilogue.shortcut, x.dtype))
    return lambda x, other: launch(x, conv, other, epilogue)


def bind_bn_act(x: Tensor, norm: BatchNorm | None, other: Tensor | None, epilogue: Epilogue) -> Bound:
    """See `backends.bind_bn_act`."""
    from ..kernels.bn_act import bn_act as launch

    norm = _dense_norm(norm)
    epilogue = epilogue._replace(residual_norm=_dense_norm(epilogue.residual_norm))
    return lambda x, other: launch(x, norm, other, epilogue)


def relu_backward(dy: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `backends.relu_backward`."""
    from ..kernels.relu_backward import relu_backward as launch

    return launch(dy, y)
