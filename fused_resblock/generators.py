"""The random number generators of this process: whether numbers were drawn, and as if none had been."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


def _global() -> Iterator[tuple[Callable[[], bytes], Callable[[bytes], Any]]]:
    """Of each global generator of PyTorch, Python and NumPy (if that is imported) what reads its state, and sets it."""
    for one in (torch.default_generator, *torch.cuda.default_generators):
        yield (
            lambda one=one: one.get_state().numpy().tobytes(),  # type: ignore[misc]
            lambda state, one=one: one.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),  # type: ignore[misc]
        )
    yield lambda: pickle.dumps(random.getstate()), lambda state: random.setstate(pickle.loads(state))
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        yield lambda: pickle.dumps(numpy.get_state()), lambda state: numpy.set_state(pickle.loads(state))


class Generators:
    """The states of the global generators at the time that this is made."""

    def __init__(self) -> None:
        self._before = [(read, write, read()) for read, write in _global()]

    def restore(self) -> bool:
        """Put back those that numbers were drawn from; whether there are any."""
        drawn = [(write, state) for read, write, state in self._before if read() != state]
        for write, state in drawn:
            write(state)
        return bool(drawn)
