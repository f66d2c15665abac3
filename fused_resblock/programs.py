"""The programs of a block, or of a chain of blocks, kept for as long as what went into them holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from . import backends, dispatch
from .chain import bind
from .frozen import NEVER, generation, substituted
from .program import Program, signature
from .runner import Runner
from .watch import Guard


class Before:
    """Everything that a program is about to be bound to, as it is now: another thread may change it meanwhile.

    Args:
        modules: those that may take part, without repetition, the one that the program belongs to first.
        tensors: everything that may go into the program.
    """

    def __init__(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> None:
        self.generation = NEVER if substituted() else generation()
        self.guard: Guard | None = None
        if not any(tensor.is_inference() for tensor in tensors):  # those record no changes
            self.guard = Guard(modules, tensors, all_modes=True)


class _Kept:
    """Programs by `signature`, and what they all hold under; see `Programs.keep`."""

    def __init__(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor], all_modes: bool) -> None:
        self.guard = Guard(modules, tensors, all_modes)
        self.watched = set(modules[1:])
        self.caches = backends.generation
        self.programs: dict[tuple[object, ...], Program] = {}
        self.generation = 0  # in which they were last known to hold, if frozen


class Programs:
    """The programs of a block, or of a chain of blocks, by `signature`, as long as its modules and tensors hold."""

    LIMIT = 128  # signatures; images of every size may come, and each has its own

    def __init__(self) -> None:
        self._kept: _Kept | None = None  # read once a method: other threads may replace it

    @property
    def guard(self) -> Guard | None:
        """What the programs hold under; another one as soon as they had to be bound again."""
        kept = self._kept
        return None if kept is None else kept.guard

    def __iter__(self) -> Iterator[Program]:
        kept = self._kept
        return iter([] if kept is None else list(kept.programs.values()))

    def find(self, x: Tensor, frozen: bool = False) -> Program | None:
        """The program for such an input; None if there is none, or if something that went into it has changed.

        Args:
            x: an input.
            frozen: ask no more than once in a generation whether anything has; see `frozen`.
        """
        kept = self._kept
        if kept is None or not isinstance(x, Tensor):
            return None
        if kept.caches != backends.generation:  # what they hold was to be forgotten
            self._kept = None
            return None
        now = generation()
        known = frozen and kept.generation == now
        if known or kept.guard.holds():  # also where there is no such program: the next one is kept under this guard
            if frozen and not known and not substituted():
                kept.generation = now
            return kept.programs.get(signature(x))
        self._kept = None
        return None

    def keep(
        self,
        x: Tensor,
        program: Program,
        before: Before,
        modules: Sequence[nn.Module],
        tensors: Sequence[Tensor],
        all_modes: bool,
    ) -> None:
        """Keep a program for inputs such as x, unless anything has changed while it was bound.

        Args:
            x: an input.
            program: what was bound.
            before: made before it was.
            modules, tensors, all_modes: what it was bound to, as `Guard` has it.
        """
        if before.guard is None:
            return
        kept = self._kept
        if kept is None or not kept.watched.issuperset(modules[1:]):
            kept = _Kept(modules, tensors, all_modes)
        if not (before.guard.holds() and kept.guard.holds()):
            return
        if len(kept.programs) >= self.LIMIT:
            kept.programs.clear()
        kept.programs[signature(x)] = program
        kept.generation = before.generation
        self._kept = kept

    def bind(
        self,
        blocks: Sequence[tuple[Runner, str]],
        x: Tensor,
        modules: Sequence[nn.Module],
        stage_kernel: bool | None = None,
        following: tuple[Runner, Sequence[nn.Module]] | None = None,
    ) -> tuple[Program, Tensor] | None:
        """Bind a program, keep it, and give it with its result for x.

        None as `bind` gives it, or if a parameter is no plain tensor.

        Args:
            blocks: as `bind` has them.
            x: an input.
            modules: all that take part, the one that owns these programs first.
            stage_kernel: see `bind`.
            following: the block that reads the result, and its modules, if its first step may be computed too.
        """
        runners = [runner for runner, _ in blocks]
        tensors = [t for runner in runners for t in runner.parameters()]
        found = None
        everything = modules, tensors
        if following is not None:
            together = list(dict.fromkeys([*modules, *following[1]]))
            everything = together, [*tensors, *following[0].parameters()]
        if dispatch.plain(everything[1]):
            before = Before(*everything)
            found = bind(blocks, x, stage_kernel, None if following is None else following[0].steps[0])
        if found is None:
            return None
        if following is not None and found[0].ends.ahead is not None:
            runners.append(following[0])
            modules, tensors = everything
        self.keep(x, found[0], before, modules, tensors, any(runner.eval_only for runner in runners))
        return found
