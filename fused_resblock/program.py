"""A plan, or a chain of plans, bound to one kind of input: nothing is looked up, folded or chosen when it is called.

Binding does once what depends on parameters and shapes alone. `programs` keeps what was bound, and tells when it has to
be done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, dispatch
from .backends.folding import keep
from .kernels.gpu import tf32_allowed
from .params import Bound
from .runner import BoundStep


def first_of_pair(pair: Any, _: Any) -> Any:
    """The block's output, of what a tail gives."""
    return pair[0]


def second_of_pair(_: Any, pair: Any) -> Any:
    """The next reduce's, of what a tail gives."""
    return pair[1]


def passed_on(y: Any, _: Any) -> Any:
    """What an operation gives that was one for several steps."""
    return y


class Operation(NamedTuple):
    """`values[out] = run(values[main], values[other])`, then the values in `dead` are let go."""

    run: Bound
    main: int
    other: int
    out: int
    dead: tuple[int, ...]


class Ends(NamedTuple):
    """Where a program of a chain can meet that of the chain before it and of the one behind it; see `handover`."""

    result: int  # the number of the chain's output among its values
    first: BoundStep | None = None  # what the first operation computes, if that is one step of the first block
    ahead: BoundStep | None = None  # the next chain's first step where this program computes it, as value result + 1
    tail: bool = False  # whether a kernel for the last block's tail could compute that step


class Program:
    """Bound operations in order; call it with an x of the shape, dtype and device that it was bound for."""

    def __init__(self, dtype: torch.dtype | None, operations: Sequence[Operation], ends: Ends | None = None) -> None:
        self._dtype = dtype  # that autocast asks for
        self._operations = operations
        self._slots: list[Tensor | None] = [None] * (len(operations) + 1)
        self.ends = ends or Ends(len(operations))

    @property
    def tails(self) -> int:
        """How many blocks of a chain end in one kernel; see `tail`."""
        return sum(operation.run is first_of_pair for operation in self._operations)

    @property
    def wholes(self) -> int:
        """How many blocks of a chain are one kernel; see `backends.whole`."""
        return sum(operation.run is passed_on for operation in self._operations) // 2

    def __call__(self, x: Tensor) -> Tensor:
        """The output, channels_last and without autograd."""
        return self.run([x])[0]

    def run(self, x: list[Tensor], head: list[Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """The output, and what the next chain's first step makes of it where the program computes that.

        Both lists are emptied, so that what they hold dies when it is read for the last time.

        Args:
            x: holds the input.
            head: holds the first operation's result where it is known already.
        """
        operations = self._operations
        keep(operations)
        if self._dtype is not None:
            x = [x.pop().to(self._dtype)]
        values: list[Any] = [x.pop().contiguous(memory_format=torch.channels_last), *self._slots]
        if head:
            values[1], operations = head.pop(), operations[1:]
        for run, main, other, out, dead in operations:
            values[out] = run(values[main], values[other])
            for value in dead:
                values[value] = None
        result = self.ends.result
        return values[result], None if self.ends.ahead is None else values[result + 1]


def signature(x: Tensor) -> tuple[object, ...]:
    """What a program depends on besides the modules; equal for inputs that one program serves."""
    dtype = dispatch.autocast_dtype(x)
    tf32 = tf32_allowed() if x.is_cuda else None
    return x.shape, x.dtype, x.device, dtype, tf32, backends.environment(), backends.generation
