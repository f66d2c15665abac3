"""Frozen models: somebody promises that they stay as they are, so their programs are not asked whether they still hold.

That question touches every tensor and every module at each call: 0.9 of 25 ms in a ResNet-50 on a CPU at batch 1.
"""

from __future__ import annotations

from typing import Any

import torch

from .swap import Swapped


class Freezable(Swapped):
    """Mixin of the classes whose modules own programs.

    A frozen module looks at everything again after `load_state_dict`, `.to()` and the like, and after a call under
    autograd or in train mode; not after edits of single tensors, modules or settings.
    """

    _fused_frozen = False

    def forget(self) -> None:
        """Let the programs go; the next call binds them again."""
        raise NotImplementedError

    def freeze(self, frozen: bool) -> None:
        """Take the promise, about everything as it is at the next call, or give it back."""
        self.forget()
        self.__dict__.pop("_fused_frozen", None)
        if frozen:
            self.__dict__["_fused_frozen"] = True

    def unasked(self) -> bool:
        """Whether the programs hold without being asked, in the module's present mode."""
        return self._fused_frozen and not self.training

    def lapse(self) -> None:
        """What a call under autograd does: a step of an optimiser may follow."""
        if self._fused_frozen and not torch.compiler.is_compiling():
            self.forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)
