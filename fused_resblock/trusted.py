"""Networks whose results depend on nothing but what a guard can ask: their modules, attributes, tensors and the input.

A graph shows what a forward did once. Whether it would do something else by now, because of a global variable, say, or
an object that it looks into, nobody can tell of any forward; of those of torch, torchvision, timm and this package it
is known that they do not ask such things once a network is made.
"""

from __future__ import annotations

from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType

from torch import nn

from .swap import own_class

_PACKAGES = {"torch", "torchvision", "timm", "fused_resblock"}


def is_trusted(network: nn.Module) -> bool:
    """Whether all modules of a network, and the functions that they hold, are from packages that are known."""
    modules = list(network.modules())
    classes = {cls for module in modules for cls in own_class(module).__mro__ if cls is not object}
    held = (value for thing in (*modules, *classes) for value in vars(thing).copy().values())
    return all(map(_is_from, classes)) and not any(map(_is_foreign, held))


def _is_from(thing: object) -> bool:
    """Whether a class or a function is from a package that is known."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in _PACKAGES


def _is_foreign(value: object) -> bool:
    """Whether an attribute is a function, or can be called like one, that somebody else has written."""
    while isinstance(value, partial):
        value = value.func
    named = isinstance(value, (type, FunctionType, MethodType, BuiltinFunctionType))
    return callable(value) and not isinstance(value, nn.Module) and not _is_from(value if named else type(value))
