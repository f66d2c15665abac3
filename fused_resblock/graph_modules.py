"""Networks that `torch.fx` has rebuilt, as torchvision's feature extractors are: their classes change under their feet.

A `GraphModule` has a class of its own, into which it writes its forward whenever it is recompiled (torchvision's do so
at each change of mode), and which it is copied and pickled without. So it is all that as what it was before the swap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from .network import FusedNetwork
from .swap import base_class, swapped_class


class FusedGraphModule(FusedNetwork):
    """Mixin of a `torch.fx.GraphModule` that is a network."""

    @contextmanager
    def _as_it_was(self) -> Iterator[Any]:
        cls = type(self)
        object.__setattr__(self, "__class__", base_class(cls))
        try:
            yield self
        finally:
            object.__setattr__(self, "__class__", cls)

    def recompile(self) -> Any:
        """As `GraphModule.recompile`; the stems are looked at again at the next call."""
        with self._as_it_was() as module:
            code = module.recompile()
        self.__dict__["_fused_stale"] = True
        return code

    def __deepcopy__(self, memo: Any) -> nn.Module:
        with self._as_it_was() as module:
            copied = module.__deepcopy__(memo)
        return _given(copied, self._noted())

    def __reduce_ex__(self, protocol: Any) -> Any:
        with self._as_it_was() as module:
            make, arguments, *_ = module.__reduce_ex__(protocol)
        return _rebuild, (make, arguments, self._noted())

    def _noted(self) -> dict[str, Any]:
        """What a copy is to know of the network."""
        names = ("_fused_stems", "_fused_stops", "_fused_looks", "_fused_stale", "_fused_frozen")
        return {name: self.__dict__[name] for name in names if name in self.__dict__}


def fuse_network(network: nn.Module) -> None:
    """Give a network the class of one, unless it has such a class."""
    if not isinstance(network, FusedNetwork):
        mixin = FusedGraphModule if isinstance(network, fx.GraphModule) else FusedNetwork
        network.__class__ = swapped_class(mixin, type(network))


def _given(module: nn.Module, noted: dict[str, Any]) -> nn.Module:
    module.__class__ = swapped_class(FusedGraphModule, type(module))
    module.__dict__.update(noted)
    return module


def _rebuild(make: Callable[..., nn.Module], arguments: tuple[Any, ...], noted: dict[str, Any]) -> nn.Module:
    return _given(make(*arguments), noted)
