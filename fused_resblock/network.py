"""The network around residual blocks: its forward, and the stems that are found in its graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import dispatch, flat, leaves, nodes
from .frozen import Freezable
from .params import PLAIN_TYPES
from .pending import Pending, allowed, scope
from .plan import Unsupported
from .stem import StemConv, StemFollower, changed, hooked
from .swap import Swapped, base_class, swapped_class, undo, undone
from .tracing import Traced, traced

_OF_FORMAT = {*nodes.OF_LAYOUT, "view"}


class FusedNetwork(Freezable):
    """Mixin of a network around blocks: its stems may leave work pending while its forward runs.

    If it is frozen, and called with one tensor, its forward becomes one function; see `flat`.
    """

    LOOKS = 8  # at the graph of a network whose attributes change; then its stems are given up

    _fused_stems: tuple[tuple[str, ...], ...] = ()
    _fused_stops: tuple[str, ...] = ()  # the names of the blocks that its graph has as they are
    _fused_looks = 0
    _fused_stale = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if FusedNetwork not in cls.__bases__:  # derived from a class that was made here, perhaps with its own forward
            return
        own = base_class(cls).forward

        def scoped(self: FusedNetwork, *args: Any, **kwargs: Any) -> Any:
            if allowed():
                return own(self, *args, **kwargs)
            with scope():
                y = own(self, *args, **kwargs)
                return y if type(y) is Tensor else _computed(y)

        @functools.wraps(own)  # whoever traces the network asks for the names of its arguments
        def forward(self: FusedNetwork, *args: Any, **kwargs: Any) -> Any:
            if undone(FusedNetwork, self):
                return own(self, *args, **kwargs)
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                self.look_again(*args, *kwargs.values())
                return own(self, *args, **kwargs)
            if self._fused_stale and not any(isinstance(x, fx.Proxy) for x in (*args, *kwargs.values())):
                self._look()
            image = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            if image and self.unasked() and dispatch.plain(args):
                return flat.run(self, functools.partial(scoped, self), args[0])
            return scoped(self, *args, **kwargs)

        cls.forward = forward

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        own = name == "training" or name.startswith("_fused_")
        if not own and not (isinstance(before, Tensor) and isinstance(value, Tensor)):
            self.__dict__["_fused_stale"] = True  # the forward may ask it, and read now what lies within a stem

    def _look(self) -> None:
        """Look at the graph once more, and give up the stems that are none any more."""
        self.__dict__.update(_fused_stale=False, _fused_looks=self._fused_looks + 1)
        modules = dict(self.named_modules())
        found = None
        if self._fused_looks <= self.LOOKS:
            blocks = {modules[path] for path in self._fused_stops if path in modules}
            with contextlib.suppress(Unsupported):
                found = traced(self, stops=blocks)
        kept = tuple(stem for stem in self._fused_stems if found is not None and _is_stem(found.graph, stem))
        for first, *_ in set(self._fused_stems) - set(kept):
            if first in modules:
                undo(StemConv, modules[first])
        self.__dict__["_fused_stems"] = kept
        flat.know(self, found if self._fused_frozen else None)


def _computed(y: Any) -> Any:
    """What a forward returns with the values of all that is pending; the very object where nothing is."""
    if not any(isinstance(leaf, Pending) for leaf in pytree.tree_leaves(y)):
        return y
    return pytree.tree_map_only(Pending, Pending.value, y, is_leaf=lambda part: isinstance(part, torch.Size))


def find_networks(
    module: nn.Module, blocks: Collection[nn.Module], kept: Collection[nn.Module] = (), name: str = ""
) -> Iterator[tuple[str, Traced]]:
    """The name and the graph, in eval mode, of every network around residual blocks, itself outside of them.

    Where a forward cannot be traced, the modules in it that hold blocks are looked at one by one.

    Args:
        module: what may be or hold networks.
        blocks: all residual blocks in it; a graph has their calls as they are.
        kept: those of them that are not fused; a graph shows what happens within them where that can be traced.
        name: the module's.
    """
    alone = module in blocks and not isinstance(module, fx.GraphModule)  # one that `torch.fx` made has no blocks
    if alone or not any(m in blocks for m in module.modules()):
        return
    try:
        if not isinstance(module, FusedNetwork):
            swapped_class(FusedNetwork, type(module))
        found = traced(module, stops={m for m in blocks if not (m in kept and _is_open(m))})
    except Exception:  # no graph, or no class can be derived from the module's
        for child_name, child in module.named_children():
            yield from find_networks(child, blocks, kept, f"{name}.{child_name}" if name else child_name)
    else:
        yield name, found


def _is_open(block: nn.Module) -> bool:
    """Whether the graph of a network may show the forward of a block, and stems be found in it.

    Not if other things happen when it is called, nor if it asks for a memory format: a stem's result is channels_last.
    """
    try:
        leaves.check_untouched(block)
        graph, doubt, _ = traced(block)
    except Unsupported:
        return False
    return doubt is None and not any(nodes.called(n) and nodes.name(n) in _OF_FORMAT for n in graph.nodes)


def find_stems(module: nn.Module, graph: fx.Graph) -> list[tuple[str, ...]]:
    """The names, within a network, of the modules of every stem in the graph of its forward; fused ones come first.

    A stem is a convolution followed by a batch norm, a ReLU and a max-pool, some of which may be absent, each of them
    reading the one before it and nothing else reading what lies between.
    """
    modules = dict(module.named_modules())
    fused: tuple[tuple[str, ...], ...] = module._fused_stems if isinstance(module, FusedNetwork) else ()
    found = [stem for stem in fused if isinstance(modules.get(stem[0]), StemConv)]
    for node in graph.nodes:
        names, kind, end = [str(node.target)], 0, node
        if node.op != "call_module" or _kind(modules[names[0]]) != 0:
            continue
        while len(end.users) == 1 and end.next in end.users:
            end = end.next
            following = modules[str(end.target)] if end.op == "call_module" and not end.kwargs else None
            if following is None or _kind(following) <= kind:
                break
            kind = _kind(following)
            names.append(str(end.target))
        if len(names) > 1:
            found.append(tuple(names))
    return found


def worth_it(network: nn.Module, stems: Sequence[tuple[str, ...]], fused: bool) -> bool:
    """Whether to fuse these stems of a network makes it faster.

    Not on a CPU in NCHW where most of its convolutions run as they are: a stem's result is channels_last, and to bring
    their weights into that form at every call takes more time than the stems save.

    Args:
        network: what holds the stems.
        stems: as `find_stems` gives them.
        fused: whether any of its blocks are.
    """
    weights: list[Any] = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    plain = [w for w in weights if type(w) in PLAIN_TYPES]  # others may have no memory yet
    nchw = any(not (w.is_cuda or w.is_contiguous(memory_format=torch.channels_last)) for w in plain)
    return fused or not nchw or 2 * len(stems) >= len(weights)


def _is_stem(graph: fx.Graph, stem: Sequence[str]) -> bool:
    """Whether each module of a stem directly follows the one before it and alone reads it, wherever they are called."""
    for node in graph.nodes:
        end = node
        for following in stem[1:] if node.op == "call_module" and node.target == stem[0] else ():
            if list(end.users) != [end.next] or end.next.target != following:
                return False
            end = end.next
    return True


def _kind(module: nn.Module) -> int:
    """0 for a convolution, 1 for a norm, 2 for a ReLU, 3 for a max-pool that a stem may hold; -1 for anything else."""
    if isinstance(module, Swapped):
        return -1
    try:
        leaves.check_untouched(module)
        if isinstance(module, nn.Conv2d):
            leaves.conv_geometry(module)
            return 0
        if type(module) is nn.ReLU:
            return 2
        if type(module) is nn.MaxPool2d:
            return -1 if module.return_indices else 3
        leaves.norm_relu(module)
    except Unsupported:
        return -1
    return 1


def fuse_network(network: nn.Module) -> None:
    """Give a network, without any stem so far, the class of one."""
    network.__class__ = swapped_class(FusedNetwork, type(network))


def know_graph(network: FusedNetwork, found: Traced) -> None:
    """Note which blocks the graph of a network, which was looked at just now, has as they are."""
    network.__dict__.update(_fused_stops=found.stops, _fused_looks=0, _fused_stale=False)


def fuse_stem(network: Any, stem: Sequence[str], backend: str, inner: bool) -> None:
    """Give the modules of a stem, which begins with a convolution, and their network the classes that fuse them.

    Args:
        network: the module whose forward calls them.
        stem: their names in the network.
        backend: a backend's name or "auto".
        inner: whether they are within a block.
    """
    if not isinstance(network, FusedNetwork):
        fuse_network(network)
    first, *rest = (network.get_submodule(path) for path in stem)
    first.__dict__["_fused_backend"] = backend
    if getattr(first, "_fused_around", None) is not None:  # fused before
        return
    network.__dict__["_fused_stems"] = tuple(dict.fromkeys((*network._fused_stems, tuple(stem))))
    if not isinstance(first, StemConv):  # else somebody made it by the class of another one
        first.__class__ = swapped_class(StemConv, type(first))
    first.__dict__.update(_fused_length=len(stem), _fused_inner=inner)
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
        if path in modules and hooked(modules[path]):
            return f"hooks on {path}"
    for path in stem:
        module = modules.get(path)
        made = isinstance(module, StemConv) and module._fused_around is None
        if made or not isinstance(module, (StemConv, StemFollower)):
            return f"{path} was replaced"
        if hooked(module):
            return f"hooks on {path}"
        if "forward" in module.__dict__:
            return f"the forward of {path} is overridden on the instance"
        reason = changed(module)
        if reason is not None:
            return f"{path}: {reason}"
        if hasattr(module, "running_mean") and leaves.uses_batch_statistics(module):
            return "batch statistics (train mode)"
    return None
