"""What a node of a `torch.fx` graph calls, and whether that changes its input."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .proxies import IN_PLACE

ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
#: what has another answer, or another meaning, for the same values in another memory format
OF_LAYOUT = {"as_strided", "stride", "is_contiguous", "data_ptr", "storage", "untyped_storage"}
RELUS = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}


def called(node: fx.Node) -> Any:
    """The function, or the name of the method, that a node calls; None for any other node."""
    return node.target if node.op in ("call_function", "call_method") else None


def name(node: fx.Node) -> str:
    """What a node calls, in words."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node, which calls `module` if it calls one, changes its first input."""
    if called(node) is None:
        return bool(getattr(module, "inplace", False))
    named = name(node).endswith("_") and not name(node).startswith("__")
    return named or node.target in (*IN_PLACE, operator.setitem) or _asked_to_be(node)


def _asked_to_be(node: fx.Node) -> bool:
    """Whether a function of torch is given True for its argument `inplace`."""
    if not inspect.isfunction(node.target):
        return False
    given = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs).arguments
    return bool(given.get("inplace"))
