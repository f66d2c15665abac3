"""The fused residual blocks: drop-in classes, and the subclass that `fuse` gives to a block it finds."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .plan import Plan, Unsupported
from .recognize import recognize
from .runner import Runner, Watch, layout, unchanged, untraceable


class _State:
    """What a fused block looked up about itself; made anew when its modules change."""

    def __init__(self, block: FusedBlock) -> None:
        self.watch = Watch(block)
        self.runner: Runner | None = None
        plan = block.__dict__.get("_fused_plan")
        if plan is None:
            self.reason = block.__dict__.get("_fused_reason")
        else:
            self.runner = Runner(block, plan)


_states: weakref.WeakKeyDictionary[FusedBlock, _State] = weakref.WeakKeyDictionary()


def base_class(cls: type) -> type[nn.Module]:
    """The class that a fused class was made of: the one behind `FusedBlock`."""
    mro = cls.__mro__
    return mro[mro.index(FusedBlock) + 1]


class FusedBlock(nn.Module):
    """Mixin that runs a block by its plan, and by its own forward wherever the plan does not hold.

    The block keeps its parameters, buffers, submodules, `state_dict` and hooks; it is an instance of its former class.
    Its own forward runs when a norm uses batch statistics (train mode), when inner modules have hooks, were replaced
    by something unsupported or are being traced by `torch.fx` or `torch.jit.trace`. `explain` names the reason.

    Shape, dtype and memory format: `[N, C, H, W]` of the weights' dtype in any memory format; the plan's output is
    channels_last.

    Raises:
        TypeError, ValueError: in forward, if x is not a floating-point `[N, C, H, W]` of the block's channel count,
            dtype (outside autocast) and device.
    """

    _fused_backend: str = "auto"
    _fused_plan: Plan | None
    _fused_reason: str | None
    _fused_layout: tuple[tuple[str, type], ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            cls.__signature__ = inspect.signature(base_class(cls))  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replan()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "_fused_plan" in self.__dict__ and name != "training" and not name.startswith("_fused_"):
            self.replan()  # a module was replaced, or a flag that the forward asks

    def replan(self) -> None:
        """Recognise the block's own forward again, as after a module in it was replaced."""
        cls = type(self)
        plan = reason = None
        object.__setattr__(self, "__class__", base_class(cls))
        try:
            plan = recognize(self)
        except Unsupported as error:
            reason = str(error)
        finally:
            object.__setattr__(self, "__class__", cls)
        self.adopt(plan, reason)

    def adopt(self, plan: Plan | None, reason: str | None) -> None:
        """Take a plan, or the reason why there is none, as that of the block's present modules."""
        self.__dict__.update(_fused_plan=plan, _fused_reason=reason, _fused_layout=layout(self))
        _states.pop(self, None)

    def reference_reason(self) -> str | None:
        """Why the block would run its own forward if it were called now; None when it would run fused."""
        state = self._current_state()
        if state.runner is None:
            return state.reason
        return state.runner.mode_obstacle() or state.watch.obstacle()

    def _current_state(self) -> _State:
        state = _states.get(self)
        if state is None or not state.watch.same_modules():
            if state is not None:
                self.replan()
            state = _states[self] = _State(self)
        return state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:  # further arguments, or names that only its own forward knows
            return super().forward(*args, **kwargs)
        runner = self._runner(args[0])
        y = None if runner is None else runner.run(args[0], self._fused_backend)
        return super().forward(*args) if y is None else y

    def _runner(self, x: Tensor) -> Runner | None:
        """What runs the plan, or None where the block's own forward has to run."""
        if torch.compiler.is_compiling():
            if self._fused_plan is None or not unchanged(self, self._fused_layout):
                return None
            runner = Runner(self, self._fused_plan)
            return None if runner.mode_obstacle() else runner
        if untraceable(x):
            return None
        state = self._current_state()
        if state.runner is None or state.runner.mode_obstacle() or state.watch.obstacle():
            return None
        return state.runner

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        base = base_class(type(self))
        if _made_classes.get(base) is type(self):  # a class made at run time has no name to be found by
            return _rebuild, (base,), *reduced[2:]
        return reduced


_made_classes: dict[type, type[FusedBlock]] = {}  # block class -> what `fused_class` made of it


def fused_class(base: type[nn.Module]) -> type[FusedBlock]:
    """The fused subclass of a block class: made once, and found again when a fused block is unpickled."""
    for fused in (FusedBasicBlock, FusedBottleneck, FusedResidualBlock, FusedPreActBottleneck):
        if fused.__bases__[1] is base:
            return fused
    if base not in _made_classes:
        attributes = {"__module__": base.__module__, "__doc__": base.__doc__}
        _made_classes[base] = type(f"Fused{base.__name__}", (FusedBlock, base), attributes)
    return _made_classes[base]


def _rebuild(base: type[nn.Module]) -> FusedBlock:
    cls = fused_class(base)
    return cls.__new__(cls)


class FusedBasicBlock(FusedBlock, reference.BasicBlock):
    """`reference.BasicBlock` in two fused convolutions: same constructor, same `state_dict`."""


class FusedBottleneck(FusedBlock, reference.Bottleneck):
    """`reference.Bottleneck` in three fused convolutions: same constructor, same `state_dict`."""


class FusedResidualBlock(FusedBlock, reference.ResidualBlock):
    """`reference.ResidualBlock` in two fused convolutions: same constructor, same `state_dict`."""


class FusedPreActBottleneck(FusedBlock, reference.PreActBottleneck):
    """`reference.PreActBottleneck` in a norm and three fused convolutions: same constructor, same `state_dict`."""
