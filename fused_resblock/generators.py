"""The random number generators of this process: whether a forward draws from them, and as if it had not."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: what reads a generator's state, and what sets it
State = tuple[Callable[[], bytes], Callable[[bytes], Any]]


def _of_torch() -> Iterator[State]:
    for one in (torch.default_generator, *torch.cuda.default_generators):
        yield (
            lambda one=one: one.get_state().numpy().tobytes(),  # type: ignore[misc]
            lambda state, one=one: one.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),  # type: ignore[misc]
        )


def _of_others() -> Iterator[State]:
    """Python's, and NumPy's if that is imported."""
    yield lambda: pickle.dumps(random.getstate()), lambda state: random.setstate(pickle.loads(state))
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        yield lambda: pickle.dumps(numpy.get_state()), lambda state: numpy.set_state(pickle.loads(state))


class Draws(TorchDispatchMode):
    """Within this context notices that numbers are drawn; at its end the global generators are put back.

    PyTorch's operations are those of this thread, and any generator's. Python's and NumPy's global generators do not
    tell who draws: another thread's numbers count, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __enter__(self) -> Draws:
        self._torch, self._others = ([(*state, state[0]()) for state in of()] for of in (_of_torch, _of_others))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        moved = [(write, state) for read, write, state in self._others if read() != state]
        if self.seen:
            moved += [(write, state) for _, write, state in self._torch]
        for write, state in moved:
            write(state)
        self.seen = self.seen or bool(moved)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen = True
        return func(*args, **(kwargs or {}))
