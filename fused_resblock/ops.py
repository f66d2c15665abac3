"""The fused operations as `torch.library` ops: schema, fake and gradient, so that autograd, `torch.compile` and
`torch.export` see them. Documented in `functional`; below here tensors are plain and arguments are bundled.

A norm is absent when its `mean` is None. The gradients save the inputs and the output only: see `gradients`.

Inductor writes tensors that a graph computes again without a new version, which is what a cache of folded weights goes
by. So `learned` has a bit for each tensor of a norm or convolution that was an `nn.Parameter` when the graph was made:
one that is none by now was computed, as an edit of the parameter in the graph is. `UNCACHED` if a weight never was one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends.folding import uncached
from .gradients import branch_grads, elementwise_grads, residual_grad
from .params import BatchNorm, Conv, Epilogue
from .transforms import dual

_library = torch.library.Library("fused_resblock", "DEF")
_NORM = "Tensor? mean{i}, Tensor? var{i}, Tensor? gamma{i}, Tensor? beta{i}, float eps{i}"
_library.define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, " + _NORM.format(i="") + ", SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, Tensor? residual, SymInt residual_stride, "
    "Tensor? x2, Tensor? weight2, Tensor? bias2, " + _NORM.format(i="2") + ", SymInt stride2, bool relu, "
    "str backend, int learned=0) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "bn_act(Tensor x, " + _NORM.format(i="") + ", Tensor? residual, " + _NORM.format(i="2") + ", "
    "SymInt residual_stride, bool relu, str backend, int learned=0) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "relu_backward(Tensor dy, Tensor? y, str backend) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)


UNCACHED = -1
_NO_CONV = Conv(None)  # type: ignore[arg-type]


def _norm(mean: Tensor | None, *rest: Any) -> BatchNorm | None:
    return None if mean is None else BatchNorm(mean, *rest)


def _flat(norm: BatchNorm | None) -> tuple[Any, ...]:
    return (None, None, None, None, 0.0) if norm is None else tuple(norm)


def _canonical(y: Tensor) -> Tensor:
    """`y` with channels_last strides to the letter: where sizes of 1 leave a choice, backends differ."""
    _, c, h, w = y.shape
    if y.stride() == (h * w * c, 1, w * c, c):
        return y
    # a copy, not a view: autograd would forbid to change it in place
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last).copy_(y)


def conv_bn_act(
    x: Tensor,
    conv: Conv,
    other: Tensor | None,
    epilogue: Epilogue,
    *,
    backend: str = "auto",
    learned: int = 0,
) -> Tensor:
    """Call the op with bundled arguments."""
    weight, bias, norm, *geometry = conv
    branch = epilogue.shortcut or _NO_CONV
    residual, x2 = (other, None) if epilogue.shortcut is None else (None, other)
    return torch.ops.fused_resblock.conv_bn_act(
        x,
        weight,
        bias,
        *_flat(norm),
        *geometry,
        residual,
        epilogue.residual_stride,
        x2,
        branch.weight,
        branch.bias,
        *_flat(branch.norm),
        branch.stride[0],
        epilogue.relu,
        backend,
        learned,
    )


def bn_act(
    x: Tensor,
    norm: BatchNorm | None,
    other: Tensor | None,
    epilogue: Epilogue,
    *,
    backend: str = "auto",
    learned: int = 0,
) -> Tensor:
    """Call the op with bundled arguments."""
    return torch.ops.fused_resblock.bn_act(
        x,
        *_flat(norm),
        other,
        *_flat(epilogue.residual_norm),
        epilogue.residual_stride,
        epilogue.relu,
        backend,
        learned,
    )


def _bundle(args: tuple[Any, ...]) -> tuple[Tensor, Conv, Tensor | None, Epilogue, str]:
    """The op's flat arguments as `(x, conv, other, epilogue, backend)`."""
    x, weight, bias = args[:3]
    stride, padding, dilation, groups = args[8:12]
    conv = Conv(weight, bias, _norm(*args[3:8]), tuple(stride), tuple(padding), tuple(dilation), groups)
    residual, residual_stride, x2, weight2, bias2 = args[12:17]
    branch = None if x2 is None else Conv(weight2, bias2, _norm(*args[17:22]), (args[22], args[22]))
    return x, conv, residual if x2 is None else x2, Epilogue(residual_stride, None, branch, args[23]), args[24]


def _caching(learned: tuple[int, ...], tensors: tuple[Tensor | None, ...]) -> AbstractContextManager[None]:
    """`uncached` if one of the tensors was computed by a graph.

    Args:
        learned: the op's last argument, which the dispatcher leaves out if it is the default.
        tensors: all but the activations.
    """
    bits = sum(learned)
    computed = any(bits >> i & 1 and not isinstance(tensor, torch.nn.Parameter) for i, tensor in enumerate(tensors))
    return uncached() if bits == UNCACHED or computed else nullcontext()


@torch.library.impl(_library, "conv_bn_act", "CompositeExplicitAutograd")
def _conv_bn_act(*args: Any) -> Tensor:
    x, conv, other, epilogue, backend = _bundle(args)
    with _caching(args[25:], (*conv.tensors(), *epilogue.tensors())):
        return _canonical(backends.conv_bn_act(x, conv, other, epilogue, backend=backend))


