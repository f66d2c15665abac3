"""The random number generators of this process: whether a forward draws from them, and as if it had not."""

from __future__ import annotations

import pickle
import random
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Draws(TorchDispatchMode):
    """Within this context notices that numbers are drawn; at its end the CPU's global generators are put back.

    PyTorch's numbers are those of this thread, from any generator. Python's and NumPy's global generators do not tell
    who draws: another thread's numbers count, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __enter__(self) -> Draws:
        self._numpy = sys.modules.get("numpy.random")
        self._torch, self._others = torch.get_rng_state(), self._states()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if self.seen:
            torch.set_rng_state(self._torch)
        if self._states() != self._others:
            self.seen = True
            python, numpy = map(pickle.loads, self._others)
            random.setstate(python)
            if self._numpy is not None:
                self._numpy.set_state(numpy)

    def _states(self) -> tuple[bytes, bytes]:
        """Those of Python and NumPy, if it is imported, as bytes: its arrays do not compare as a whole."""
        return pickle.dumps(random.getstate()), pickle.dumps(None if self._numpy is None else self._numpy.get_state())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen = True
        return func(*args, **(kwargs or {}))
