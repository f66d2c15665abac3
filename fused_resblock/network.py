"""The network around residual blocks: its forward, and the classes of the stems in it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import dispatch, flat, leaves
from .formats import Spread, as_ever
from .frozen import Freezable
from .pending import Pending, allowed, scope
from .plan import Unsupported
from .stem import StemConv, StemFollower, changed, does_more
from .swap import base_class, swapped_class, undo, undone
from .tracing import Traced, traced
from .watch import untraceable


class FusedNetwork(Freezable):
    """Mixin of a network around blocks: its stems may leave work pending while its forward runs.

    If it is frozen or of a known package, and called with one tensor, its forward becomes one function; see `flat`.
    """

    LOOKS = 8  # at the graph of a network whose attributes change; then its stems are given up

    _fused_stems: tuple[tuple[str, ...], ...] = ()
    _fused_stops: tuple[str, ...] = ()  # the names of the blocks that its graph has as they are
    _fused_looks = 0
    _fused_stale = False
    _fused_format = False  # whether a stem has given what it returns another memory format

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mixin = cls.__bases__[0]
        if len(cls.__bases__) != 2 or not issubclass(mixin, FusedNetwork) or base_class(mixin) is not nn.Module:
            return  # a mixin, or derived from a class that was made here, perhaps with its own forward

        def own(self: FusedNetwork, *args: Any, **kwargs: Any) -> Any:
            return base_class(cls).forward(self, *args, **kwargs)

        def scoped(self: FusedNetwork, every: bool, args: Any, kwargs: Any) -> Any:
            with scope(every):
                y = own(self, *args, **kwargs)
                return y if type(y) is Tensor else _computed(y)

        @functools.wraps(base_class(cls).forward)  # whoever traces the network asks for the names of its arguments
        def forward(self: FusedNetwork, *args: Any, **kwargs: Any) -> Any:
            if undone(FusedNetwork, self):
                return own(self, *args, **kwargs)
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                self.look_again(*args, *kwargs.values())
                return own(self, *args, **kwargs)
            if self._fused_stale and not any(map(untraceable, (*args, *kwargs.values()))):
                self._look()
            if allowed():  # within the forward of a network around this one
                y = own(self, *args, **kwargs)
                return as_ever(self, _computed(y), (*args, *kwargs.values())) if self._fused_format else y
            image = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            if image and flat.applies(self) and dispatch.plain(args):
                y = flat.run(self, lambda x, every: scoped(self, every, (x,), {}), args[0])
            else:
                y = scoped(self, False, args, kwargs)
            return as_ever(self, y, (*args, *kwargs.values())) if self._fused_format else y

        cls.forward = forward

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        own = name == "training" or name.startswith("_fused_")
        if not own and not (isinstance(before, Tensor) and isinstance(value, Tensor)):
            self.__dict__["_fused_stale"] = True  # the forward may ask it, and read now what lies within a stem

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__["_fused_stale"] = True  # its class may have another of that name

    def _look(self) -> None:
        """Look at the graph once more, and give up the stems that are none any more."""
        self.__dict__.update(_fused_stale=False, _fused_looks=self._fused_looks + 1)
        modules = dict(self.named_modules())
        found = None
        if self._fused_looks <= self.LOOKS:
            blocks = {modules[path] for path in self._fused_stops if path in modules}
            with contextlib.suppress(Unsupported):
                found = traced(self, stops=blocks)
        kept: tuple[tuple[str, ...], ...] = ()
        if found is not None:
            stops = [path for path in self._fused_stops if path in modules]
            planned = {path: vars(modules[path]).get("_fused_plan") is not None for path in stops}
            spread = Spread(self, found.graph, planned)
            kept = tuple(spread.unnoticed(stem for stem in self._fused_stems if _is_stem(found.graph, stem)))
            self.__dict__["_fused_format"] = spread.returned(kept)
        for first, *_ in set(self._fused_stems) - set(kept):
            if first in modules:
                undo(StemConv, modules[first])
        self.__dict__["_fused_stems"] = kept
        flat.know(self, found, self._fused_frozen)


def _computed(y: Any) -> Any:
    """What a forward returns with the values of all that is pending; the very object where nothing is."""
    if not any(isinstance(leaf, Pending) for leaf in pytree.tree_leaves(y)):
        return y
    return pytree.tree_map_only(Pending, Pending.value, y, is_leaf=lambda part: isinstance(part, torch.Size))


def _is_stem(graph: fx.Graph, stem: Sequence[str]) -> bool:
    """Whether each module of a stem directly follows the one before it and alone reads it, wherever they are called."""
    for node in graph.nodes:
        end = node
        for following in stem[1:] if node.op == "call_module" and node.target == stem[0] else ():
            if list(end.users) != [end.next] or end.next.target != following:
                return False
            end = end.next
    return True


def know_graph(network: FusedNetwork, found: Traced) -> None:
    """Note which blocks the graph of a network, which was looked at just now, has as they are."""
    network.__dict__.update(_fused_stops=found.stops, _fused_looks=0, _fused_stale=False)


def fuse_stem(network: Any, stem: Sequence[str], backend: str, many: bool) -> None:
    """Give the modules of a stem, which begins with a convolution, and their network the classes that fuse them.

    Args:
        network: the network whose forward calls them.
        stem: their names in the network.
        backend: a backend's name or "auto".
        many: whether there are many such stems in the network.
    """
    first, *rest = (network.get_submodule(path) for path in stem)
    first.__dict__["_fused_backend"] = backend
    if getattr(first, "_fused_around", None) is not None:  # fused before
        return
    network.__dict__["_fused_stems"] = tuple(dict.fromkeys((*network._fused_stems, tuple(stem))))
    if not isinstance(first, StemConv):  # else somebody made it by the class of another one
        first.__class__ = swapped_class(StemConv, type(first))
    first.__dict__.update(_fused_length=len(stem), _fused_many=many)
    first.__dict__["_fused_around"] = [network.get_submodule(path) for path in _around(stem)]
    for module in rest:
        if not isinstance(module, StemFollower):  # a ReLU may serve several stems
            module.__class__ = swapped_class(StemFollower, type(module))


def _around(stem: Sequence[str]) -> list[str]:
    """The names of the modules within a network that a stem's are in."""
    parts = [path.split(".") for path in stem]
    return list(dict.fromkeys(".".join(names[:depth]) for names in parts for depth in range(1, len(names))))


def obstacle(network: FusedNetwork, stem: Sequence[str]) -> str | None:
    """Why the modules of a stem would compute one by one if they were called now; None when they would not."""
    modules = dict(network.named_modules())
    for path in _around(stem):
        if path in modules and does_more(modules[path]):
            return _besides(path, modules[path])
    for path in stem:
        module = modules.get(path)
        made = isinstance(module, StemConv) and module._fused_around is None
        if made or not isinstance(module, (StemConv, StemFollower)):
            return f"{path} was replaced"
        if does_more(module):
            return _besides(path, module)
        reason = changed(module)
        if reason is not None:
            return f"{path}: {reason}"
        if hasattr(module, "running_mean") and leaves.uses_batch_statistics(module):
            return "batch statistics (train mode)"
    return None


def _besides(path: str, module: nn.Module) -> str:
    """What runs besides the forward of its class when a module is called, in words."""
    overridden = "forward" in module.__dict__
    return f"the forward of {path} is overridden on the instance" if overridden else f"hooks on {path}"
