"""A frozen network's whole forward as one function: its programs, and between them what its graph shows.

Calling some ten modules, and asking each what it may do, takes 0.6 to 1 ms at batch 1, as the convolutions throw what
that needs out of the cache. Where nothing changes the answers are those of the call before. The graph is that of
`fuse`: to trace one while others serve would be wrong, as `torch.fx` puts its own call in the place of every module's.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import frozen, leaves
from .generators import Draws
from .per_module import PerModule
from .plan import Unsupported
from .program import signature
from .recorder import Recorder
from .snapshot import CONSTANT
from .tracing import Traced

Call = Callable[[Any], Any]
Emptying = Callable[[list[Any]], Any]  # takes its argument out of a list, so that this dies when it has been read
_UNKNOWN = "its graph is not known until it is fused again"  # that of a copy, or of one that could not be traced again


class Ran(NamedTuple):
    """What a forward ran in place of some of the network's modules."""

    modules: tuple[nn.Module, ...]  # as the graph of the network calls them
    made_of: object  # another one where the call would compute something else
    call: Emptying


_tape: Recorder[Ran] = Recorder("ran")
#: whether this is a forward that notes what it runs
recording = _tape.active


def note(modules: tuple[nn.Module, ...], made_of: object, call: Emptying) -> None:
    """Note what is run in place of modules, if this is a forward that asks for it; see `Ran`."""
    if recording():
        _tape.note(Ran(modules, made_of, call))


class _Flat:
    """The functions of a network, by the input's signature; the reason where there can be none."""

    LIMIT = 32  # signatures

    def __init__(self) -> None:
        self.generation = frozen.generation()
        self.functions: dict[tuple[object, ...], Call | str] = {}
        self._last: dict[tuple[object, ...], list[Ran]] = {}
        self._empty: Counter[tuple[object, ...]] = Counter()  # forwards that ran nothing

    def learn(self, key: tuple[object, ...], network: nn.Module, forward: Call, x: Tensor) -> Any:
        """What the forward makes of x; and a function of what it ran, once that was twice the same.

        Some programs are bound again at the second call. A graph may show another way than a tensor takes (`isinstance`
        tells it from what records the graph), so the function's first result must be that of the forward.
        """
        if len(self._last) >= self.LIMIT:
            self._last.clear()
            self._empty.clear()
            self.functions.clear()
        again, last = x.clone(), self._last.get(key)
        with _tape.recording() as tape:
            y = forward(x)
        self._last[key] = tape
        self._empty[key] += not tape
        if self._empty[key] > 2:
            self.functions[key] = "nothing in it runs fused"
        if tape and last is not None and _same(last, tape):
            try:
                function = _flattened(network, tape)
                with Draws():  # which are put back
                    result = function(again)
                same = _equal((result, again), (y, x))
                self.functions[key] = function if same else "its graph gives another result"
            except Unsupported as error:
                self.functions[key] = str(error)
            except Exception as error:  # whatever a graph that shows another way may raise: the forward itself is right
                self.functions[key] = f"its graph fails: {type(error).__name__}"
        return y


_flats: PerModule[_Flat] = PerModule("flat")
_graphs: PerModule[Traced] = PerModule("graph")


def know(network: nn.Module, found: Traced | None) -> None:
    """Note the graph of a network's forward in eval mode, in which blocks are single calls; None where it has none.

    A copy of the network has none until it is noted.
    """
    if found is None:
        _graphs.pop(network)
    else:
        _graphs[network] = found


def run(network: nn.Module, forward: Call, x: Tensor) -> Any:
    """What a frozen network makes of x.

    Args:
        network: in eval mode, called outside of autograd.
        forward: its own forward.
        x: its input, a plain tensor.
    """
    flat = _current(network)
    if flat is None:
        flat = _flats[network] = _Flat()
    key = (*signature(x), x.stride())
    function = flat.functions.get(key)
    if function is not None:
        return forward(x) if isinstance(function, str) else function(x)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():  # nothing can be compared in there
        return forward(x)
    return flat.learn(key, network, forward, x)


def standing(network: nn.Module) -> tuple[bool, str]:
    """Whether a frozen network is one function by now, for any input that it was called with, and in words."""
    flat = _current(network)
    functions = list(flat.functions.values()) if flat is not None else []
    reasons = [function for function in functions if isinstance(function, str)]
    if not functions:
        later = "one function from about the fourth call on"
        return False, later if network in _graphs else f"its own forward: {_UNKNOWN}"
    if not reasons:
        return True, "one function, nothing is asked again"
    some = "" if len(reasons) == len(functions) else f" for {len(reasons)} of {len(functions)} kinds of input"
    return some != "", f"its own forward{some}: {'; '.join(dict.fromkeys(reasons))}"


def _current(network: nn.Module) -> _Flat | None:
    """What is known of the network in this generation."""
    flat = _flats.get(network)
    return flat if flat is not None and flat.generation == frozen.generation() else None


def _same(a: Sequence[Ran], b: Sequence[Ran]) -> bool:
    return len(a) == len(b) and all(one.made_of is other.made_of for one, other in zip(a, b, strict=True))


def _equal(a: Any, b: Any) -> bool:
    """Whether two structures hold equal tensors; NaNs in the same places are equal."""
    (mine, form), (others, other_form) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    if form != other_form or any(type(x) is not type(y) for x, y in zip(mine, others, strict=True)):
        return False
    return all(_same_tensor(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(mine, others, strict=True))


def _same_tensor(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def _flattened(network: nn.Module, tape: Sequence[Ran]) -> Call:
    """The network's forward, made from its graph, with programs in the places of the modules that they stand for.

    Raises:
        Unsupported: if there is no graph, or the forward did not run what that shows, or if there are hooks.
    """
    if network not in _graphs:
        raise Unsupported(_UNKNOWN)
    if nn.modules.module._has_any_global_hook() or any(map(leaves.hooked, list(network.modules())[1:])):
        raise Unsupported("hooks on inner modules")
    found = _graphs[network]
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
    return fx.GraphModule(network, graph).forward


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
