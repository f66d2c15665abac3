"""Networks in NCHW, in which the result of a stem is channels_last where torch's would not be.

Values are the same. What can tell the difference is `view`, which raises where dimensions that it joins do not follow
each other in memory, and whatever asks for strides: in the network, or of what it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import dispatch, nodes
from .params import PLAIN_TYPES


def is_nchw(network: nn.Module) -> bool:
    """Whether some of a network's convolutions have weights in NCHW, or all have such as lie alike in both formats."""
    weights: list[Any] = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    plain = [w for w in weights if type(w) in PLAIN_TYPES]  # others may have no memory yet
    if not all(w.is_contiguous(memory_format=torch.channels_last) for w in plain):
        return True
    told = any(w.stride()[1:] == (1, w.shape[3] * w.shape[1], w.shape[1]) for w in plain)  # as torch tells them apart
    return len(plain) > 0 and not told


class Spread:
    """How far the memory format of a stem's result reaches in a network.

    A convolution and a norm give the format that they are given, a fused block always the same.

    Args:
        network: `nchw` tells whether it is in NCHW.
        graph: of its forward.
        blocks: of each block that the graph has as it is, whether it is fused; others may do anything.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, blocks: Mapping[str, bool]) -> None:
        self.nchw = is_nchw(network)
        self._graph, self._blocks, self._modules = graph, blocks, dict(network.named_modules())

    def unnoticed(self, stems: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Those stems, of which these are the names of the modules, whose format nothing in the network can tell."""
        return [stem for stem in stems if not (self.nchw and any(map(self._tells, self._behind(stem))))]

    def returned(self, stems: Iterable[tuple[str, ...]]) -> bool:
        """Whether the network returns what has the format of a stem's result, and would have another one."""
        return self.nchw and any(node.op == "output" for stem in stems for node in self._behind(stem))

    def _behind(self, stem: tuple[str, ...]) -> Iterator[fx.Node]:
        """What the result may reach in its memory format."""
        left = [node for node in self._graph.nodes if node.op == "call_module" and node.target == stem[0]]
        reached = set(left)
        while left:
            node = left.pop()
            yield node
            if not (self._blocks.get(str(node.target)) or _forgets(node, self._modules)):
                left += node.users.keys() - reached
                reached.update(node.users)

    def _tells(self, node: fx.Node) -> bool:
        closed = node.op == "call_module" and self._blocks.get(str(node.target)) is False
        return closed or _asks(node) or self._is_edited_view(node)

    def _is_edited_view(self, node: fx.Node) -> bool:
        """Whether what is a view in one memory format, and a copy in another, is edited while its base is in use."""
        if nodes.called(node) is None or nodes.name(node) not in ("reshape", "flatten"):
            return False
        in_use = any(isinstance(base, fx.Node) and len(base.users) > 1 for base in node.args[:1])
        return in_use and any(nodes.in_place(user, self._modules.get(str(user.target))) for user in node.users)


def as_ever(network: nn.Module, y: Any, inputs: Iterable[Any]) -> Any:
    """What a network returns, in the memory format in which it would: if it is in NCHW, channels_last if an input is.

    Args:
        network: what has run; it may have been brought into channels_last since it was fused.
        y: what it returns.
        inputs: what it was called with; what shares their memory stays as it is.
    """
    given = [x for x in inputs if isinstance(x, Tensor)]
    if not dispatch.plain(given) or any(map(_is_channels_last, given)):
        return y
    kept = {x.untyped_storage().data_ptr() for x in given}
    found = [part for part in pytree.tree_leaves(y) if isinstance(part, Tensor) and _is_channels_last(part)]
    parts = {id(part): part for part in found if part.untyped_storage().data_ptr() not in kept}
    if not parts or not is_nchw(network):
        return y
    made = {key: part.contiguous() for key, part in parts.items()}
    return pytree.tree_map_only(Tensor, lambda part: made.get(id(part), part), y)


def _is_channels_last(x: Tensor) -> bool:
    if type(x) not in PLAIN_TYPES or x.layout is not torch.strided or x.dim() != 4 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def _asks(node: fx.Node) -> bool:
    """Whether a node may give something else, or raise, for the same values in another memory format."""
    return nodes.called(node) is not None and nodes.name(node) in ("view", "view_as", *nodes.OF_LAYOUT)


def _forgets(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether what a node gives lies in memory as ever, whatever the memory format of its input."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    if module is not None:
        to_one = isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
        return to_one or (isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1))
    what, given = nodes.called(node), [*node.args[1:], *node.kwargs.values()]
    if what in (torch.flatten, "flatten"):
        return given == [1]
    if what is F.adaptive_avg_pool2d:
        return given in ([1], [(1, 1)])
    numbers = what in ("size", "dim") or (what is getattr and given[0] in ("shape", "ndim", "dtype", "device"))
    return numbers or (what == "contiguous" and not given)
