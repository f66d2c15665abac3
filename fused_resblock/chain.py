"""Chains of plans bound step by step: conv by conv, and where they are there by kernels for tails and whole blocks.

What comes out is a `program`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from . import backends, dispatch, gates, progress
from .backends import asked, whole
from .backends.whole import Layers
from .kernels.tables import StageEntry
from .params import Bound
from .plan import Step
from .program import Ends, Operation, Program, first_of_pair, passed_on, second_of_pair
from .runner import BoundStep, Runner
from .tail import Tail, find_tails, find_wholes

NEVER = -1  # the number of no operation


def _reads(step: Step) -> list[int]:
    """The numbers of the values that a step reads: x, then the other one if there is one."""
    other = step.residual if step.shortcut is None else step.shortcut.source
    return [step.main.source] if other is None else [step.main.source, other]


def last_reads(runners: Sequence[Runner]) -> dict[int, int]:
    """For each value of a chain the number of the last operation that reads it."""
    last, base = {}, 0  # the number of a block's input, and of its first operation
    for runner in runners:
        for number, step in enumerate(runner.steps, base):
            last.update({base + value: number for value in _reads(step.step)})
        base += len(runner.steps)
    return last


class _Chain:
    """A program in the making: the values computed so far, and the operations that computed them, one for each step.

    Step number i gives value number i + 1.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[Runner, str]],
        x: Tensor,
        stage_kernel: bool | None,
        following: BoundStep | None,
    ) -> None:
        self.dtype = dispatch.autocast_dtype(x)
        self.values: list[Any] = [x if self.dtype is None else x.to(self.dtype)]
        self.operations: list[Operation] = []
        runners, names = [runner for runner, _ in blocks], [name for _, name in blocks]
        self._result = sum(len(runner.steps) for runner in runners)
        self._last_read = {**last_reads(runners), self._result: NEVER}
        self._force = bool(stage_kernel)
        self._following = following
        self._tails = {} if stage_kernel is None else find_tails(runners, self._last_read, names, following)
        self._wholes = find_wholes(runners) if stage_kernel is False and len(set(names)) == 1 else {}
        self._first = runners[0].steps[0]
        self._taken: set[int] = set()  # the first step of each tail or block that is one kernel

    def _dies(self, value: int) -> bool:
        """Whether nothing reads a value after the next operation."""
        return self._last_read.get(value) == len(self.operations)

    def _append(self, run: Bound, main: int, other: int, result: Any, also: int = -1) -> None:
        dead = tuple(value for value in {main, other, also} if self._dies(value))
        self.operations.append(Operation(run, main, other, len(self.values), dead))
        self.values.append(result)
        for value in dead:
            if value > 0:  # x is here to tell what device this is for
                self.values[value] = None

    def program(self, backend: str) -> Program:
        """The operations so far; `backend` is the last block's."""
        ahead = self._following if len(self.operations) > self._result else None
        first = None if 0 in self._taken else self._first
        tail = (
            self._result - 2 in self._tails
            and self._result - 3 not in self._taken
            and backends.may_be_triton(backend, self.values[0].device)
        )
        return Program(self.dtype, self.operations, Ends(self._result, first, ahead, tail))

    def step(self, step: BoundStep, base: int, backend: str) -> bool:
        """Bind and run a step of the block whose input is value number `base`; False as `bind` gives None."""
        reads = [base + value for value in _reads(step.step)]
        main, other = reads[0], reads[1] if len(reads) > 1 else -1
        run = self._bind(step, base, backend, main, other)
        if run is None:
            return False
        y = run(self.values[main], self.values[other] if other >= 0 else None)
        if y.dtype != self.values[main].dtype:  # of a gate under autocast
            return False
        self._append(run, main, other, y)
        return True

    def _bind(self, step: BoundStep, base: int, backend: str, main: int, other: int) -> Bound | None:
        if step.module is not None:
            module = step.module
            return lambda x, _: backends.dense(gates.run(module, x))
        arguments = step.arguments(self.values[base:], self.dtype is not None)
        if arguments is None:
            return None
        residual = step.step.residual is not None and step.step.residual_stride == 1
        overwrite = residual and other not in (0, main) and self._dies(other)  # x belongs to others
        return arguments.bind(backend, overwrite)

    def whole(self, base: int, backend: str) -> int:
        """Bind and run the block whose input is value number `base` as one operation, if it is one; its steps."""
        number, x = len(self.operations), self.values[base]
        if number != base or number not in self._wholes:
            return 0
        layers = self._layers(number, x)
        if asked.is_recording() and layers is not None and whole.obstacle(x, layers, backend) is None:
            whole.note(x, layers)
        entry = self._measured(number, x, backend)
        if layers is None or entry is None:
            return 0
        run = whole.bind(x, layers, entry, backend)
        self._taken.add(number)
        y = run(x, None)
        self._append(run, base, -1, y)  # values of its first two steps are there in name only
        self._append(passed_on, base + 1, -1, y)
        self._append(passed_on, base + 2, -1, y, also=base)
        return 3

    def _measured(self, number: int, x: Tensor, backend: str) -> StageEntry | None:
        """What a table says of the block that begins with a step and reads x, if it is faster as one operation.

        So must be all behind it in the chain: else one of them begins with a reduce that a tail would have computed.
        """
        layers = self._layers(number, x)
        if layers is None or asked.is_recording():
            return None
        entry = whole.measured(x, layers, backend)
        last = number + 3 == self._result
        if entry is None or last:
            return entry
        return entry if self._measured(number + 3, whole.like(x, layers.output_shape(x)), backend) is not None else None

    def _whole_behind(self, number: int, tail: Tail, h: Tensor, backend: str) -> bool:
        """Whether the block behind a tail, which begins with a step and reads h, is one operation."""
        size = tail.conv.weights().output_size(*h.shape[2:])
        if number + 2 not in self._wholes or min(size) < 1:
            return False
        y = whole.like(h, (h.shape[0], tail.expand.weights().weight.shape[0], *size))
        return self._measured(number + 2, y, backend) is not None

    def _layers(self, number: int, x: Tensor) -> Layers | None:
        """The convolutions of the block that begins with a step; None if that is none, or the step has to say why."""
        found = self._wholes.get(number)
        if found is None:
            return None
        layers = Layers(*(None if branch is None else branch.weights() for branch in found))  # type: ignore[arg-type]
        weights = [layer.weight for layer in layers if layer is not None]
        same = all(weight.dtype == x.dtype for weight in weights) or self.dtype is not None
        return layers if same and all(weight.device == x.device for weight in weights) else None

    def tail(self, base: int, backend: str) -> int:
        """Bind and run a tail that begins with the next step, if one does; how many steps that is."""
        number = len(self.operations)
        tail = self._tails.get(number)
        if tail is None:
            return 0
        main, pair = base + tail.conv.source, number + 1
        h, other = self.values[main], self.values[tail.other]
        # the expand is a residual's last reader, but the 3x3 reads pixels that another program writes
        overwrite = tail.other not in (0, main)
        bind = partial(
            _bind_tail,
            h=h,
            other=other,
            backend=backend,
            autocast=self.dtype is not None,
            force=self._force,
            overwrite=overwrite,
        )
        if tail.reduce is not None and self._whole_behind(number, tail, h, backend):
            tail = tail._replace(reduce=None)  # the block behind it computes its own
        run = bind(tail)
        if run is None and tail.reduce is not None:  # the next block may begin with something else
            tail = tail._replace(reduce=None)
            run = bind(tail)
        if run is None:
            return 0
        taken = 2 if tail.reduce is None else 3
        self._taken.add(number)
        self._last_read[pair] = number + taken - 1
        y, g = result = run(h, other)
        self._append(run, main, tail.other, result)
        self._append(first_of_pair, pair, -1, y, also=tail.other)
        if tail.reduce is not None:
            self._append(second_of_pair, pair + 1, pair, g)
        return taken


