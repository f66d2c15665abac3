"""What the library is meant to reach on a GPU, and what a table of measurements says to each goal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import NamedTuple

from ..cases import BODY
from ..tables import NOT_MEASURED
from .records import UNFINISHED, Row

#: what a user could take instead, in eager mode or as a CUDA graph
FUSING = ("cudnn", "compile", "max-autotune", "onnxruntime")  # without one of these a group says nothing of the best
PEERS = ("eager", "folded", *FUSING)
OURS = ("fused", "fused+graph")
OTHERS = ("resnet18", "resnet34", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")


class Of(NamedTuple):
    """What was measured: a network or a part of one, in one dtype, at one batch size."""

    network: str
    part: str
    dtype: str
    batch: int


class Goal(NamedTuple):
    """A bound on something measured of every case that matches.

    Attributes:
        text: the goal in words.
        matches: whether a case is meant.
        groups: of providers that take turns, in which it is measured.
        measure: what is measured of the rows of a group, None where it was not.
        limit: the bound.
        at_least: whether it is a lower one.
        unit: behind the figure.
        most: whether it is enough if more than half of the cases meet it.
    """

    text: str
    matches: Callable[[Of], bool]
    groups: tuple[str, ...]
    measure: Callable[[Sequence[Row]], float | None]
    limit: float
    at_least: bool = True
    unit: str = "x"
    most: bool = False


#: the groups of `networks.GROUPS` in which peers take turns with ours
WITH_PEERS = ("main", "compile", "max-autotune", "engines")


def _best(rows: Sequence[Row], names: Sequence[str]) -> float | None:
    times = [float(r["median_ms"]) for r in rows if r["provider"] in names and r["status"] == "ok"]
    return min(times, default=None)


def speedup(rows: Sequence[Row]) -> float | None:
    """The best peer's time over ours."""
    names, fusing = ([name + graph for name in peers for graph in ("", "+graph")] for peers in (PEERS, FUSING))
    peer, own = _best(rows, names), _best(rows, OURS)
    return peer / own if peer and own and _best(rows, fusing) is not None else None


def _against(provider: str) -> Callable[[Sequence[Row]], float | None]:
    """A provider's time over ours, as CUDA graphs."""

    def quotient(rows: Sequence[Row]) -> float | None:
        other, own = _best(rows, (f"{provider}+graph",)), graph_ms(rows)
        return other / own if other and own else None

    return quotient


def graph_ms(rows: Sequence[Row]) -> float | None:
    """The time of ours as a CUDA graph."""
    return _best(rows, ("fused+graph",))


def _early_stage(of: Of) -> bool:
    return of.network == "resnet50" and of.part in ("layer1", "layer2") and 64 <= of.batch <= 256


def _block(of: Of) -> bool:
    return "." in of.part


def memory(rows: Sequence[Row], graph: str = "") -> float | None:
    """The memory that ours takes besides weights and input, over eager's; both launched one by one, or as "+graph"."""
    used = {r["provider"]: float(r["extra_mib"]) for r in rows if r["extra_mib"]}
    eager, own = used.get(f"eager{graph}"), used.get(f"fused{graph}")
    return own / eager if eager and own is not None else None


GOALS = (
    Goal(
        "ResNet-50, fp16, batch 128: the best peer's time over ours",
        lambda of: of == ("resnet50", "whole", "fp16", 128),
        WITH_PEERS,
        speedup,
        1.5,
    ),
    Goal(
        "other networks, batch 32 to 256: the best peer's time over ours",
        lambda of: of.network in OTHERS and of.part == "whole" and 32 <= of.batch <= 256,
        WITH_PEERS,
        speedup,
        1.2,
    ),
    Goal(
        "every network at every batch: the best peer's time over ours",
        lambda of: of.part == "whole",
        WITH_PEERS,
        speedup,
        1.0,
    ),
    Goal("every block: the best peer's time over ours", _block, WITH_PEERS, speedup, 1.0),
    Goal("most blocks: the best peer's time over ours", _block, WITH_PEERS, speedup, 1.3, most=True),
    Goal(
        "layer1 and layer2 of ResNet-50, batch 64 to 256: the time conv by conv over ours",
        _early_stage,
        ("by-stage",),
        _against("conv-by-conv"),
        1.3,
    ),
    Goal(
        "every stage and body at every batch: the time conv by conv over ours",
        lambda of: of.part.startswith("layer") and not _block(of),
        ("by-stage",),
        _against("conv-by-conv"),
        1.0,
    ),
    Goal(
        "layer1 and layer2 of ResNet-50, batch 64 to 256: the time of max-autotune over ours",
        _early_stage,
        ("max-autotune",),
        _against("max-autotune"),
        2.0,
    ),
    Goal(
        "body of ResNet-50, fp16, batch 128, CUDA graph (set for an H100)",
        lambda of: of == ("resnet50", BODY, "fp16", 128),
        ("by-stage",),
        graph_ms,
        2.7,
        False,
        " ms",
    ),
    Goal(
        "ResNet-50, fp16, batch 1, CUDA graph (set for an H100)",
        lambda of: of == ("resnet50", "whole", "fp16", 1),
        ("main",),
        graph_ms,
        0.35,
        False,
        " ms",
    ),
    Goal(
        "ResNet-18, fp16, batch 1, CUDA graph (set for an H100)",
        lambda of: of == ("resnet18", "whole", "fp16", 1),
        ("main",),
        graph_ms,
        0.15,
        False,
        " ms",
    ),
    Goal("memory of a network over eager's", lambda of: of.part == "whole", ("main",), memory, 0.7, False),
)


