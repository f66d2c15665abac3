"""The README's tables of networks and parts of them on GPUs, from the `bench.csv` of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .gpu import goals
from .gpu.networks import L2_GROUPS
from .tables import NOT_MEASURED, markdown

Rows = Sequence[Mapping[str, str]]
#: columns, by the providers of `benchmarks.gpu.networks`
PROVIDERS = ("eager", "cudnn", "compile", "max-autotune", "conv-by-conv", "fused")
LAUNCHED = ("eager", "cudnn", "compile", "fused", "frozen")
OF_L2 = ("eager", "cudnn", "fused")


def _times(rows: Rows, graph: bool) -> dict[str, str]:
    """Milliseconds by provider, as CUDA graphs or launch by launch; of several the first."""
    times: dict[str, str] = {}
    for row in rows:
        name, _, as_graph = row["provider"].partition("+")
        if row["status"] == "ok" and bool(as_graph) == graph:
            times.setdefault(name, f"{float(row['median_ms']):.3f}")
    return times


def _by_run(rows: Rows, headers: Sequence[str], told: str, line: Callable[[Rows], list[str] | None]) -> str:
    """A table for each GPU and versions, a line for each case that has one."""
    runs: dict[tuple[str, ...], dict[tuple[str, ...], list[Mapping[str, str]]]] = {}
    for row in rows:
        marks = row["gpu"], row["torch"], row["triton"], row["commit"]
        case = row["network"], row["part"], row["dtype"], row["batch"]
        runs.setdefault(marks, {}).setdefault(case, []).append(row)
    text = []
    for (gpu, torch, triton, commit), of_run in runs.items():
        lines = [[*case, *cells] for case, of_case in of_run.items() if (cells := line(of_case)) is not None]
        if lines:
            head = f"{gpu}, torch {torch}, Triton {triton}, commit {commit}. {told}, median milliseconds."
            table = markdown(["network", "part", "dtype", "batch", *headers], lines, numbers=1 + len(headers))
            text.append(f"{head}\n\n{table}")
    return "\n\n".join(text) or NOT_MEASURED


def networks(rows: Rows) -> str:
    """Per GPU and versions: median milliseconds of every provider, as CUDA graphs.

    Behind them the best other provider's time over that of the fused network (where its groups differ, the least), and
    the memory that it takes beside weights and input over eager's, both without a graph, and as graphs.
    """

    def line(of_case: Rows) -> list[str] | None:
        times = _times(of_case, graph=True)
        if not times:
            return None
        graphs = [row for row in of_case if row["provider"].endswith("+graph")]
        by_group = [goals.speedup([row for row in graphs if row["group"] == group]) for group in goals.WITH_PEERS]
        main = [row for row in of_case if row["group"] == "main"]
        ratios = [min((ratio for ratio in by_group if ratio), default=None)]
        ratios += [goals.memory(main), goals.memory(main, "+graph")]
        return [*(times.get(name, NOT_MEASURED) for name in PROVIDERS), *(f"{r:.2f}x" if r else "" for r in ratios)]

    headers = [*PROVIDERS, "best other / fused", "memory / eager's, no graph", "as graphs"]
    return _by_run([row for row in rows if row["group"] not in L2_GROUPS], headers, "CUDA graphs", line)


def launched(rows: Rows) -> str:
    """The same without a graph, every kernel launched by Python; of whole networks, in the group that has them all."""

    def line(of_case: Rows) -> list[str] | None:
        times = _times(of_case, graph=False)
        return [times.get(name, NOT_MEASURED) for name in LAUNCHED] if "fused" in times else None

    return _by_run([row for row in rows if row["part"] == "whole"], LAUNCHED, "Without a graph", line)


def by_l2(rows: Rows) -> str:
    """Blocks with L2 emptied before each call, and filled by the same call, as CUDA graphs."""

    def line(of_case: Rows) -> list[str] | None:
        times = _times(of_case, graph=True)
        return [times.get(name, NOT_MEASURED) for name in OF_L2] if times else None

    text = []
    for group in L2_GROUPS:
        of_group = [row for row in rows if row["group"] == group]
        text.append(_by_run(of_group, OF_L2, f"L2 {group}, CUDA graphs", line))
    return "\n\n".join(dict.fromkeys(text))
