"""What is looked up about a module, kept on the module itself, and neither copied nor pickled with it.

A `WeakKeyDictionary` would keep a module alive for ever whose value refers to it, be it by way of a hook in it that
knows the model. What lies on the module goes with it: at once where it does not refer to the module, else as one cycle.

So a forward adds to its modules' dictionaries, and whoever walks over one walks over a copy: threads share modules.
"""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

from torch import nn

T = TypeVar("T")


class _Slot:
    """A value and the module that it is of: a replica, say, is given all that its original has."""

    __slots__ = ("owner", "value")

    def __init__(self, owner: weakref.ref[nn.Module] | None = None, value: Any = None) -> None:
        self.owner, self.value = owner, value

    def __deepcopy__(self, memo: Any) -> _Slot:
        return _Slot()

    def __reduce__(self) -> Any:
        return _Slot, ()


class PerModule(Generic[T]):
    """A mapping from modules to values, each of which lies on its module.

    Args:
        name: that of the attribute, behind `_fused_`.
    """

    def __init__(self, name: str) -> None:
        self._key = f"_fused_{name}"

    def get(self, module: nn.Module) -> T | None:
        """The value of a module, None if it has none."""
        slot = module.__dict__.get(self._key)
        return slot.value if slot is not None and slot.owner is not None and slot.owner() is module else None

    def __contains__(self, module: nn.Module) -> bool:
        return self.get(module) is not None

    def __getitem__(self, module: nn.Module) -> T:
        value = self.get(module)
        if value is None:
            raise KeyError(module)
        return value

    def __setitem__(self, module: nn.Module, value: T) -> None:
        module.__dict__[self._key] = _Slot(weakref.ref(module), value)

    def pop(self, module: nn.Module) -> None:
        """Forget the value of a module, if it has one."""
        module.__dict__.pop(self._key, None)


def is_kept(value: object) -> bool:
    """Whether this attribute of a module is a value of `PerModule`."""
    return type(value) is _Slot


def forget(module: nn.Module) -> None:
    """Take all such values off a module."""
    for name in [name for name, value in module.__dict__.copy().items() if is_kept(value)]:
        module.__dict__.pop(name, None)
