"""A chain of fused blocks run as one: the blocks of an `nn.Sequential`, as `layer1` to `layer4` of a ResNet are.

What is asked at every call of a block is asked once for all of them, and a block's result, which nobody else can see,
is overwritten by the next block's sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, dispatch, flat, handover, leaves
from .chain import last_reads
from .frozen import Freezable
from .handover import programs as _programs
from .modules import FusedBlock
from .program import Program
from .programs import Programs
from .swap import register, swapped_class, undone
from .tail import Tail, find_tails, no_tail


def obstacle(stage: nn.Sequential) -> str | None:
    """Why the modules of a Sequential must be called one by one; None when they can be run as one chain."""
    if len(stage) < 2:
        return "a single block"
    for name, block in stage.named_children():
        if not isinstance(block, FusedBlock):
            return f"{name} ({type(block).__name__}) is not a fused block"
        if type(block).forward is not FusedBlock.forward or "forward" in block.__dict__:
            return f"{name} has a forward of its own"
        if leaves.hooked(block):
            return f"hooks on {name}"
        reason = block.reference_reason()
        if reason is not None:
            return f"{name}: {reason}"
    return None


class FusedStage(Freezable):
    """Mixin for an `nn.Sequential` of fused blocks that runs them as one chain.

    Its modules, `state_dict` and indexing are those of the Sequential. Block by block it runs under autograd, when a
    block computes something else at the moment (train mode), has hooks or was replaced by hand, and while it is traced;
    the result is the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        if undone(FusedStage, self):
            return type(self).forward(self, input)
        y = self._run(input)
        return super().forward(input) if y is None else y

    def _run(self, x: Tensor) -> Tensor | None:
        """The chain's output, or None where the blocks have to be called one by one."""
        if torch.is_grad_enabled():
            self.look_again(x)
            return None
        if not isinstance(x, Tensor) or not dispatch.plain((x,)):
            return None
        programs = _programs.get(self)
        if programs is not None:
            program = programs.find(x, self.unasked())
            if program is not None:
                if handover.fits(self, program):
                    if flat.recording() and type(self).forward is FusedStage.forward:
                        modules: Any = self._modules.values()  # with repetitions, as its graph calls them
                        flat.note(tuple(modules), program, partial(handover.run, self, program))
                    return handover.run(self, program, [x])
                _programs.pop(self)
        return self._bind(x)

    def _bind(self, x: Tensor) -> Tensor | None:
        """Bind a program and give its result; None as `_run` gives it."""
        stage: Any = self
        if obstacle(stage):
            return None
        programs = _programs.get(stage)
        if programs is None:
            programs = _programs[stage] = Programs()
        blocks = [(block.runner(), block._fused_backend) for block in stage]
        if blocks[0][0].unbatched(x):
            return None
        behind: Any = self._block_behind(blocks[-1][1])
        following = None if behind is None else (behind.runner(), list(behind.modules()))
        kernel = stage.__dict__.get("_fused_kernel", False)
        bound = programs.bind(blocks, x, list(stage.modules()), kernel, following)
        before = handover.learn(stage, x)
        if before is not None:
            _programs.pop(before)  # to be bound again, with this chain's head
        if bound is None:
            return None
        handover.note(stage, bound[1], bound[0])
        return bound[1]

    def _block_behind(self, backend: str) -> FusedBlock | None:
        """The first block of the chain behind this one, if that is known and runs as one chain on the same backend."""
        following: Any = handover.attempt(self)
        if not isinstance(following, FusedStage) or obstacle(following):  # type: ignore[arg-type]
            return None
        bound = _last_bound(following)
        if bound is not None and bound.ends.first is None:  # it begins with an operation of several steps
            return None
        blocks: Any = following
        return blocks[0] if blocks[0]._fused_backend == backend else None


def fuse_stage(stage: nn.Module, kernel: bool) -> None:
    """Give a Sequential of fused blocks the class that runs it as one chain; `kernel`: by the stage kernel."""
    if not isinstance(stage, FusedStage):
        stage.__class__ = swapped_class(FusedStage, type(stage))
    stage.__dict__["_fused_kernel"] = kernel


class FusedSequential(FusedStage, nn.Sequential):
    """An `nn.Sequential` of fused blocks, run as one chain."""


register(FusedStage, nn.Sequential, FusedSequential)


def kernel_state(stage: nn.Sequential) -> str:
    """How many blocks of a chain are one kernel or end in one, and if that was asked for, why one does not.

    Where it was not asked for a table decides, which depends on the input: "" if it did not for the last new one.
    """
    bound = _last_bound(stage)
    merged = 0 if bound is None else bound.tails
    head = bound is not None and bound.ends.ahead is not None and handover.fits(stage, bound)
    ahead = ", the last one with the next chain's head" if head else ""
    if not stage.__dict__.get("_fused_kernel"):
        blocks = 0 if bound is None else bound.wholes
        counts = [f"{n} of {len(stage)} {what}" for n, what in ((merged, "tails"), (blocks, "blocks")) if n]
        said = f", {' and '.join(counts)} as one kernel: measured to be faster for the last new size"
        return said + ahead if counts else ""
    obstacles = _kernel_obstacles(stage)
    count = len(stage) - len(obstacles) if bound is None else merged
    why = f": {obstacles[0]}" if obstacles and count < len(stage) else ""
    return f", {count} of {len(stage)} tails as one kernel{why}{ahead}"


def _last_bound(stage: nn.Module) -> Program | None:
    """The program that a chain was bound to last, if what went into it holds."""
    programs = _programs.get(stage)
    guard = None if programs is None else programs.guard
    if programs is None or guard is None or not guard.holds():
        return None
    return next(reversed(list(programs)), None)


def _kernel_obstacles(stage: nn.Sequential) -> list[str]:
    """For each block of a chain in which the stage kernel cannot run why not, as far as its convolutions tell."""
    blocks: Any = stage
    runners = [block.runner() for block in blocks]
    names = [backends.check_name(block._fused_backend) for block in blocks]
    tails = find_tails(runners, last_reads(runners), names)
    found, base = [], 0
    # `named_children` leaves out a block's repetition
    for name, runner, backend in zip(stage._modules, runners, names, strict=True):
        base += len(runner.steps)
        tail = tails.get(base - 2)
        reason = no_tail(runner) if tail is None else _kernel_obstacle(tail, backend)
        found += [] if reason is None else [f"{name}: {reason}"]
    return found


def _kernel_obstacle(tail: Tail, backend: str) -> str | None:
    """Why the stage kernel does not run a tail; None when it does, with the next block's head or without."""
    conv, expand = tail.conv.weights(), tail.expand.weights()
    shortcut = None if tail.shortcut is None else tail.shortcut.weights()
    weight = conv.weight
    if not backends.may_be_triton(backend, weight.device):
        return f"the backend is {backend}, the device {weight.device.type}"
    reason = backends.refusal("triton", backends.Problem(weight.device.type, weight.dtype))
    return reason or backends.triton.tail_refusal(weight.dtype, conv, expand, shortcut, None)


def _calls_in_order(module: nn.Sequential) -> bool:
    """Whether a Sequential calls its modules one after the other, by what its forward does."""
    plain = isinstance(module, FusedStage) or type(module).forward is nn.Sequential.forward
    return plain and "forward" not in module.__dict__


def is_stage(module: nn.Module) -> bool:
    """Whether a module is a Sequential, by what its forward does, of two or more fused blocks and nothing else."""
    if not isinstance(module, nn.Sequential) or len(module) < 2:
        return False
    return _calls_in_order(module) and all(isinstance(block, FusedBlock) for block in module)
