"""Whether a call is part of a function transform or of a forward-mode derivative."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def composed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether torch's own operations must be called: in a function transform or for a forward-mode derivative.

    Ops of `torch.library` with a gradient raise under `torch.func.grad`, and have no forward-mode formulas: they would
    give zeros without a word.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or dual(tensors)


def dual(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of the tensors has a tangent, of forward-mode differentiation."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
