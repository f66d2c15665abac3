"""Networks whose results depend on nothing but what a guard can ask: their modules, attributes, tensors and the input.

A graph shows what a forward did once. Whether it would do something else by now, because of a global variable, say, or
an object that it looks into, nobody can tell of any forward; of those of torch, torchvision, timm and this package it
is known that they do not ask such things once a network is made.
"""

from __future__ import annotations

from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType

from torch import fx, jit, nn

from .swap import own_class

_PACKAGES = {"torch", "torchvision", "timm", "fused_resblock"}


def is_trusted(network: nn.Module) -> bool:
    """Whether all modules of a network, and the functions that they hold, are from packages that are known."""
    return all(map(_is_known, network.modules()))


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, (fx.GraphModule, jit.ScriptModule)):  # made of somebody's code
        return False
    return _is_from(own_class(module)) and not any(map(_is_foreign, vars(module).values()))


def _is_from(thing: object) -> bool:
    """Whether a class or a function is from a package that is known."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in _PACKAGES


def _is_foreign(value: object) -> bool:
    """Whether an attribute is a function that somebody else has written."""
    while isinstance(value, partial):
        value = value.func
    return isinstance(value, (FunctionType, MethodType, BuiltinFunctionType)) and not _is_from(value)
