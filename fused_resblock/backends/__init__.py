"""Where a fused operation runs: four backends with the same functions, and the choice between them.

Each backend is a module with `unavailable()` (why it cannot be used on this machine), `unsupported(problem)` (why it
cannot run one operation), `conv_bn_act` and `bn_act`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..params import BatchNorm, Conv, output_size
from . import cudnn, eager, onednn, triton
from .select import Choice, Problem, preference, select

Shape = Sequence[int]
BACKENDS: dict[str, ModuleType] = {"triton": triton, "cudnn": cudnn, "onednn": onednn, "eager": eager}

__all__ = [
    "BACKENDS",
    "Choice",
    "Problem",
    "bn_act",
    "check_name",
    "clear_caches",
    "conv_bn_act",
    "relu_backward",
    "resolve",
    "select",
]


def check_name(backend: str) -> str:
    """Return `backend`, or the value of `FUSED_RESBLOCK_BACKEND` in place of "auto".

    Raises:
        ValueError: if it is neither "auto" nor a backend.
        RuntimeError: if the backend is not available on this machine.
    """
    source = "backend"
    if backend == "auto":
        backend = os.environ.get("FUSED_RESBLOCK_BACKEND") or "auto"
        source = "FUSED_RESBLOCK_BACKEND"
    if backend == "auto":
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = BACKENDS[backend].unavailable()
    if reason is not None:
        raise RuntimeError(f"{source} must be available on this machine, got {backend!r}: {reason}")
    return backend


def refusal(name: str, problem: Problem) -> str | None:
    """Why the backend cannot run the problem on this machine; None when it can."""
    return BACKENDS[name].unavailable() or BACKENDS[name].unsupported(problem)


@cache
def resolve(backend: str, problem: Problem) -> Choice:
    """The backend that runs `problem`: the named one, or `select`'s choice for "auto".

    A named backend that cannot run this problem (its device or dtype) gives way to `eager`; the reason says so.
    """
    if backend == "auto":
        return select(problem, {name: refusal(name, problem) for name, _ in preference(problem)})
    reason = refusal(backend, problem)
    return Choice(backend, "forced") if reason is None else Choice("eager", f"{backend}: {reason}")


def conv_problem(device: str, dtype: torch.dtype, shape: Shape, weight_shape: Shape, *geometry: Any) -> Problem:
    """What `select` needs to know of a convolution: of x its device, dtype and shape; of `Conv` all but the tensors."""
    n, channels, h, w = shape
    k, _, r, s = weight_shape
    p, q = output_size(h, w, r, s, *geometry[:3])
    padding, dilation, groups = geometry[1:]
    overpadded = max(dilation) > 1 and any(
        pad > step * (taps - 1) for pad, step, taps in zip(padding, dilation, (r, s), strict=True)
    )
    reach = ((r - 1) * dilation[0] * w + (s - 1) * dilation[1] + 1) * channels
    return Problem(device, dtype, "conv", channels, k, (r, s), groups, n * max(h * w, p * q), reach, overpadded)


@lru_cache(maxsize=4096)
def _chosen(backend: str, *description: Any) -> str:
    return resolve(backend, conv_problem(*description)).backend


def _dense(x: Any) -> Any:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def conv_bn_act(
    x: Tensor,
    conv: Conv,
    *,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    shortcut: tuple[Tensor, Conv] | None = None,
    relu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Run the operation of `functional.conv_bn_act` on the backend that `resolve` names, without autograd.

    Every layout is accepted and made channels_last; the weight may be wider than x and is then rounded to its dtype.
    """
    n, _, h, w = x.shape
    if n == 0:
        size = (0, conv.weight.shape[0], *conv.output_size(h, w))
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if shortcut is not None:
        shortcut = (_dense(shortcut[0]), shortcut[1])
    run = BACKENDS[_chosen(backend, x.device.type, x.dtype, x.shape, conv.weight.shape, *conv[3:])].conv_bn_act
    x, residual = _dense(x), _dense(residual)
    y = run(x, conv, residual=residual, residual_stride=residual_stride, shortcut=shortcut, relu=relu)
    return _dense(y)  # with one channel or one pixel, torch's own operations may pick another format


def bn_act(
    x: Tensor, norm: BatchNorm | None, *, residual: Tensor | None = None, backend: str = "auto", **epilogue: Any
) -> Tensor:
    """Run the operation of `functional.bn_act` on the backend that `resolve` names, without autograd."""
    if x.shape[0] == 0:
        return torch.empty_like(x, memory_format=torch.channels_last)
    if norm is None and residual is None and not epilogue["relu"]:
        return x.clone(memory_format=torch.channels_last)  # the result is never x itself
    n, channels, h, w = x.shape
    problem = Problem(x.device.type, x.dtype, "bn_act", channels, channels, pixels=n * h * w)
    run = BACKENDS[resolve(backend, problem).backend].bn_act
    return _dense(run(_dense(x), norm, residual=_dense(residual), **epilogue))


def relu_backward(dy: Tensor, y: Tensor | None, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`dz = dy * (y > 0)` (dy itself where y is None) and its sum over N, H, W in fp32 or wider."""
    n, channels, h, w = dy.shape
    problem = Problem(dy.device.type, dy.dtype, "bn_act", channels, channels, pixels=n * h * w)
    if n and resolve(backend, problem).backend == "triton":
        return triton.relu_backward(_dense(dy), _dense(y))
    dz = dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
    return dz, dz.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32))


def clear_caches() -> None:
    """Forget every folded or repacked weight, as after an edit through `tensor.data` that PyTorch does not record."""
    for caches in (triton._channels_last_weights, cudnn._folded, onednn._packed):
        caches.clear()
