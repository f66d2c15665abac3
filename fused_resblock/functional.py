"""The fused operations as functions: arguments are checked here, once, and described here in full."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from . import backends, dispatch
from .dispatch import autocast_dtype
from .params import BatchNorm, Conv, Epilogue, Pair, Shortcut

__all__ = ["BatchNorm", "Shortcut", "bn_act", "conv_bn_act"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: BatchNorm | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    shortcut: Shortcut | None = None,
    relu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Convolution, inference batch norm, residual add and ReLU as one operation.

    `y = act(norm(conv2d(x, weight) + bias) [+ residual[:, :, ::t, ::t] | + shortcut.norm(conv1x1(shortcut.x))])`

    with t = residual_stride, norm the identity when None, act ReLU or the identity. Products are accumulated in fp32
    (fp64 for fp64 inputs); the Triton kernel rounds once, at the store, the other backends may round the folded weight
    as well. NaN propagates as in torch, but for oneDNN's fused ReLU, which makes it 0 (as it does under Inductor). fp32
    products use TF32 where `torch.backends.cudnn.allow_tf32` is set; the Triton kernel then multiplies by a copy of the
    weight that `kernels.tf32` rounds.

    Args:
        x: `[N, C, H, W]`, floating point; any memory format, channels_last without a copy.
        weight: `[K, C / groups, R, S]`, of x's dtype and device.
        bias: `[K]`, of x's dtype and device; or None.
        norm: mean, var, gamma and beta `[K]` each, of x's dtype or fp32 for a 16-bit x (any floating dtype under
            autocast), on x's device, and eps; statistics take no gradient.
        stride, padding, dilation: of both axes, or a pair (rows, columns).
        groups: must divide C and K. Groups of few channels may be computed together, the others with weight 0: a NaN or
            an infinity in one then reaches its neighbours.
        residual: `[N, K, H2, W2]` with `ceil(H2 / t) = P` and `ceil(W2 / t) = Q`, of x's dtype; or None.
        residual_stride: t, the step at which the residual is read in place.
        shortcut: a 1x1 convolution with its own norm that joins the same output, instead of a residual.
        relu: whether act is ReLU.
        backend: "auto", "triton", "cudnn", "onednn" or "eager"; `FUSED_RESBLOCK_BACKEND` stands in for "auto".

    Returns:
        `[N, K, P, Q]` in x's dtype, channels_last. Under autocast, x, weights and residual are taken in the autocast
        dtype and the norm as it is. An empty batch gives an empty result. In a graph of `torch.compile` a weight that
        is no `nn.Parameter` is folded at every call: the graph may have computed it.

    Differentiable (twice, too) in x, weight, bias, gamma, beta, residual and the shortcut's counterparts. Forward-mode
    derivatives are computed by torch's own operations.

    Raises:
        TypeError: if a tensor is not one, or not floating point.
        ValueError: if shapes, dtypes or devices do not fit, or both residual and shortcut are given, or the backend's
            name is unknown.
        RuntimeError: if the backend is not available on this machine.

    Source: batch norm at inference is an affine map per channel (Ioffe and Szegedy, arXiv:1502.03167, algorithm 2);
    convolution as an implicit GEMM (Chetlur et al., arXiv:1410.0759).
    """
    backend = backends.check_name(backend)
    stride, padding, dilation = _pair(stride, "stride"), _pair(padding, "padding"), _pair(dilation, "dilation")
    conv = Conv(weight, bias, norm, stride, padding, dilation, _integer(groups, "groups"))
    check_image(x, "x")
    dtype = autocast_dtype(x)
    _check_options(residual, residual_stride, relu)
    _check_conv(x, conv, dtype is not None)
    out = (x.shape[0], weight.shape[0], *conv.output_size(*x.shape[2:]))
    if residual is not None:
        if shortcut is not None:
            raise ValueError("residual must be None when a shortcut is given, got both")
        _check_residual(residual, x, out, residual_stride, dtype is not None)
    if shortcut is not None:
        _check_shortcut(shortcut, x, out, dtype is not None)
    other = residual if shortcut is None else shortcut.x
    if dtype is not None:
        x, other = x.to(dtype), None if other is None else other.to(dtype)
    epilogue = Epilogue(residual_stride, None, None if shortcut is None else shortcut.conv, relu)
    return dispatch.conv_bn_act(x, conv, other, epilogue, backend=backend)


