"""Chains of blocks that wait until somebody asks for the last one's values: activations die when they have been read.

A network such as `x = self.layer1(x); x = self.layer2(x)` holds each chain's input for as long as the chain runs: in a
ResNet-50 in fp16 at batch 128 that is 73 of 432 MiB. Here a call of a chain gives a `PendingChain`, the next one joins
it, and the pool that reads the last one (`lines`) runs them all, each on what nobody else has any more.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import flat, handover, leaves
from .pending import Pending, Source, readers
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
        size, dtype = program.ends.size, program.ends.dtype
        assert dtype is not None
        return Pending.__new__(cls, size, dtype, _device(x))

    def __init__(self, x: Tensor, stage: nn.Module, program: Program) -> None:
        super().__init__(_device(x))
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


def _device(x: Tensor) -> torch.device:
    return x._device if isinstance(x, Pending) else x.device


def _begin(x: Tensor, stage: nn.Module) -> tuple[Source, tuple[Call, ...]]:
    """What a chain's work begins with, and the calls before its own."""
    if not isinstance(x, PendingChain):
        return Source(x, stage, "stages"), ()
    x.followed = True
    return x._source, x._calls


def may_join(x: object) -> bool:
    """Whether x is pending, and a chain that reads it may wait together with it."""
    return isinstance(x, PendingChain) and x.computed is None and not x.followed


def may_wait(stage: nn.Module, x: Tensor) -> bool:
    """Whether a chain, called with x, may wait: in a line of its network's graph, for readers without hooks."""
    behind = readers(stage)
    if behind is None or hooked(stage) or any(map(_watched, behind)):
        return False
    return isinstance(x, Pending) or x.numel() * x.element_size() >= WORTH


def _watched(module: nn.Module) -> bool:
    """Whether something besides the forward sees what a module is called with: hooks, or a compiler."""
    return leaves.hooked(module) or module._compiled_call_impl is not None