def _bind_tail(
    tail: Tail, h: Tensor, other: Tensor, *, backend: str, autocast: bool, force: bool, overwrite: bool
) -> Any:
    """A tail as one operation that gives a pair, the block's output and the next reduce's; None if it is not one."""
    conv, expand = tail.conv.tensors(h, autocast), tail.expand.weights()
    shape = (h.shape[0], expand.weight.shape[0], *conv.output_size(*h.shape[2:]))
    shortcut = None if tail.shortcut is None else tail.shortcut.tensors(other, autocast)
    if shape != (tuple(other.shape) if shortcut is None else shortcut.output_shape(other)):
        return None
    reduce = None if tail.reduce is None else tail.reduce.weights()
    channels = conv.weight.shape[0]
    for layer in (expand,) if reduce is None else (expand, reduce):
        weight = layer.weight
        fits = weight.shape[1] == channels and weight.device == h.device
        if not fits or (weight.dtype != h.dtype and not autocast):
            return None  # the step itself says what is wrong
        channels = weight.shape[0]
    layers = (conv, expand, other, shortcut, reduce)
    return backends.bind_expand_shift(h, *layers, backend=backend, force=force, overwrite=overwrite)


def bind(
    blocks: Sequence[tuple[Runner, str]],
    x: Tensor,
    stage_kernel: bool | None = None,
    following: BoundStep | None = None,
) -> tuple[Program, Tensor] | None:
    """Bind the plans of consecutive blocks, the first of which reads `x`, and run them.

    A residual is summed in place where nothing reads it afterwards: inside of the chain nobody else can.

    Args:
        blocks: the runner of each block, and its backend's name or "auto".
        x: an input.
        stage_kernel: whether the kernel of `kernels.expand_shift` takes what it can: nothing (None), what a table says
            is faster so (False), or everything (True).
        following: a step that reads the chain's output, to be computed too where the last kernel can.

    Returns:
        The program and its result for x; None if the shapes are such that only the blocks' own forwards can say.

    Raises:
        TypeError, ValueError: if x does not fit the first block.
    """
    blocks = [(runner, backends.check_name(backend)) for runner, backend in blocks]
    chain = _Chain(blocks, x, stage_kernel, following)
    base = 0
    with progress.first_call(sum(len(runner.steps) for runner, _ in blocks), x.device) as bar:
        for runner, backend in blocks:
            if len(chain.operations) == base:  # else the block before has computed its first step, and let y go perhaps
                runner.check(chain.values[base], chain.dtype is not None)
            if base == 0:
                chain.values[0] = backends.dense(chain.values[0])
            while len(chain.operations) < base + len(runner.steps):
                step = runner.steps[len(chain.operations) - base]
                taken = chain.whole(base, backend) or chain.tail(base, backend)
                if not taken and not chain.step(step, base, backend):
                    return None
                bar.update(len(chain.operations) - bar.n)
            base += len(runner.steps)
    program = chain.program(backend)
    return program, chain.values[program.ends.result]
