"""The class swap: a module becomes an instance of a subclass of its own class, the same object with all that it holds.

So hooks, `isinstance`, `state_dict`, deepcopy and replicas go on as before, and the swap can be undone. A subclass made
at run time has no name to be found by: it is pickled as the mixin and the class that it was made of.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_classes: dict[tuple[type, type], type[Swapped]] = {}  # (mixin, class of a module) -> the subclass
_origins: dict[type, tuple[type, type]] = {}


class Swapped(nn.Module):
    """Mixin of the classes that modules are given; stands before the module's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        origin = _origins.get(type(self))
        return reduced if origin is None else (_rebuild, origin, *reduced[2:])


def register(mixin: type[Swapped], base: type[nn.Module], cls: type[Swapped]) -> None:
    """Make `cls`, which has a name of its own, the class that `swapped_class` gives."""
    _classes[mixin, base] = cls


def swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> type[Swapped]:
    """The subclass of a mixin and of a module's class: made once, and found again when an instance is unpickled."""
    if (mixin, base) not in _classes:
        attributes = {"__module__": base.__module__, "__doc__": base.__doc__}
        made = type(f"Fused{base.__name__}", (mixin, base), attributes)
        _classes[mixin, base], _origins[made] = made, (mixin, base)
    return _classes[mixin, base]


def base_class(cls: type) -> type[nn.Module]:
    """The class behind the mixin: what a module was before the swap."""
    mro = cls.__mro__
    return mro[mro.index(Swapped) + 1]


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, or what it was before the swap."""
    return base_class(type(module)) if isinstance(module, Swapped) else type(module)


def intact(mixin: type[Swapped], module: nn.Module) -> bool:
    """Whether a module's class is the one that the swap gave it, and not one derived from that since (parametrize)."""
    cls = type(module)
    return isinstance(module, mixin) and _classes.get((mixin, base_class(cls))) is cls


def undone(mixin: type[Swapped], module: object) -> bool:
    """Whether a mixin's forward is called on what it was a mixin of: whoever wrapped it has kept it since."""
    return not isinstance(module, mixin)


def undo(mixin: type[Swapped], module: nn.Module) -> None:
    """Give a module its former class back, unless its class was not made by a swap, or derived from one.

    What a mixin keeps in attributes of the module has names that begin with `_fused_`, and goes.
    """
    if not intact(mixin, module):
        return
    object.__setattr__(module, "__class__", base_class(type(module)))
    for attribute in [name for name in module.__dict__.copy() if name.startswith("_fused_")]:
        module.__dict__.pop(attribute, None)


def _rebuild(mixin: type[Swapped], base: type[nn.Module]) -> Swapped:
    cls = swapped_class(mixin, base)
    return cls.__new__(cls)
