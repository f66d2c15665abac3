"""Chains of blocks that wait until somebody asks for the last one's values: activations die when they have been read.

A network such as `x = self.layer1(x); x = self.layer2(x)` holds each chain's input for as long as the chain runs: in a
ResNet-50 in fp16 at batch 128 that is 73 of 432 MiB. Here a call of a chain gives a `PendingChain`, the next one joins
it, and whatever reads the last one (a pool, say) runs them all, each on what nobody else has any more.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import flat, handover
from .pending import Pending, Source, allowed
from .program import Program
from .stem import hooked

WORTH = 8 << 20  # bytes of an input: to wait costs some 10 us a chain, which smaller ones do not pay for


class Call(NamedTuple):
    """A call of a chain by a program, and what stands for its result for as long as anybody has that."""

    stage: nn.Module
    program: Program
    result: weakref.ref[PendingChain]


class PendingChain(Pending):
    """What a chain of blocks gives for x, a tensor or another pending chain's result, before anybody has asked."""

    @staticmethod
    def __new__(cls, x: Tensor, stage: nn.Module, program: Program) -> Any:
        return Pending.__new__(cls, *_of_result(x, program))

    def __init__(self, x: Tensor, stage: nn.Module, program: Program) -> None:
        super().__init__(*_of_result(x, program))
        self.followed = False  # whether another chain has joined
        self._source, before = _begin(x, stage)
        self._calls = (*before, Call(stage, program, weakref.ref(self)))

    def _compute(self) -> Tensor:
        """The values; results between that somebody still has get theirs, too."""
        x = [self._source.read()] if self.followed else self._source.take()
        for stage, program, result in self._calls:
            if flat.recording():
                flat.note(tuple(stage.children()), (program,), partial(handover.run, stage, program))
            x.append(handover.run(stage, program, x))
            between = result()
            if between is not None and between.computed is None:
                between.computed = x[0]
        return x[0]


def _of_result(x: Tensor, program: Program) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """Size, dtype and device of what a program makes of x."""
    ends, device = program.ends, x._device if isinstance(x, Pending) else x.device
    assert ends.dtype is not None
    return ends.size, ends.dtype, device


def _begin(x: Tensor, stage: nn.Module) -> tuple[Source, tuple[Call, ...]]:
    """What a chain's work begins with, and the calls before its own."""
    if not isinstance(x, PendingChain):
        return Source(x, stage), ()
    x.followed = True
    return x._source, x._calls


def may_join(x: object) -> bool:
    """Whether x is pending, and a chain that reads it may wait together with it."""
    return isinstance(x, PendingChain) and x.computed is None and not x.followed


def may_wait(stage: nn.Module, x: Tensor) -> bool:
    """Whether a chain, called with x, may wait: within its network, where nothing else reads x."""
    if not stage.__dict__.get("_fused_waits") or not allowed() or hooked(stage):
        return False
    return isinstance(x, Pending) or x.numel() * x.element_size() >= WORTH


def is_only_reader(stage: nn.Module, modules: dict[str, nn.Module], graph: torch.fx.Graph) -> bool:
    """Whether a chain is called in a network's graph, and nothing else there reads what it is called with.

    Args:
        stage: the chain.
        modules: the network's, by name.
        graph: that of its forward, with blocks as single calls.
    """
    first = next(stage.children())
    calls = [node for node in graph.nodes if node.op == "call_module" and modules.get(str(node.target)) is first]
    read = [node.args[0] if len(node.args) == 1 and not node.kwargs else None for node in calls]
    return len(calls) > 0 and all(isinstance(x, torch.fx.Node) and len(x.users) == 1 for x in read)
