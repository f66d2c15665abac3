"""The order in which threads run: in two teams, one after the other between barriers, so that a missing one shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import arithmetic, bulk, dependent, matrix, memory, moves
from .grid import Array, Fault, GlobalMemory, Grid
from .operands import Step
from .parse import Instruction, Kernel, Symbol

#: instructions after which a program is taken to hang
LIMIT = 2_000_000
#: that run together: numpy is idle with fewer
THREADS = 8192
_PARTS: Any = (arithmetic, moves, memory, matrix, bulk, dependent)
_BUILDERS = {opcode: builder for part in _PARTS for opcode, builder in part.BUILDERS.items()}
_COLLECTIVE = ("bar", "wgmma")  # of more than one warp


def _step(i: Instruction) -> Step | None:
    """An instruction as a function of the grid and the threads that are at it; None for a branch."""
    if i.parts[0] in ("bra", "ret"):
        return None
    if i.parts[0] == "bar":
        return _barrier(i)
    prefixes = [i.opcode[:place] for place, letter in enumerate(i.opcode + ".") if letter == "."]
    builder: Any = next((_BUILDERS[p] for p in reversed(prefixes) if p in _BUILDERS), None)
    if builder is None:
        raise NotImplementedError(f"instruction {i.text}")
    return builder(i)


def _barrier(i: Instruction) -> Step:
    if [getattr(operand, "bits", None) for operand in i.operands] != [0]:
        raise NotImplementedError(i.text)

    def run(g: Grid, active: Array | None) -> None:
        there = g.everybody if active is None else active
        missing = ~(there | g.exited).reshape(g.programs, -1).all(1)
        if (there.reshape(g.programs, -1).any(1) & missing).any():
            raise Fault("a barrier that a part of a program's threads reach")

    return run


class Stop(NamedTuple):
    """Where a team waits for the other: before an instruction of both, or before one that cannot go on yet."""

    place: int
    threads: Array
    blocked: bool


class Compiled:
    """A kernel whose instructions are functions."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._steps: list[Callable[..., Any] | None] = [_step(i) for i in kernel.instructions]
        self._collective = [i.parts[0] in _COLLECTIVE for i in kernel.instructions]

    def run(self, g: Grid) -> None:
        """Run all threads to their end, in teams.

        Odd warps ahead of the even ones, or, where work lands late, the second half of a program's warps behind the
        first half: values that warps hold twice, of a tile smaller than a program, lie half of its warps apart.
        """
        warps = g.size // g.programs // 32
        warp = np.arange(g.size) // 32 % warps
        ahead = warp < max(1, warps // 2) if g.late else warp % 2 == 1
        teams = [_Team(self, g, threads) for threads in (ahead, ~ahead) if threads.any()]
        while any(each.waiting for each in teams):
            stops = [team.advance() for team in teams]
            there = [stop for stop in stops if stop is not None]
            if there and all(stop.blocked for stop in there):  # a second time, after all the others have gone on
                stops = [team.advance() for team in teams]
                there = [stop for stop in stops if stop is not None]
                if there and all(stop.blocked for stop in there):
                    raise Fault(f"waits for ever: {self.kernel.instructions[there[0].place].text}")
            if there and not any(stop.blocked for stop in there):
                self._together(g, teams, stops)

    def _together(self, g: Grid, teams: Sequence[_Team], stops: Sequence[Stop | None]) -> None:
        """Execute an instruction of more than one warp for the teams that are at it: the ones behind first."""
        place = min(stop.place for stop in stops if stop is not None)
        threads = np.zeros(g.size, bool)
        for stop in stops:
            if stop is not None and stop.place == place:
                threads |= stop.threads
        self.execute(g, place, None if threads.all() else threads)
        for team, stop in zip(teams, stops, strict=True):
            if stop is not None and stop.place == place:
                del team.waiting[place]
                team.put(place + 1, stop.threads)

    def execute(self, g: Grid, place: int, threads: Array | None) -> None:
        """One instruction for the threads that are at it."""
        i, step = self.kernel.instructions[place], self._steps[place]
        if i.predicate is not None:
            chosen = g.registers[i.predicate.number] ^ i.negated
            threads = chosen if threads is None else threads & chosen
            if not threads.any():
                return
        if g.profile is not None:
            g.profile.warps(threads, g.size)
        try:
            step(g, threads)
        except Fault as fault:
            raise Fault(f"{i.text}: {fault}") from None


class _Team:
    """Some of the threads, by the instruction that they are at; those behind run first, until others join them."""

    def __init__(self, compiled: Compiled, g: Grid, threads: Array) -> None:
        self._compiled, self._g, self._executed = compiled, g, 0
        self.waiting: dict[int, Array] = {0: threads}

    def put(self, place: int, threads: Array) -> None:
        """Add threads that are at an instruction."""
        if threads.any():
            self.waiting[place] = self.waiting[place] | threads if place in self.waiting else threads

    def advance(self) -> Stop | None:
        """Run until something is to be waited for; None at the end."""
        compiled, g = self._compiled, self._g
        while self.waiting:
            place = min(self.waiting)
            active = self.waiting.pop(place)
            behind = min(self.waiting, default=len(compiled._steps))
            everybody = None if active.all() else active
            while place < behind:
                self._executed += 1
                if self._executed > LIMIT:
                    raise Fault("runs for ever")
                if compiled._collective[place]:
                    self.put(place, active)
                    return Stop(place, active, False)
                if compiled._steps[place] is None:
                    self._branch(place, active)
                    break
                compiled.execute(g, place, everybody)
                if g.blocked:
                    g.blocked = False
                    self.put(place, active)
                    return Stop(place, active, True)
                place += 1
            else:
                if place == len(compiled._steps):
                    raise Fault("ran over the end")
                self.put(place, active)
        return None

    def _branch(self, place: int, active: Array) -> None:
        i, g = self._compiled.kernel.instructions[place], self._g
        taken = active
        if i.predicate is not None:
            taken = active & (g.registers[i.predicate.number] ^ i.negated)
        if i.parts[0] == "ret":
            g.exited = g.exited | taken
        else:
            target = i.operands[0]
            assert isinstance(target, Symbol)
            self.put(self._compiled.kernel.labels[target.name], taken)
        self.put(place + 1, active & ~taken)


def launch(
    compiled: Compiled,
    grid: Sequence[int],
    threads: int,
    parameters: dict[str, Any],
    memory: GlobalMemory,
    shared: int,
    **options: Any,
) -> None:
    """Run a launch, as many programs at a time as make `THREADS`; `options` are those of `Grid`."""
    together = max(1, THREADS // threads)
    coordinates = np.stack(np.meshgrid(*[np.arange(n) for n in grid], indexing="ij"), -1).reshape(-1, 3)
    with np.errstate(all="ignore"):
        for first in range(0, len(coordinates), together):
            some = coordinates[first : first + together]
            compiled.run(Grid(compiled.kernel, some, grid, threads, parameters, memory, shared, **options))
