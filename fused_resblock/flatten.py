"""A function that does what a network's forward did: its graph, with what ran in place of modules called in theirs."""

from __future__ import annotations

import copy
import linecache
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import leaves
from .generators import Draws
from .plan import Unsupported
from .snapshot import CONSTANT
from .tracing import Traced

Call = Callable[[Any], Any]
Emptying = Callable[[list[Any]], Any]  # takes its argument out of a list, so that this dies when it has been read


class Ran(NamedTuple):
    """What a forward ran in place of some of the network's modules."""

    modules: tuple[nn.Module, ...]  # as the graph of the network calls them
    made_of: object  # another one where the call would compute something else
    call: Emptying


def checked(
    network: nn.Module, found: Traced, tape: Sequence[Ran], x: Tensor, expected: tuple[Any, Tensor]
) -> Call | str:
    """The function of a network, or the reason why there can be none.

    Args:
        network: what has run.
        found: the graph of its forward.
        tape: what it ran.
        x: the input.
        expected: the result, and what has become of the input.
    """
    try:
        function = _flattened(network, found, tape)
        with Draws():  # which are put back
            result = function(x)
        return function if _equal((result, x), expected) else "its graph gives another result"
    except Unsupported as error:
        return str(error)
    except Exception as error:  # whatever a graph that shows another way may raise: the forward itself is right
        return f"its graph fails: {type(error).__name__}"


def _flattened(network: nn.Module, found: Traced, tape: Sequence[Ran]) -> Call:
    """The network's forward, made from its graph, with programs in the places of the modules that they stand for.

    Raises:
        Unsupported: if the forward did not run what its graph shows, or if there are hooks.
    """
    if nn.modules.module._has_any_global_hook() or any(map(leaves.hooked, list(network.modules())[1:])):
        raise Unsupported("hooks on inner modules")
    if found.doubt is not None:
        raise Unsupported(found.doubt)
    if any(node.op == "get_attr" and str(node.target).startswith(CONSTANT) for node in found.graph.nodes):
        raise Unsupported("its forward makes a tensor of numbers")
    graph = copy.deepcopy(found.graph)
    modules = dict(network.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    called = [modules[str(node.target)] for node in nodes]
    for number, (start, end, calls) in enumerate(_runs(tape, nodes, called)):
        run = nodes[start:end]
        with graph.inserting_before(run[0]):
            joined = graph.call_function(_named(calls, number), run[0].args)
        run[-1].replace_all_uses_with(joined)
        for node in reversed(run):
            graph.erase_node(node)
    module = fx.GraphModule(network, graph)
    file = type(module).forward.__code__.co_filename  # whose source is kept for tracebacks, for ever
    fx.graph_module._loader.eval_cache.pop(file, None)
    linecache.cache.pop(file, None)
    return module.forward


def _runs(
    tape: Sequence[Ran], nodes: Sequence[fx.Node], called: Sequence[nn.Module]
) -> list[tuple[int, int, list[Emptying]]]:
    """What a forward ran, put together where one thing reads the result of another and nothing else reads that.

    So no function that stands between two of them has to do with that result, and it may as well run behind both.

    Args:
        tape: what it ran.
        nodes: the calls of modules in its graph.
        called: these modules.

    Returns:
        The first node, the one behind the last, and what was run in place of them.

    Raises:
        Unsupported: if the graph shows something else.
    """
    runs: list[tuple[int, int, list[Emptying]]] = []
    start = end = 0
    for ran in tape:
        after = end + len(ran.modules)
        if runs and _stands_for(nodes[start:after], called[start:after], [*called[start:end], *ran.modules]):
            runs[-1] = start, after, [*runs[-1][2], ran.call]
        else:
            start = called.index(ran.modules[0], end) if ran.modules[0] in called[end:] else len(called)
            after = start + len(ran.modules)
            if not _stands_for(nodes[start:after], called[start:after], ran.modules):
                raise Unsupported("it did not run what its graph shows")
            runs.append((start, after, [ran.call]))
        end = after
    return runs


def _stands_for(run: Sequence[fx.Node], called: Sequence[nn.Module], modules: Sequence[nn.Module]) -> bool:
    """Whether nodes call these modules, each on the result of the one before, which nothing else reads."""
    alone = all(len(node.args) == 1 and not node.kwargs for node in run)
    joined = all(b.args[0] is a and len(a.users) == 1 for a, b in pairwise(run))
    return len(run) > 0 and list(called) == list(modules) and alone and joined


def _named(calls: Sequence[Emptying], number: int) -> Call:
    """Calls, each on the result of the one before, as a function with a name of its own, which a graph's code needs."""

    def program(x: Any) -> Any:
        held = [x]
        del x
        for call in calls:
            held = [call(held)]
        return held[0]

    program.__name__ = program.__qualname__ = f"program_{number}"
    return program


def _equal(a: Any, b: Any) -> bool:
    """Whether two structures hold equal tensors; NaNs in the same places are equal."""
    (mine, form), (others, other_form) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    if form != other_form or any(type(x) is not type(y) for x, y in zip(mine, others, strict=True)):
        return False
    return all(_same_tensor(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(mine, others, strict=True))


def _same_tensor(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
