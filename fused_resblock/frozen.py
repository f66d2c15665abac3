"""Frozen models: somebody promises that they stay as they are, so their programs are not asked whether they still hold.

That question touches every tensor and every module at each call: 0.9 of 25 ms in a ResNet-50 on a CPU at batch 1.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from .swap import Swapped
from .touched import touch

NEVER = -1  # no generation
_generation = [0]
_FUNCTIONAL_CALL = torch.nn.utils.stateless._functional_call.__code__


def generation() -> int:
    """Another number after each occasion at which anything that is frozen may have changed: all is asked once more."""
    return _generation[0]


def substituted() -> bool:
    """Whether this is within `torch.func.functional_call`, after which modules have their own parameters again."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _FUNCTIONAL_CALL:
            return True
        frame = frame.f_back
    return False


def _loaded(module: nn.Module, _: object) -> None:
    """Look again behind `load_state_dict`, of a module or of one that it is in, when all in the module is loaded."""
    if isinstance(module, Freezable):
        module.look_again()


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
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _loaded]:
            del hooks[key]
        if frozen:
            self.__dict__["_fused_frozen"] = True
            self.register_load_state_dict_post_hook(_loaded)

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

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._apply(*args, **kwargs)
        finally:
            self.look_again()  # behind the change: what runs beside it may have been asked in the midst of it
