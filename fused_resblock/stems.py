"""Finding stems: the networks that may hold some, their graphs, and what in these is a stem."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import fx, nn

from . import leaves, nodes
from .network import FusedNetwork
from .params import PLAIN_TYPES
from .plan import Unsupported
from .stem import StemConv
from .swap import Swapped, swapped_class
from .tracing import Traced, traced


def find_networks(
    module: nn.Module, blocks: Collection[nn.Module], stops: Collection[nn.Module], name: str = ""
) -> Iterator[tuple[str, Traced]]:
    """The name and the graph, in eval mode, of every network that holds residual blocks or may hold stems.

    Where a forward cannot be traced, the modules in it are looked at one by one.

    Args:
        module: what may be or hold networks.
        blocks: all residual blocks in it.
        stops: those of them whose calls a graph has as they are; see `opened`.
        name: the module's.
    """
    alone = module in blocks and not isinstance(module, fx.GraphModule)  # one that `torch.fx` made has no blocks
    if alone or not (any(m in blocks for m in module.modules()) or _may_hold_stems(module)):
        return
    try:
        if not isinstance(module, FusedNetwork):
            swapped_class(FusedNetwork, type(module))
        found = traced(module, stops=stops)
    except Exception:  # no graph, or no class can be derived from the module's
        for child_name, child in module.named_children():
            yield from find_networks(child, blocks, stops, f"{name}.{child_name}" if name else child_name)
    else:
        yield name, found


def _may_hold_stems(module: nn.Module) -> bool:
    """Whether there are convolutions in a module, and what may follow them in a stem."""
    inner = list(module.modules())[1:]
    ends = (nn.ReLU, nn.modules.batchnorm._BatchNorm)
    followed = any(isinstance(m, ends) or leaves.is_frozen_norm(m) for m in inner)
    return followed and any(isinstance(m, nn.Conv2d) for m in inner)


def opened(kept: Iterable[nn.Module]) -> set[nn.Module]:
    """The blocks, of those that are not fused, in which a network's graph shows what happens."""
    return set(filter(_is_open, kept))


def _is_open(block: nn.Module) -> bool:
    """Whether the graph of a network may show the forward of a block, and stems be found in it.

    Not if other things happen when it is called, nor if it asks for a memory format.
    """
    try:
        leaves.check_untouched(block)
        graph, doubt, _ = traced(block)
    except Unsupported:
        return False
    asked = {nodes.name(node) for node in graph.nodes if nodes.called(node)}
    return doubt is None and asked.isdisjoint(nodes.OF_LAYOUT)


def find_stems(module: nn.Module, graph: fx.Graph) -> list[tuple[str, ...]]:
    """The names, within a network, of the modules of every stem in the graph of its forward; fused ones come first.

    A stem is a convolution followed by a batch norm, a ReLU and a max-pool, some of which may be absent, each of them
    reading the one before it and nothing else reading what lies between; the same ones wherever it is called.
    """
    modules = dict(module.named_modules())
    fused: tuple[tuple[str, ...], ...] = module._fused_stems if isinstance(module, FusedNetwork) else ()
    found = [stem for stem in fused if isinstance(modules.get(stem[0]), StemConv)]
    rows: dict[str, set[tuple[str, ...]]] = {}  # of each convolution, for every call of it
    for node in graph.nodes:
        if node.op == "call_module" and _kind(modules[str(node.target)]) == 0:
            rows.setdefault(str(node.target), set()).add(_row(node, modules))
    return found + [row for (row, *others) in rows.values() if len(row) > 1 and not others]


def _row(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """The names of a convolution that a node calls and of what could be a stem with it."""
    names, kind = [str(node.target)], 0
    while len(node.users) == 1 and node.next in node.users:
        node = node.next
        following = modules[str(node.target)] if node.op == "call_module" and not node.kwargs else None
        if following is None or _kind(following) <= kind:
            break
        kind = _kind(following)
        names.append(str(node.target))
    return tuple(names)


def worth_it(network: nn.Module, stems: Sequence[tuple[str, ...]], fused: bool, nchw: bool) -> bool:
    """Whether to fuse these stems of a network makes it faster.

    Not on a CPU in NCHW where most of its convolutions run as they are: a stem's result is channels_last, and to bring
    their weights into that form at every call takes more time than the stems save.

    Args:
        network: what holds the stems.
        stems: as `find_stems` gives them.
        fused: whether any of its blocks are.
        nchw: whether it is in NCHW.
    """
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    on_gpu = any(type(conv.weight) in PLAIN_TYPES and conv.weight.is_cuda for conv in convs)
    return fused or on_gpu or not nchw or 2 * len(stems) >= len(convs)


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
