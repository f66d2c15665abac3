"""What the library is meant to reach on a CPU, as data, and what a machine's measurements say to each goal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cases import BATCHES, BODY, DTYPES, PARTS, Case
from .results import Row


@dataclass(frozen=True)
class Goal:
    """A bound on one quotient of medians, for every case that it names.

    `measure` is "speedup_vs_eager" of a fused network, of which at least `limit` is wanted, or "ratio_to_compile" of a
    frozen one, of which at most that: compiled networks are frozen too.
    """

    measure: str
    limit: float
    network: str
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    parts: tuple[str, ...]

    def __str__(self) -> str:
        cases = f"{self.network} {_either(self.dtypes)}, batch {_either(self.batches)}, {_either(self.parts)}"
        if self.measure == "speedup_vs_eager":
            return f"{cases}: at least {self.limit}x as fast as eager"
        return f"{cases}: frozen, at most {self.limit}x the time of compile"

    @property
    def provider(self) -> str:
        """Whose measurements are held against it."""
        return "fused" if self.measure == "speedup_vs_eager" else "frozen"

    def cases(self) -> list[Case]:
        """Every case that the goal is held against."""
        return [Case(self.network, p, d, b) for d in self.dtypes for b in self.batches for p in self.parts]

    def holds(self, value: float) -> bool:
        """Whether a measured quotient is within the limit."""
        return value >= self.limit if self.measure == "speedup_vs_eager" else value <= self.limit


def _either(values: Sequence[object]) -> str:
    return " and ".join(str(value) for value in values)


#: all of them are set for a CPU with AMX, whose bf16 units change what can be gained
AMX_GOALS = (
    Goal("speedup_vs_eager", 2.0, "resnet50", ("bfloat16",), (16,), ("whole",)),
    Goal("ratio_to_compile", 1.1, "resnet50", ("bfloat16",), (16,), (BODY,)),
    Goal("speedup_vs_eager", 1.5, "resnet50", ("bfloat16",), (1,), ("whole",)),
    Goal("ratio_to_compile", 1.0, "resnet50", ("bfloat16",), (1,), PARTS),
    Goal("speedup_vs_eager", 1.1, "resnet50", ("float32",), BATCHES, ("whole",)),
    Goal("speedup_vs_eager", 1.0, "resnet18", DTYPES, BATCHES, PARTS),
)
#: seconds for `fuse` and the packing in the first call together, on any machine
FUSE_GOAL_S = 5.0
FUSE_NETWORK = "resnet50"

Find = Callable[..., Row | None]


def finder(rows: Sequence[Row]) -> Find:
    """A function that gives the last row whose fields have the given values, or None."""

    def find(**wanted: object) -> Row | None:
        hits = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
        return hits[-1] if hits else None

    return find


def judge(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """Hold the measurements of one machine against the goals.

    Returns:
        For each goal: what it is, what was measured (the worst of its cases), "yes" or "no" or "not measured" to
        whether it is met, and whether it applies to this machine. A goal of several cases is met if all are.
    """
    find = finder(rows)
    amx = any(row.amx == "yes" for row in rows)
    applies = "yes: the CPU has AMX" if amx else "no: set for a CPU with AMX, which this one lacks"
    return [(str(goal), *_judge(goal, find), applies) for goal in AMX_GOALS] + [_judge_fusing(find)]


def _judge(goal: Goal, find: Find) -> tuple[str, str]:
    found = [find(benchmark="latency", provider=goal.provider, **vars(case)) for case in goal.cases()]
    failed = [row for row in found if row is not None and row.status == "failed"]
    if failed:
        return f"{len(failed)} of {len(found)} failed", "no"
    values = [getattr(row, goal.measure) for row in found if row is not None]
    values = [value for value in values if value is not None]
    if not values:
        return "not measured", "not measured"
    worst = min(values) if goal.measure == "speedup_vs_eager" else max(values)
    shown = f"{worst:.3f}x" + (f" (worst of {len(values)})" if len(values) > 1 else "")
    if not goal.holds(worst):
        return shown, "no"
    missing = len(found) - len(values)
    return (f"{shown}; {missing} not measured", "not measured") if missing else (shown, "yes")


def _judge_fusing(find: Find) -> tuple[str, str, str, str]:
    text = f"{FUSE_NETWORK} {_either(DTYPES)}: fuse and first packing in under {FUSE_GOAL_S:g} s"
    seconds = []
    for dtype in DTYPES:
        parts = [find(benchmark=name, network=FUSE_NETWORK, dtype=dtype) for name in ("fuse", "packing")]
        times = [row.median_ms for row in parts if row is not None and row.median_ms is not None]
        if len(times) == 2:
            seconds.append(sum(times) / 1e3)
    if not seconds:
        return text, "not measured", "not measured", "yes"
    shown = f"{max(seconds):.2f} s" + (f" (worst of {len(seconds)})" if len(seconds) > 1 else "")
    met = "no" if max(seconds) >= FUSE_GOAL_S else "yes" if len(seconds) == len(DTYPES) else "not measured"
    return text, shown, met, "yes"
