"""A plan, or a chain of plans, bound to one kind of input: nothing is looked up, folded or chosen when it is called.

Binding does once what depends on parameters and shapes alone. `watch.Guard` tells when it has to be done again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, dispatch
from .backends.folding import keep
from .params import Bound
from .plan import Step
from .runner import BoundStep, Runner
from .watch import Guard


class Operation(NamedTuple):
    """`values[out] = run(values[main], values[other])`, then the values in `dead` are let go."""

    run: Bound
    main: int
    other: int
    out: int
    dead: tuple[int, ...]


class Program:
    """Bound operations in order; call it with an x of the shape, dtype and device that it was bound for."""

    def __init__(self, dtype: torch.dtype | None, operations: Sequence[Operation]) -> None:
        self._dtype = dtype  # that autocast asks for
        self._operations = operations
        self._slots: list[Tensor | None] = [None] * (len(operations) + 1)

    def __call__(self, x: Tensor) -> Tensor:
        """The output, channels_last and without autograd."""
        keep(self._operations)
        if self._dtype is not None:
            x = x.to(self._dtype)
        values = [x.contiguous(memory_format=torch.channels_last), *self._slots]
        for run, main, other, out, dead in self._operations:
            values[out] = run(values[main], values[other])  # type: ignore[arg-type]
            for value in dead:
                values[value] = None
        return values[out]  # type: ignore[return-value]


def signature(x: Tensor) -> tuple[object, ...]:
    """What a program depends on besides the modules; equal for inputs that one program serves."""
    dtype = dispatch.autocast_dtype(x)
    tf32 = torch.backends.cudnn.allow_tf32 if x.is_cuda else None
    return x.shape, x.dtype, x.device, dtype, tf32, backends.environment(), backends.generation


def _reads(step: Step) -> list[int]:
    """The numbers of the values that a step reads: x, then the other one if there is one."""
    other = step.residual if step.shortcut is None else step.shortcut.source
    return [step.main.source] if other is None else [step.main.source, other]


def _last_reads(blocks: Sequence[tuple[Runner, str]]) -> dict[int, int]:
    """For each value of a chain the number of the last operation that reads it."""
    last, base, number = {}, 0, 0
    for runner, _ in blocks:
        for step in runner.steps:
            last.update({base + value: number for value in _reads(step.step)})
            number += 1
        base += len(runner.steps)
    return last


def _bind_step(step: BoundStep, values: Sequence[Any], backend: str, autocast: bool, other_dies: bool) -> Bound | None:
    """A step's operation; `other_dies` says that nothing reads its other activation afterwards."""
    if step.pool is not None:
        pool = step.pool
        return lambda x, _: backends.dense(pool(x))
    arguments = step.arguments(values, autocast)
    if arguments is None:
        return None
    overwrite = other_dies and step.step.residual is not None and step.step.residual_stride == 1
    return arguments.bind(backend, overwrite and step.step.residual != step.step.main.source)


def bind(blocks: Sequence[tuple[Runner, str]], x: Tensor) -> tuple[Program, Tensor] | None:
    """Bind the plans of consecutive blocks, the first of which reads `x`, and run them.

    A residual is summed in place where nothing reads it afterwards: inside of the chain nobody else can.

    Args:
        blocks: the runner of each block, and its backend's name or "auto".
        x: an input.

    Returns:
        The program and its result for x; None if the shapes are such that only the blocks' own forwards can say.

    Raises:
        TypeError, ValueError: if x does not fit the first block.
    """
    dtype = dispatch.autocast_dtype(x)
    last_read = _last_reads(blocks)
    values: list[Tensor | None] = [x if dtype is None else x.to(dtype)]
    operations: list[Operation] = []
    for runner, backend in blocks:
        base = len(values) - 1  # the block's value 0 is the one before it
        runner.check(values[base], dtype is not None)  # type: ignore[arg-type]
        values[0] = values[0] if base else backends.dense(values[0])  # type: ignore[arg-type]
        backend = backends.check_name(backend)
        for step in runner.steps:
            reads = [base + value for value in _reads(step.step)]
            dead = tuple(v for v in set(reads) if v and last_read[v] == len(operations))
            run = _bind_step(step, values[base:], backend, dtype is not None, reads[-1] in dead)
            if run is None:
                return None
            main, other = reads[0], reads[1] if len(reads) > 1 else -1
            result = run(values[main], values[other] if other >= 0 else None)  # type: ignore[arg-type]
            operations.append(Operation(run, main, other, len(values), dead))
            values.append(result)
            for value in dead:
                values[value] = None
    return Program(dtype, operations), result


class Programs:
    """The programs of a block, or of a chain of blocks, by `signature`, as long as its modules and tensors hold."""

    LIMIT = 32  # signatures; images of every size may come, and each has its own

    def __init__(self) -> None:
        self._guard: Guard | None = None
        self._programs: dict[tuple[object, ...], Program] = {}

    def find(self, x: Tensor) -> Program | None:
        """The program for such an input; None if there is none, or if something that went into it has changed."""
        guard = self._guard  # read before the program: another thread may be replacing both
        if guard is None or not isinstance(x, Tensor):
            return None
        program = self._programs.get(signature(x))
        if program is None or guard.holds():
            return program
        self._guard = None
        self._programs.clear()
        return None

    def keep(self, x: Tensor, program: Program, guard: Callable[[], Guard]) -> None:
        """Keep a program for inputs such as x; `guard` makes what watches over everything that it was bound to."""
        try:
            guard_of_all = self._guard or guard()
        except RuntimeError:  # inference tensors carry no version: nothing tells when they change
            return
        if len(self._programs) >= self.LIMIT:
            self._programs.clear()
        self._guard = guard_of_all
        self._programs[signature(x)] = program

    def bind(self, blocks: Sequence[tuple[Runner, str]], x: Tensor, root: nn.Module) -> Tensor | None:
        """Bind a program for the blocks in `root`, keep it, and give its result for x.

        None as `bind` gives it, or if a parameter is no plain tensor.
        """
        tensors = [t for runner, _ in blocks for t in runner.parameters()]
        found = bind(blocks, x) if dispatch.plain(tensors) else None
        if found is None:
            return None
        program, y = found
        all_modes = any(runner.eval_only for runner, _ in blocks)
        self.keep(x, program, lambda: Guard(list(root.modules()), tensors, all_modes))
        return y
