"""Frozen models: somebody promises that they stay as they are, so their programs are not asked whether they still hold.

That question touches every tensor and every module at each call: 0.9 of 25 ms in a ResNet-50 on a CPU at batch 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from .swap import Swapped
from .touched import touch

_generation = [0]


def generation() -> int:
    """Another number after each occasion at which anything that is frozen may have changed: all is asked once more."""
    return _generation[0]


class Freezable(Swapped):
    """Mixin of the classes that run programs.

    A frozen module looks at everything again after `load_state_dict`, `.to()` and the like, when one of its own
    attributes is set (its mode, a module in it), and after a call under autograd; not after other edits.
    """

    _fused_frozen = False

    def freeze(self, frozen: bool) -> None:
        """Take the promise, about everything as it is at the next call, or give it back."""
        if frozen or self._fused_frozen:  # programs may have been asked last before the promise
            _generation[0] += 1
        self.__dict__.pop("_fused_frozen", None)
        if frozen:
            self.__dict__["_fused_frozen"] = True

    def unasked(self) -> bool:
        """Whether the programs need not be asked, in the module's present mode."""
        return self._fused_frozen and not self.training

    def look_again(self, *inputs: Any) -> None:
        """Have everything asked once more, if this module is frozen; not where its inputs are those of a trace."""
        traced = torch.compiler.is_compiling() or any(isinstance(x, fx.Proxy) for x in inputs)
        if self.__dict__.get("_fused_frozen") and not traced:
            _generation[0] += 1

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and value == self.training:  # `eval()` sets it every time
            return
        if name == "training" and not torch.compiler.is_compiling():
            touch([*self.parameters(), *self.buffers()])
        super().__setattr__(name, value)
        Freezable.look_again(self)  # its class may be another one now

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Look again behind a change: what runs beside it may have been asked in the midst of it."""
        try:
            yield
        finally:
            self.look_again()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        with self._changing():
            return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with self._changing():
            return super().load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # called by the `load_state_dict` of a parent
        with self._changing():
            super()._load_from_state_dict(*args, **kwargs)