@torch.library.register_fake("fused_resblock::conv_bn_act", lib=_library)
def _conv_bn_act_fake(*args: Any) -> Tensor:
    x, conv = _bundle(args)[:2]
    size = (x.shape[0], conv.weight.shape[0], *conv.output_size(*x.shape[2:]))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.impl(_library, "bn_act", "CompositeExplicitAutograd")
def _bn_act(x: Tensor, *args: Any) -> Tensor:
    norm, epilogue = _norm(*args[:5]), Epilogue(args[11], _norm(*args[6:11]), None, args[12])
    with _caching(args[14:], (*(norm[:4] if norm else ()), *epilogue.tensors())):
        y = backends.bn_act(x, norm, args[5], epilogue, backend=args[13])
    return _canonical(y.clone() if y is x else y)


@torch.library.register_fake("fused_resblock::bn_act", lib=_library)
def _bn_act_fake(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.impl(_library, "relu_backward", "CompositeExplicitAutograd")
def _relu_backward(dy: Tensor, y: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    dz, total = backends.relu_backward(dy, y, backend=backend)
    return _canonical(dz.clone() if dz is dy else dz), total


@torch.library.register_fake("fused_resblock::relu_backward", lib=_library)
def _relu_backward_fake(dy: Tensor, y: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(dy.dtype, torch.float32)
    dz = torch.empty_like(dy, memory_format=torch.channels_last)
    return dz, torch.empty(dy.shape[1], dtype=wide, device=dy.device)


def _relu_grads(dy: Tensor, y: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """`relu_backward`, by torch's own operations where dy has a tangent: the op has no forward-mode formula."""
    if not torch.compiler.is_compiling() and dual((dy,)):
        return backends.relu_backward(dy, y, backend="eager")
    return torch.ops.fused_resblock.relu_backward(dy, y, backend)


def _relu_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.backend = inputs[2]


def _relu_backward_grad(ctx: Any, ddz: Tensor, dtotal: Tensor) -> tuple[Any, ...]:
    (y,) = ctx.saved_tensors
    grad = ddz + dtotal.to(ddz.dtype)[:, None, None]
    return torch.ops.fused_resblock.relu_backward(grad, y, ctx.backend)[0], None, None


torch.library.register_autograd(
    "fused_resblock::relu_backward", _relu_backward_grad, setup_context=_relu_backward_setup, lib=_library
)


def _conv_bn_act_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = [t if isinstance(t, Tensor) else None for t in inputs]
    residual = tensors[12]
    ctx.residual_shape = None if residual is None else residual.shape
    tensors[12] = None  # only its shape is needed
    ctx.rest = tuple(None if isinstance(a, Tensor) else a for a in inputs)
    ctx.save_for_backward(*tensors, output if inputs[23] else None)


def _conv_bn_act_grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    *tensors, y = ctx.saved_tensors
    x, conv, other, epilogue, backend = _bundle(
        tuple(a if t is None else t for t, a in zip(tensors, ctx.rest, strict=True))
    )
    need = ctx.needs_input_grad
    dz, total = _relu_grads(dy, y, backend)
    first = branch_grads(dz, total, x, conv, need[0], need[1] or need[5])
    residual = None
    if ctx.residual_shape is not None and need[12]:
        residual = residual_grad(dz, ctx.residual_shape, (epilogue.residual_stride,) * 2)
    second: tuple[Any, ...] = (None,) * 8
    if epilogue.shortcut is not None:
        assert other is not None
        second = branch_grads(dz, total, other, epilogue.shortcut, need[14], need[15] or need[19])
    return (*first, None, None, None, None, residual, None, *second, None, None, None, None)


torch.library.register_autograd(
    "fused_resblock::conv_bn_act", _conv_bn_act_grad, setup_context=_conv_bn_act_setup, lib=_library
)


def _bn_act_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = [t if isinstance(t, Tensor) else None for t in inputs]
    ctx.residual_shape = None if tensors[6] is None else tensors[6].shape
    for activation, mean in ((0, 1), (6, 7)):
        if tensors[mean] is None:  # without a norm its values are not needed
            tensors[activation] = None
    ctx.rest = tuple(None if isinstance(a, Tensor) else a for a in inputs)
    ctx.save_for_backward(*tensors, output if inputs[13] else None)


def _bn_act_grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    *tensors, y = ctx.saved_tensors
    args = tuple(a if t is None else t for t, a in zip(tensors, ctx.rest, strict=True))
    x, residual, stride, backend = args[0], args[6], args[12], args[14]
    need = ctx.needs_input_grad
    dz, total = _relu_grads(dy, y, backend)
    first = elementwise_grads(dz, total, x, _norm(*args[1:6]), need[0], need[3])
    second: tuple[Any, ...] = (None,) * 6
    if ctx.residual_shape is not None:
        view = None if residual is None else residual[:, :, ::stride, ::stride]
        dr, *norm2 = elementwise_grads(dz, total, view, _norm(*args[7:12]), need[6], need[9])
        second = (None if dr is None else residual_grad(dr, ctx.residual_shape, (stride, stride)), *norm2)
    return (*first, *second, None, None, None, None)


torch.library.register_autograd("fused_resblock::bn_act", _bn_act_grad, setup_context=_bn_act_setup, lib=_library)