def judge(rows: Sequence[Row], planned: Iterable[tuple[Of, str]] = ()) -> list[tuple[str, str, str]]:
    """For each goal: what it is, the worst that was measured, and "yes", "no", "... so far" or "not measured".

    A goal of several cases is met if all of them, or most, meet it; how many those are stands beside the figure. What
    is known of a case is the worst of its groups, each of one commit: there its providers took turns.

    Args:
        rows: of `bench.csv`.
        planned: cases and groups that are to be measured; "so far" is said where one of them is not.
    """
    turns: dict[tuple[Of, str], dict[object, list[Row]]] = {}
    settled: set[tuple[Of, str]] = set()
    for row in rows:
        key = Of(row["network"], row["part"], row["dtype"], int(row["batch"])), row["group"]
        turns.setdefault(key, {}).setdefault((row.get("gpu"), row.get("commit")), []).append(row)
        if row["provider"] == "all" and row["status"] not in UNFINISHED:
            settled.add(key)
    to_come = set(planned) - settled
    verdicts = []
    for goal in GOALS:
        keys = [key for key in turns if goal.matches(key[0]) and key[1] in goal.groups]
        cases: dict[Of, list[float]] = {}
        for key in keys:
            values = [goal.measure(of_commit) for of_commit in turns[key].values()]
            cases.setdefault(key[0], []).extend(value for value in values if value is not None)
        worst = min if goal.at_least else max
        known = [worst(values) for values in cases.values() if values]
        missing = len({of for of, group in to_come if goal.matches(of) and group in goal.groups})
        verdicts.append(verdict(goal.text, known, goal.limit, goal.at_least, goal.unit, goal.most, missing))
    return verdicts


def verdict(
    text: str,
    known: Sequence[float],
    limit: float,
    at_least: bool = True,
    unit: str = "x",
    most: bool = False,
    missing: int = 0,
) -> tuple[str, str, str]:
    """A line of `judge`: the goal, the worst of what is known, and whether that is within the limit.

    Of a goal for most cases the middle one stands for the worst. `missing` counts cases not, or not wholly, measured.
    """
    bound = f"{text}: at {'least' if at_least else 'most'} {limit:g}{unit}"
    if not known:
        return bound, NOT_MEASURED, NOT_MEASURED
    within = sum(value >= limit if at_least else value <= limit for value in known)
    met = 2 * within > len(known) if most else within == len(known)
    turned = most and 2 * (within + missing) > len(known) + missing  # by what is not measured
    shown = median(known) if most else min(known) if at_least else max(known)
    told = f"{'median' if most else 'worst'} of {len(known)}"
    told += f"; met by {within}" * (within < len(known)) + f"; {missing} not wholly measured" * (missing > 0)
    said = f"{shown:.3g}{unit}" + f" ({told})" * (len(known) > 1 or missing > 0)
    return bound, said, ("yes" if met else "no") + " so far" * (missing > 0 and (met or turned))


def besides(tails: Sequence[float], convolutions: Sequence[float]) -> list[tuple[str, str, str]]:
    """Lines of `judge` for what is no network and no part of one.

    Args:
        tails: of each tail the bytes of device memory that it moved over those counted.
        convolutions: of each that memory binds the share of the bandwidth; see `bandwidth.shares`.
    """
    return [
        verdict("tails, batch 128: bytes moved over those counted", tails, 1.15, False),
        verdict("convolutions bound by memory, 16 bits, batch 128: bandwidth over a copy's", convolutions, 0.7),
    ]
