"""A network's whole forward as one function: its programs, and between them what its graph shows.

Calling some ten modules, and asking each what it may do, takes 0.6 to 1 ms at batch 1, as the convolutions throw what
that needs out of the cache; a network with 90 stems takes 5 ms longer. Where nothing changes the answers are those of
the call before: that is promised of a frozen network, and asked of others once a call, of all modules together. The
graph is that of `fuse`: to trace one while others serve would be wrong, as `torch.fx` puts its own call in the place of
every module's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, dispatch, frozen
from .flatten import Call, Emptying, Ran, checked
from .per_module import PerModule
from .program import signature
from .recorder import Recorder
from .tracing import Traced
from .trusted import is_trusted
from .watch import COUNTER, Entry, Guard, layout

_UNKNOWN = "its graph is not known until it is fused again"  # that of a copy, or of one that could not be traced again


#: a network's own forward, of an input; and whether every stem is joined in it, or only those that pay
Forward = Callable[[Tensor, bool], Any]

_tape: Recorder[Ran] = Recorder("ran")
#: whether this is a forward that notes what it runs
recording = _tape.active


def note(modules: tuple[nn.Module, ...], made_of: object, call: Emptying) -> None:
    """Note what is run in place of modules, if this is a forward that asks for it; see `Ran`."""
    if recording():
        _tape.note(Ran(modules, made_of, call))


class _Flat:
    """The functions of a network, by the input's signature; the reason where there can be none.

    Args:
        network: what they are of.
        last: those that did not hold any more.
    """

    LIMIT = 128  # signatures
    WORTH = 16  # calls that have to follow for it to be worth learning
    LONGEST = 1000  # rest

    def __init__(self, network: Any, last: _Flat | None) -> None:
        self._generation = frozen.generation()
        self._caches = backends.generation
        self._frozen = network._fused_frozen
        self._guard: Guard | None = None
        self._uses = 0
        often = last is not None and not self._frozen and last._uses < self.WORTH
        self._patience: int = min(2 * last._patience + 1, self.LONGEST) if last is not None and often else 0
        self._rest = self._patience
        self.functions: dict[tuple[object, ...], Call | str] = {}
        self._last: dict[tuple[object, ...], list[Ran]] = {}
        self._empty: Counter[tuple[object, ...]] = Counter()  # forwards that ran nothing

    def holds(self, network: Any) -> bool:
        """Whether the network is as it was, frozen if it was, and the caches were not cleared."""
        if self._caches != backends.generation:
            return False
        if self._frozen or network._fused_frozen:
            return self._frozen and self._generation == frozen.generation()
        return self._guard is None or self._guard.holds()

    def rests(self) -> bool:
        """Whether to leave this call alone: the network changes too often."""
        self._rest -= 1
        return self._rest >= 0

    def use(self, key: tuple[object, ...]) -> Call | str | None:
        """The function for such an input."""
        self._uses += 1
        return self.functions.get(key)

    def learn(self, key: tuple[object, ...], network: nn.Module, forward: Forward, x: Tensor) -> Any:
        """What the forward makes of x; and a function of what it ran, once that was twice the same.

        Some programs are bound again at the second call. A graph may show another way than a tensor takes (`isinstance`
        tells it from what records the graph), so the function's first result must be that of the forward.
        """
        if frozen.substituted():
            return forward(x, False)
        if len(self._last) >= self.LIMIT:
            self._last.clear()
            self._empty.clear()
            self.functions.clear()
        again, last = x.clone(), self._last.get(key)
        if last is not None and not self._frozen and self._guard is None and not self._begin(network):
            return forward(x, False)
        with _tape.recording() as tape:
            y = forward(x, True)
        self._last[key] = tape
        self._empty[key] += not tape
        if self._empty[key] > 2:
            self.functions[key] = "nothing in it runs fused"
        if tape and last is not None and _same(last, tape):
            known = _graphs.get(network)
            self.functions[key] = _UNKNOWN if known is None else checked(network, known.found, tape, again, (y, x))
        if isinstance(self.functions.get(key), str) and self._guard is not None and self._guard.holds():
            know(network, None)  # it leads nowhere, which nothing that has changed meanwhile explains
        return y

    def _begin(self, network: nn.Module) -> bool:
        """Have everything watched from now on; False if that is of no use."""
        known = _graphs.get(network)
        if known is None or layout(network) != known.layout or not is_trusted(network):
            know(network, None)
            return False
        modules = list(network.modules())
        attributes = [
            value for module in modules for value in vars(module).copy().values() if isinstance(value, Tensor)
        ]
        buffers = [buffer for name, buffer in network.named_buffers() if name.rpartition(".")[2] != COUNTER]
        tensors = [*network.parameters(), *buffers, *attributes]
        if not dispatch.plain(tensors):  # some have no memory that could be looked at
            know(network, None)
            return False
        if any(module.training for module in modules) or any(t.is_inference() for t in tensors):  # no changes recorded
            self._rest = self._patience = min(2 * self._patience + 1, self.LONGEST)
            return False
        self._guard = Guard(modules, tensors, all_modes=True)
        return True


class _Known(NamedTuple):
    """The graph of a network's forward, and the modules that it is of."""

    found: Traced
    layout: tuple[Entry, ...]


_flats: PerModule[_Flat] = PerModule("flat")
_graphs: PerModule[_Known] = PerModule("graph")


def know(network: nn.Module, found: Traced | None, promised: bool = False) -> None:
    """Note the graph of a network's forward in eval mode, in which blocks are single calls; None where it has none.

    A copy of the network has no graph until it is noted.

    Args:
        network: unless frozen, its graph is of use only if a guard can tell whether it is as it was; see `trusted`.
        found: the graph.
        promised: whether it is frozen.
    """
    _flats.pop(network)
    if found is not None and (promised or is_trusted(network)):
        _graphs[network] = _Known(found, layout(network))
    else:
        _graphs.pop(network)


def applies(network: Any) -> bool:
    """Whether a network may run as one function, in its present mode."""
    return not network.training and (network._fused_frozen or network in _graphs)


def run(network: nn.Module, forward: Forward, x: Tensor) -> Any:
    """What a network to which this `applies` makes of x.

    Args:
        network: called outside of autograd.
        forward: its own forward.
        x: its input, a plain tensor.
    """
    flat = _flats.get(network)
    if flat is None or not flat.holds(network):
        flat = _flats[network] = _Flat(network, flat)
    if flat.rests():
        return forward(x, False)
    key = (*signature(x), x.stride())
    function = flat.use(key)
    if function is not None and not isinstance(function, str):
        return function(x)
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or function is not None:  # in a capture nothing can be compared, and to ask takes no time
        return forward(x, capturing)
    return flat.learn(key, network, forward, x)


def standing(network: nn.Module) -> tuple[bool, str]:
    """Whether a frozen network is one function by now, for any input that it was called with, and in words."""
    flat = _flats.get(network)
    functions = list(flat.functions.values()) if flat is not None and flat.holds(network) else []
    reasons = [function for function in functions if isinstance(function, str)]
    if not functions:
        later = "one function from about the fourth call on"
        return False, later if network in _graphs else f"its own forward: {_UNKNOWN}"
    if not reasons:
        return True, "one function, nothing is asked again"
    some = "" if len(reasons) == len(functions) else f" for {len(reasons)} of {len(functions)} kinds of input"
    return some != "", f"its own forward{some}: {'; '.join(dict.fromkeys(reasons))}"


def _same(a: Sequence[Ran], b: Sequence[Ran]) -> bool:
    return len(a) == len(b) and all(one.made_of is other.made_of for one, other in zip(a, b, strict=True))