def bn_act(
    x: Tensor,
    norm: BatchNorm | None = None,
    *,
    residual: Tensor | None = None,
    residual_norm: BatchNorm | None = None,
    residual_stride: int = 1,
    relu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Inference batch norm, residual add and ReLU as one elementwise operation.

    `y = act(norm(x) [+ residual_norm(residual[:, :, ::t, ::t])])`

    with t = residual_stride, each norm the identity when None, act ReLU or the identity; fp32 arithmetic (fp64 for
    fp64 inputs) in the Triton kernel, with one rounding at the store. NaN propagates as in torch.

    Args:
        x: `[N, C, H, W]`, floating point; any memory format, channels_last without a copy.
        norm: mean, var, gamma and beta `[C]` each and eps; statistics take no gradient.
        residual: `[N, C, H2, W2]` with `ceil(H2 / t) = H` and `ceil(W2 / t) = W`, of x's dtype; or None.
        residual_norm: a norm for the residual.
        residual_stride, relu, backend: as in `conv_bn_act`.

    Returns:
        `[N, C, H, W]` in x's dtype, channels_last. An empty batch gives an empty result.

    Differentiable (twice, too) in x, gamma, beta, residual and the residual's gamma and beta.

    Raises:
        TypeError, ValueError, RuntimeError: as in `conv_bn_act`.
    """
    backend = backends.check_name(backend)
    check_image(x, "x")
    autocast = autocast_dtype(x) is not None
    _check_options(residual, residual_stride, relu)
    _check_norm(norm, x, x.shape[1], "norm", autocast)
    if residual is not None:
        _check_residual(residual, x, tuple(x.shape), residual_stride, autocast)
        residual = residual.to(x.dtype)
        _check_norm(residual_norm, x, x.shape[1], "residual_norm", autocast)
    elif residual_norm is not None:
        raise ValueError("residual_norm must be None without a residual, got a norm")
    epilogue = Epilogue(residual_stride, residual_norm, None, relu)
    return dispatch.bn_act(x, norm, residual, epilogue, backend=backend)


def _integer(value: Any, name: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return value


def _pair(value: Any, name: str) -> Pair:
    if not isinstance(value, (tuple, list)):
        value = (_integer(value, name),) * 2
    if len(value) != 2:
        raise ValueError(f"{name} must be an integer or a pair of integers, got {value!r}")
    return _integer(value[0], name), _integer(value[1], name)


def _check_options(residual: Any, residual_stride: Any, relu: Any) -> None:
    if _integer(residual_stride, "residual_stride") < 1:
        raise ValueError(f"residual_stride must be at least 1, got {residual_stride}")
    if residual is None and residual_stride != 1:
        raise ValueError(f"residual_stride must be 1 without a residual, got {residual_stride}")
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be True or False, got {relu!r}")


def check_image(x: Tensor, name: str, axes: str = "[N, C, H, W]") -> None:
    """Raise unless `x` is a floating-point tensor of four dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions {axes}, got shape {list(x.shape)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must have elements of 16, 32 or 64 bits, got {x.dtype}")


def _check_like(tensor: Tensor, name: str, x: Tensor, autocast: bool) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if tensor.dtype != x.dtype and not (autocast and tensor.dtype.is_floating_point):
        raise ValueError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")


def _check_norm(norm: BatchNorm | None, x: Tensor, channels: int, name: str, autocast: bool) -> None:
    if norm is None:
        return
    if not isinstance(norm, BatchNorm):
        raise TypeError(f"{name} must be a BatchNorm, as BatchNorm.of(module) gives it, got {type(norm).__name__}")
    if isinstance(norm.eps, bool) or not isinstance(norm.eps, (int, float)):
        raise TypeError(f"{name}.eps must be a number, got {norm.eps!r}")
    if not 0 <= norm.eps <= sys.float_info.max:
        raise ValueError(f"{name}.eps must be finite and at least 0, got {norm.eps}")
    dtypes = (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,)
    for field, tensor in zip(BatchNorm._fields[:4], norm[:4], strict=True):
        if tensor is None and field in ("weight", "bias"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}.{field} must be a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != (channels,):
            raise ValueError(f"{name}.{field} must have shape [{channels}], got {list(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}.{field} must be floating point, got {tensor.dtype}")
        if tensor.dtype not in dtypes and not autocast:
            raise ValueError(
                f"{name}.{field} must be of {' or '.join(map(str, dtypes))} for such an x, got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}.{field} must be on x's device {x.device}, got {tensor.device}")
    if norm.mean.requires_grad or norm.var.requires_grad:
        raise ValueError(f"{name}.mean and {name}.var must not require a gradient, got statistics that do")


def _check_conv(x: Tensor, conv: Conv, autocast: bool, owner: str = "") -> None:
    """Check a convolution; `owner` stands before its arguments' names ("shortcut.")."""
    weight, bias, groups = conv.weight, conv.bias, conv.groups
    check_image(weight, f"{owner}weight", "[K, C / groups, R, S]")
    _check_like(weight, f"{owner}weight", x, autocast)
    k = weight.shape[0]
    if min(weight.shape) < 1:
        raise ValueError(f"{owner}weight must have no empty dimension, got shape {list(weight.shape)}")
    if groups < 1 or k % groups:
        raise ValueError(f"{owner}groups must divide the {k} output channels, got {groups}")
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(f"{owner}x must have {weight.shape[1] * groups} channels, as weight has, got {x.shape[1]}")
    for name, value, least in (
        ("stride", conv.stride, 1),
        ("padding", conv.padding, 0),
        ("dilation", conv.dilation, 1),
    ):
        if min(value) < least:
            raise ValueError(f"{owner}{name} must be at least {least}, got {value}")
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"{owner}bias must be a tensor, got {type(bias).__name__}")
        if tuple(bias.shape) != (k,):
            raise ValueError(f"{owner}bias must have shape [{k}], got {list(bias.shape)}")
        _check_like(bias, f"{owner}bias", x, autocast)
    if min(conv.output_size(x.shape[2], x.shape[3])) < 1:
        raise ValueError(f"{owner}x must be no smaller than the filter once padded, got {list(x.shape)}")
    _check_norm(conv.norm, x, k, f"{owner}norm", autocast)


def _check_residual(residual: Tensor, x: Tensor, out: tuple[int, ...], stride: int, autocast: bool) -> None:
    check_image(residual, "residual")
    _check_like(residual, "residual", x, autocast)
    n, c, h, w = residual.shape
    if (n, c, -(-h // stride), -(-w // stride)) != out:
        every = "" if stride == 1 else f" when read at a stride of {stride}"
        raise ValueError(f"residual must have shape {list(out)}{every}, got {list(residual.shape)}")


def _check_shortcut(shortcut: Shortcut, x: Tensor, out: tuple[int, ...], autocast: bool) -> None:
    if not isinstance(shortcut, Shortcut):
        raise TypeError(f"shortcut must be a Shortcut, got {type(shortcut).__name__}")
    check_image(shortcut.x, "shortcut.x")
    _check_like(shortcut.x, "shortcut.x", x, autocast)
    if _integer(shortcut.stride, "shortcut.stride") < 1:
        raise ValueError(f"shortcut.stride must be at least 1, got {shortcut.stride}")
    _check_conv(shortcut.x, shortcut.conv, autocast, "shortcut.")
    if tuple(shortcut.weight.shape[2:]) != (1, 1):
        raise ValueError(f"shortcut.weight must be a 1x1 convolution, got {list(shortcut.weight.shape)}")
    got = (shortcut.x.shape[0], shortcut.weight.shape[0], *shortcut.conv.output_size(*shortcut.x.shape[2:]))
    if got != out:
        raise ValueError(f"shortcut must have the output shape {list(out)}, got {list(got)}")
