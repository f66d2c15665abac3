"""oneDNN's fused operations on the CPU: folded weights, packed once into the blocked layout the primitive wants.

Per-call packing costs more than some of the convolutions themselves (a 7x7 512-channel 3x3 in bf16: 667 us against
210 us), so the packed weight is kept until a tensor that went into it changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..params import BatchNorm, Bound, Conv, Epilogue
from . import eager, small
from .eager import strided
from .folding import TensorCache, fold
from .layouts import Layouts
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


def bind_conv_bn_act(x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue, overwrite: bool) -> Bound:
    """See `backends.bind_conv_bn_act`."""
    if small.is_small(x, conv):
        return _bind_small(x, conv, other, epilogue)
    if _to_one_column(x, conv):
        return _bind_small(x, conv, other, epilogue, turned=True)
    layouts = _packed.get(conv.tensors(), (x.dtype, conv.eps, *conv[3:]), Layouts)
    weight, bias = layouts.fit(x, conv)
    args = weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups
    pointwise = torch.ops.mkldnn._convolution_pointwise
    act = "relu" if epilogue.relu else "none"
    if other is None:
        return lambda x, _: pointwise.default(x, *args, act, [], "")
    if epilogue.shortcut is not None:  # nobody else sees the downsample branch: sum into it
        branch = bind_conv_bn_act(other, epilogue.shortcut, None, Epilogue(relu=False), False)
        join = _bind_sum(args, conv.groups, epilogue.relu, overwrite=True)
        return lambda x, other: join(x, branch(other, None))
    stride = epilogue.residual_stride
    copied = stride > 1 or (not overwrite and _ambiguous(other))
    join = _bind_sum(args, conv.groups, epilogue.relu, overwrite or copied)
    if not copied:
        return join
    # a copy even of what is dense already: it is written to
    return lambda x, other: join(x, strided(other, stride).clone(memory_format=torch.channels_last))


def _to_one_column(x: Tensor, conv: Conv) -> bool:
    """Whether a filter of several columns strides to one column: oneDNN to torch 2.15 then may read unwritten memory.

    It was seen in bf16 with AMX, and in fp32 of one input channel. Dilated filters are left alone: as rows, taps that
    all miss the image crash oneDNN.
    """
    _, _, p, q = conv.output_shape(x)
    return q == 1 < p and conv.weight.shape[3] > 1 and conv.stride[1] > 1 and conv.dilation == (1, 1)


def _bind_small(x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue, turned: bool = False) -> Bound:
    """The operation where its convolution is `small`, or must be `turned`."""
    folded = _packed.get(conv.tensors(), (x.dtype, conv.eps, *conv[3:], "small"), lambda: fold(conv, x.dtype))
    if other is None:
        return small.bind(folded, conv, 0, None, epilogue.relu, turned)
    branch = None
    if epilogue.shortcut is not None:
        branch = bind_conv_bn_act(other, epilogue.shortcut, None, Epilogue(relu=False), False)
    return small.bind(folded, conv, epilogue.residual_stride, branch, epilogue.relu, turned)


def _ambiguous(residual: Tensor) -> bool:
    """Whether NCHW and channels_last are the same bytes: torch 2.11 cannot sum those into fresh memory."""
    return residual.shape[1] == 1 or residual.shape[2:] == (1, 1)


def _bind_sum(args: tuple[Any, ...], groups: int, relu: bool, overwrite: bool) -> Bound:
    """`act(conv(x) + other)`, in the memory of `other` if that may be overwritten."""
    if groups > 1:  # the fused sum of a grouped convolution falls back to an add that lacks bf16
        plain = torch.ops.mkldnn._convolution_pointwise.default

        def grouped(x: Tensor, other: Tensor | None) -> Tensor:
            z = plain(x, *args, "none", [], "").add_(other)
            return z.relu_() if relu else z

        return grouped
    epilogue: tuple[Any, ...] = "add", None, "relu" if relu else None, [], None
    if overwrite:
        in_place = torch.ops.mkldnn._convolution_pointwise_.binary
        return lambda x, other: in_place(other, x, *args, *epilogue)
    fresh = torch.ops.mkldnn._convolution_pointwise.binary
    return lambda x, other: fresh(x, other, *args, *epilogue)


def bind_bn_act(x: Tensor, norm: BatchNorm | None, other: Tensor | None, epilogue: Epilogue) -> Bound:
    """See `backends.bind_bn_act`: plain torch, with the ReLU in place on a tensor that nobody else holds."""
    plain = epilogue._replace(relu=False)

    def run(x: Tensor, other: Tensor | None) -> Tensor:
        z = eager.bn_act(x, norm, other, plain)
        if not epilogue.relu:
            return z
        return z.relu_() if z is not x else z.relu()

    return run


def packed_linear(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A Linear's weight `[K, C]` as `linear` wants it; the same tensor until the weight changes."""
    pack = torch.ops.mkldnn._reorder_linear_weight.default
    return _packed.get((weight, bias), ("linear",), lambda: pack(weight.detach()))


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` for `[N, C]` of a dtype that `unsupported` lets pass; no autograd."""
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
