"""What the library is meant to reach on a GPU, and what a table of measurements says to each goal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..cases import BODY
from ..tables import NOT_MEASURED
from .records import Row

#: what a user could take instead, in eager mode or as a CUDA graph
FUSING = ("cudnn", "compile", "max-autotune", "onnxruntime")  # without one of these a group says nothing of the best
PEERS = ("eager", "folded", *FUSING)
OURS = ("fused", "fused+graph")
OTHERS = ("resnet18", "resnet34", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")


class Goal(NamedTuple):
    """A bound on something measured of every case that matches.

    Attributes:
        text: the goal in words.
        matches: whether a (network, part, batch) is meant.
        measure: what is measured of its rows, None where it was not.
        limit: the bound.
        at_least: whether it is a lower one.
        unit: behind the figure.
    """

    text: str
    matches: Callable[[str, str, int], bool]
    measure: Callable[[Sequence[Row]], float | None]
    limit: float
    at_least: bool = True
    unit: str = "x"


def _best(rows: Sequence[Row], names: Sequence[str]) -> float | None:
    times = [float(r["median_ms"]) for r in rows if r["provider"] in names and r["status"] == "ok"]
    return min(times, default=None)


def speedup(rows: Sequence[Row]) -> float | None:
    """The best peer's time over ours, by each group alone (its providers took turns), and of those the smallest."""
    names, fusing = ([name + graph for name in peers for graph in ("", "+graph")] for peers in (PEERS, FUSING))
    found = []
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        peer, own = _best(of_group, names), _best(of_group, OURS)
        if peer is not None and own is not None and _best(of_group, fusing) is not None:
            found.append(peer / own)
    return min(found, default=None)


def _against(provider: str) -> Callable[[Sequence[Row]], float | None]:
    """A provider's time over ours, of the group in which they took turns, as CUDA graphs."""

    def quotient(rows: Sequence[Row]) -> float | None:
        groups = {row["group"] for row in rows if row["provider"] == f"{provider}+graph"}
        of_group = [row for row in rows if row["group"] in groups]
        other, own = _best(of_group, (f"{provider}+graph",)), graph_ms(of_group)
        return other / own if other and own else None

    return quotient


def graph_ms(rows: Sequence[Row]) -> float | None:
    """The time of ours as a CUDA graph."""
    return _best(rows, ("fused+graph",))


def _early_stage(network: str, part: str, batch: int) -> bool:
    return network == "resnet50" and part in ("layer1", "layer2") and 64 <= batch <= 256


def memory(rows: Sequence[Row]) -> float | None:
    """The memory that ours takes besides weights and input, over eager's."""
    used = {r["provider"]: float(r["extra_mib"]) for r in rows if r["extra_mib"] and r["group"] == "main"}
    eager, own = used.get("eager"), used.get("fused")
    return own / eager if eager and own is not None else None


GOALS = (
    Goal(
        "ResNet-50, batch 128: the best peer's time over ours",
        lambda n, p, b: (n, p, b) == ("resnet50", "whole", 128),
        speedup,
        1.5,
    ),
    Goal(
        "other networks, batch 32 to 256: the best peer's time over ours",
        lambda n, p, b: n in OTHERS and p == "whole" and 32 <= b <= 256,
        speedup,
        1.2,
    ),
    Goal("every network at every batch: the best peer's time over ours", lambda n, p, b: p == "whole", speedup, 1.0),
    Goal("every block: the best peer's time over ours", lambda n, p, b: "." in p, speedup, 1.0),
    Goal(
        "layer1 and layer2 of ResNet-50, batch 64 to 256: the time conv by conv over ours",
        _early_stage,
        _against("conv-by-conv"),
        1.3,
    ),
    Goal(
        "every stage and body at every batch: the time conv by conv over ours",
        lambda n, p, b: p.startswith("layer") and "." not in p,
        _against("conv-by-conv"),
        1.0,
    ),
    Goal(
        "layer1 and layer2 of ResNet-50, batch 64 to 256: the time of max-autotune over ours",
        _early_stage,
        _against("max-autotune"),
        2.0,
    ),
    Goal(
        "body of ResNet-50, batch 128, CUDA graph (set for an H100)",
        lambda n, p, b: (n, p, b) == ("resnet50", BODY, 128),
        graph_ms,
        2.7,
        False,
        " ms",
    ),
    Goal(
        "ResNet-50, batch 1, CUDA graph (set for an H100)",
        lambda n, p, b: (n, p, b) == ("resnet50", "whole", 1),
        graph_ms,
        0.35,
        False,
        " ms",
    ),
    Goal(
        "ResNet-18, batch 1, CUDA graph (set for an H100)",
        lambda n, p, b: (n, p, b) == ("resnet18", "whole", 1),
        graph_ms,
        0.15,
        False,
        " ms",
    ),
    Goal("memory of a network over eager's", lambda n, p, b: p == "whole", memory, 0.7, False),
)


def judge(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """For each goal: what it is, the worst that was measured, and "yes", "no" or "not measured".

    A goal of several cases is met if all that were measured meet it; how many those are stands beside the figure.
    """
    cases: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["network"], row["part"], int(row["batch"])), []).append(row)
    verdicts = []
    for goal in GOALS:
        values = [goal.measure(of_case) for case, of_case in cases.items() if goal.matches(*case)]
        known = [value for value in values if value is not None]
        verdicts.append(verdict(goal.text, known, goal.limit, goal.at_least, goal.unit))
    return verdicts


def verdict(
    text: str, known: Sequence[float], limit: float, at_least: bool = True, unit: str = "x"
) -> tuple[str, str, str]:
    """A line of `judge`: the goal, the worst of what is known, and whether that is within the limit."""
    bound = f"{text}: at {'least' if at_least else 'most'} {limit:g}{unit}"
    if not known:
        return bound, NOT_MEASURED, NOT_MEASURED
    worst = min(known) if at_least else max(known)
    met = worst >= limit if at_least else worst <= limit
    count = f" (worst of {len(known)})" if len(known) > 1 else ""
    return bound, f"{worst:.3g}{unit}{count}", "yes" if met else "no"
