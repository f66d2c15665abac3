"""What the library is meant to reach on a GPU, and what a table of measurements says to each goal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..cases import BODY
from ..tables import NOT_MEASURED
from .records import Row

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
        measure: what is measured of its rows, None where it was not.
        limit: the bound.
        at_least: whether it is a lower one.
        unit: behind the figure.
        most: whether it is enough if more than half of the cases meet it.
    """

    text: str
    matches: Callable[[Of], bool]
    measure: Callable[[Sequence[Row]], float | None]
    limit: float
    at_least: bool = True
    unit: str = "x"
    most: bool = False


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


def _early_stage(of: Of) -> bool:
    return of.network == "resnet50" and of.part in ("layer1", "layer2") and 64 <= of.batch <= 256


def _block(of: Of) -> bool:
    return "." in of.part


def memory(rows: Sequence[Row]) -> float | None:
    """The memory that ours takes besides weights and input, over eager's."""
    used = {r["provider"]: float(r["extra_mib"]) for r in rows if r["extra_mib"] and r["group"] == "main"}
    eager, own = used.get("eager"), used.get("fused")
    return own / eager if eager and own is not None else None


GOALS = (
    Goal(
        "ResNet-50, fp16, batch 128: the best peer's time over ours",
        lambda of: of == ("resnet50", "whole", "fp16", 128),
        speedup,
        1.5,
    ),
    Goal(
        "other networks, batch 32 to 256: the best peer's time over ours",
        lambda of: of.network in OTHERS and of.part == "whole" and 32 <= of.batch <= 256,
        speedup,
        1.2,
    ),
    Goal("every network at every batch: the best peer's time over ours", lambda of: of.part == "whole", speedup, 1.0),
    Goal("every block: the best peer's time over ours", _block, speedup, 1.0),
    Goal("most blocks: the best peer's time over ours", _block, speedup, 1.3, most=True),
    Goal(
        "layer1 and layer2 of ResNet-50, batch 64 to 256: the time conv by conv over ours",
        _early_stage,
        _against("conv-by-conv"),
        1.3,
    ),
    Goal(
        "every stage and body at every batch: the time conv by conv over ours",
        lambda of: of.part.startswith("layer") and not _block(of),
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
        "body of ResNet-50, fp16, batch 128, CUDA graph (set for an H100)",
        lambda of: of == ("resnet50", BODY, "fp16", 128),
        graph_ms,
        2.7,
        False,
        " ms",
    ),
    Goal(
        "ResNet-50, fp16, batch 1, CUDA graph (set for an H100)",
        lambda of: of == ("resnet50", "whole", "fp16", 1),
        graph_ms,
        0.35,
        False,
        " ms",
    ),
    Goal(
        "ResNet-18, fp16, batch 1, CUDA graph (set for an H100)",
        lambda of: of == ("resnet18", "whole", "fp16", 1),
        graph_ms,
        0.15,
        False,
        " ms",
    ),
    Goal("memory of a network over eager's", lambda of: of.part == "whole", memory, 0.7, False),
)


def judge(rows: Sequence[Row], planned: Iterable[Of] = ()) -> list[tuple[str, str, str]]:
    """For each goal: what it is, the worst that was measured, and "yes", "no", "yes so far" or "not measured".

    A goal of several cases is met if all of them, or most, meet it; how many those are stands beside the figure. It is
    met "so far" where not all that are `planned` have been measured.
    """
    cases: dict[Of, list[Row]] = {of: [] for of in planned}
    for row in rows:
        of = Of(row["network"], row["part"], row["dtype"], int(row["batch"]))
        cases.setdefault(of, []).append(row)
    verdicts = []
    for goal in GOALS:
        values = [goal.measure(of_case) for of, of_case in cases.items() if goal.matches(of)]
        verdicts.append(verdict(goal.text, values, goal.limit, goal.at_least, goal.unit, goal.most))
    return verdicts


def verdict(
    text: str,
    values: Sequence[float | None],
    limit: float,
    at_least: bool = True,
    unit: str = "x",
    most: bool = False,
) -> tuple[str, str, str]:
    """A line of `judge`: the goal, the worst of what is known, and whether that is within the limit."""
    bound = f"{text}: at {'least' if at_least else 'most'} {limit:g}{unit}"
    known = [value for value in values if value is not None]
    if not known:
        return bound, NOT_MEASURED, NOT_MEASURED
    within = sum(value >= limit if at_least else value <= limit for value in known)
    met = 2 * within > len(known) if most else within == len(known)
    of_all = f"{len(known)}" if len(known) == len(values) else f"{len(known)}, {len(values) - len(known)} not measured"
    reach = "" if within == len(known) else f"; met by {within}"
    shown = f"{min(known) if at_least else max(known):.3g}{unit}" + f" (worst of {of_all}{reach})" * (len(values) > 1)
    return bound, shown, ("yes" if len(known) == len(values) else "yes so far") if met else "no"


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
