"""The fused residual blocks: drop-in classes, and the subclass that `fuse` gives to a block it finds."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, flat, reference
from .frozen import Freezable
from .per_module import PerModule
from .plan import Plan, Unsupported
from .programs import Programs
from .recognize import recognize
from .runner import Runner
from .swap import base_class, register, swapped_class, undone
from .touched import touch_statistics
from .watch import Entry, Watch, layout, unchanged, untraceable


class _State:
    """What a fused block looked up about itself; made anew when its modules change."""

    def __init__(self, block: FusedBlock) -> None:
        self.watch = Watch(block)
        self.norms = _norms(block)
        self.runner: Runner | None = None
        self.programs = Programs()
        plan = block.__dict__.get("_fused_plan")
        if plan is None:
            self.reason = block.__dict__.get("_fused_reason")
            return
        try:
            self.runner = Runner(block, plan)
        except Unsupported as error:  # of something that has changed since the block was planned
            self.reason = str(error)


def _norms(block: nn.Module) -> list[nn.Module]:
    """The norms in a block that may update running statistics."""
    return [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


_states: PerModule[_State] = PerModule("state")


class FusedBlock(Freezable):
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

    _fused_backend: str
    _fused_plan: Plan | None
    _fused_reason: str | None
    _fused_layout: tuple[Entry, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            cls.__signature__ = inspect.signature(base_class(cls))  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replan()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        own = name in ("training", "__class__") or name.startswith("_fused_")
        if "_fused_plan" in self.__dict__ and not own:
            self.replan()  # a module was replaced, or a flag that the forward asks

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.replan()  # its class may have a flag of that name

    def replan(self) -> None:
        """Recognise the block's own forward again, as after a module in it was replaced."""
        plan = reason = None
        own = object.__new__(base_class(type(self)))  # not this very block, which others may be calling
        object.__setattr__(own, "__dict__", self.__dict__)
        try:
            plan = recognize(own)
        except Unsupported as error:
            reason = str(error)
        self.adopt(plan, reason)

    def adopt(self, plan: Plan | None, reason: str | None) -> None:
        """Take a plan, or the reason why there is none, as that of the block's present modules."""
        self.__dict__.update(_fused_plan=plan, _fused_reason=reason, _fused_layout=layout(self))
        self.__dict__.setdefault("_fused_backend", "auto")
        _states.pop(self)

    def use_backend(self, backend: str) -> None:
        """Run on this backend, or on the one that is chosen for "auto", from the next call on."""
        self.__dict__["_fused_backend"] = backend
        _states.pop(self)

    def runner(self) -> Runner | None:
        """What runs the plan with the modules of this moment; None where the block's own forward has to run."""
        state = self._current_state()
        return None if self.reference_reason() is not None else state.runner

    def reference_reason(self) -> str | None:
        """Why the block would run its own forward if it were called now; None when it would run fused."""
        state = self._current_state()
        if state.runner is None:
            return state.reason
        return state.runner.mode_obstacle() or state.watch.obstacle()

    def _current_state(self) -> _State:
        state = _states.get(self)
        if state is None or not state.watch.same_modules():
            if layout(self) != self._fused_layout or state is not None:
                self.replan()
            state = _states[self] = _State(self)
        return state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if undone(FusedBlock, self):
            return type(self).forward(self, *args, **kwargs)
        known = len(args) == 1 and not kwargs  # else only its own forward knows the further arguments, or the name
        y = self._run(args[0]) if known else None
        if y is not None:
            return y
        y = super().forward(*args, **kwargs)
        if not torch.compiler.is_compiling() and not any(map(untraceable, args)):
            state = _states.get(self)
            touch_statistics(_norms(self) if state is None else state.norms)
        return y

    def _run(self, x: Tensor) -> Tensor | None:
        """The output by the plan, or None where the block's own forward has to run."""
        if torch.compiler.is_compiling():
            if self._fused_plan is None or not unchanged(self, self._fused_layout):
                return None
            traced = Runner(self, self._fused_plan)
            return None if traced.mode_obstacle() or traced.unbatched(x) else traced.run(x, self._fused_backend)
        if untraceable(x) or (isinstance(x, Tensor) and x.layout is not torch.strided):
            return None
        state = _states.get(self)
        bindable = isinstance(x, Tensor) and not torch.is_grad_enabled() and dispatch.plain((x,))
        if state is not None and bindable:
            program = state.programs.find(x, self.unasked())
            if program is not None:
                if type(self).forward is FusedBlock.forward:  # else a forward around this one does more
                    flat.note((self,), program, lambda x: program.run(x)[0])
                return program(x)
        runner = self.runner()
        if runner is None or runner.unbatched(x):
            return None
        if bindable:
            programs = self._current_state().programs
            bound = programs.bind([(runner, self._fused_backend)], x, list(self.modules()))
            return None if bound is None else bound[1]
        if torch.is_grad_enabled():
            self.look_again()
        return None if runner.better_apart(x, self._fused_backend) else runner.run(x, self._fused_backend)


def fuse_block(block: Any, plan: Plan, backend: str) -> None:
    """Give a module the class that runs it by this plan, unless it has such a class, and let it use this backend."""
    if not isinstance(block, FusedBlock):
        block.__class__ = swapped_class(FusedBlock, type(block))
        block.adopt(plan, None)
    block.use_backend(backend)


class FusedBasicBlock(FusedBlock, reference.BasicBlock):
    """`reference.BasicBlock` in two fused convolutions: same constructor, same `state_dict`."""


class FusedBottleneck(FusedBlock, reference.Bottleneck):
    """`reference.Bottleneck` in three fused convolutions: same constructor, same `state_dict`."""


class FusedResidualBlock(FusedBlock, reference.ResidualBlock):
    """`reference.ResidualBlock` in two fused convolutions: same constructor, same `state_dict`."""


class FusedPreActBottleneck(FusedBlock, reference.PreActBottleneck):
    """`reference.PreActBottleneck` in a norm and three fused convolutions: same constructor, same `state_dict`."""


for _cls in (FusedBasicBlock, FusedBottleneck, FusedResidualBlock, FusedPreActBottleneck):
    register(FusedBlock, _cls.__bases__[1], _cls)
