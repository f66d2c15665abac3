"""Whether a call needs torch's dispatcher (autograd, tracing, function transforms) or can go straight to a backend."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def transformed() -> bool:
    """Whether a function transform (`torch.func.grad`, `vmap`, `jvp`, ...) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a forward-mode derivative is being taken of any of these tensors.

    `torch.library` has no forward-mode formulas and would give zeros without a word; callers take torch's own ops.
    """
    if torch.compiler.is_compiling():
        return False
    top = torch._C._functorch.peek_interpreter_stack()
    if top is not None and top.key() == torch._C._functorch.TransformType.Jvp:
        return True
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all of these are ordinary tensors in an ordinary call: no gradient wanted, nothing traced."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or transformed():
        return False
    if torch.jit.is_tracing():
        return False
    grad = torch.is_grad_enabled()
    return all(t is None or (type(t) in _PLAIN_TYPES and not (grad and t.requires_grad)) for t in tensors)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants convolutions in on x's device, or None where autocast is off."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None
