"""The README's tables, as Markdown, from the rows of the CSV files and from the demo's JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from . import goals
from .cases import BATCHES, DTYPES, NETWORKS, PARTS, SIZE
from .results import Row

NOT_MEASURED = "not measured"
WAYS = ("eager", "compile", "fused", "frozen")
_MACHINE = ("cpu", "cpu_features", "amx", "threads", "system", "malloc", "torch", "triton", "fused_resblock", "commit")


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]], numbers: int = 0) -> str:
    """A Markdown table; the last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(headers) - numbers) + ["---:"] * numbers
    lines = (headers, rule, *rows)
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def machines(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows, apart by machine, versions and commit, in the order in which these first appear."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in _MACHINE), []).append(row)
    return list(groups.values())


def _ending(commit: object) -> str:
    text = str(commit or "")
    return f" ({text.removesuffix('-dirty')} with changes)" if text.endswith("-dirty") else f" ({text})" if text else ""


def machine_line(rows: Sequence[Row]) -> str:
    """One line on what the rows were measured with."""
    row = rows[-1]
    features = row.cpu_features.replace(" ", ", ") or "no known vector instructions"
    amx = "" if row.amx == "yes" else ", no AMX"
    triton = f", Triton {row.triton}" if row.triton else ""
    malloc = f" {row.malloc}." if row.malloc else ""
    return (
        f"{row.cpu} ({features}{amx}), {row.threads} threads, {row.system}. torch {row.torch}{triton}, "
        f"fused_resblock {row.fused_resblock}{_ending(row.commit)}, {row.date}.{malloc}"
    )


def _per_machine(rows: Sequence[Row], kinds: Sequence[str], table: Callable[[list[Row], bool], str]) -> str:
    """A table for each machine; the first is told so, and says what it lacks, the others only what they have."""
    groups = machines([row for row in rows if row.benchmark in kinds])
    tables = [f"{machine_line(group)}\n\n{table(group, group is groups[0])}" for group in groups]
    return "\n\n".join(tables) or NOT_MEASURED


def _ms(row: Row | None) -> str:
    if row is None:
        return NOT_MEASURED
    return "failed" if row.median_ms is None else f"{row.median_ms:.{1 if row.median_ms >= 100 else 2}f}"


def _caption(rows: Sequence[Row], what: str) -> str:
    """How the times were taken, and a warning if other programs held cores that they needed."""
    rounds = " or ".join(str(n) for n in sorted({row.rounds for row in rows if row.rounds is not None}))
    text = f"{what}, medians of {rounds or 'no'} rounds; 20th and 80th percentiles are in `benchmarks/results/`."
    disturbed = [row.other_cores or 0 for row in rows if row.disturbed()]
    if disturbed:
        text += (
            f" **Not to be trusted:** other programs kept up to {max(disturbed):.1f} of {rows[-1].cores} cores busy "
            f"in {len(disturbed)} of {len(rows)} measurements."
        )
    return text


def _times(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}x"


def latency(rows: Sequence[Row]) -> str:
    """Latency of every case: the standard ones, on the first machine measured or not, then any that were measured."""

    def table(group: list[Row], first: bool) -> str:
        find = goals.finder(group)
        keys = list(product(NETWORKS, PARTS, DTYPES, BATCHES, [SIZE])) if first else []
        keys += [(row.network, row.part, row.dtype, row.batch, row.size) for row in group]
        lines = []
        for key in dict.fromkeys(keys):
            case = dict(zip(("network", "part", "dtype", "batch", "size"), key, strict=True))
            found = {name: find(provider=name, **case) for name in WAYS}
            fused, frozen = found["fused"], found["frozen"]
            gains = [getattr(fused, "speedup_vs_eager", None)]
            gains += [getattr(row, "ratio_to_compile", None) for row in (fused, frozen)]
            name = case["network"] if case["size"] == SIZE else f"{case['network']} at {case['size']}x{case['size']}"
            lines.append([name, *key[1:4], *(_ms(found[way]) for way in WAYS), *map(_times, gains)])
        headers = ["network", "part", "dtype", "batch", *(f"{way} ms" for way in WAYS)]
        headers += ["eager / fused", "fused / compile", "frozen / compile"]
        told = _caption(group, f"One forward at {SIZE}x{SIZE}, the candidates taking turns")
        return f"{told}\n\n{markdown(headers, lines, 8)}"

    return _per_machine(rows, ["latency"], table)


def judged(rows: Sequence[Row]) -> str:
    """Every goal, what was measured, whether it is met, and whether it applies to the machine."""

    def table(group: list[Row], first: bool) -> str:
        lines = [line for line in goals.judge(group) if first or line[1] != NOT_MEASURED]
        return markdown(["goal", "measured", "met", "applies here"], lines)

    return _per_machine(rows, ["latency", "fuse", "packing"], table)


def fusing(rows: Sequence[Row]) -> str:
    """How long `fuse` takes, and how much longer than later ones the first call takes."""

    def table(group: list[Row], first: bool) -> str:
        find = goals.finder(group)
        lines = []
        standard = product(NETWORKS, DTYPES) if first else ()
        for network, dtype in dict.fromkeys([*standard, *((r.network, r.dtype) for r in group)]):
            found = [find(benchmark=name, network=network, dtype=dtype) for name in ("fuse", "packing")]
            lines.append([network, dtype, *map(_ms, found)])
        headers = ["network", "dtype", "`fuse(model)` ms", "packing in the first call ms"]
        return f"{_caption(group, 'Once a model')}\n\n{markdown(headers, lines, 2)}"

    return _per_machine(rows, ["fuse", "packing"], table)


def memory(rows: Sequence[Row]) -> str:
    """Peak memory of a process that runs one network, and what the network itself holds."""

    def table(group: list[Row], first: bool) -> str:
        lines = []
        for row in group:
            figures = (row.state_mib, row.packed_mib, row.imports_mib, row.peak_rss_mib)
            shown = ["failed" if row.status == "failed" else f"{value:.0f}" for value in figures]
            lines.append([row.network, row.dtype, row.batch, row.provider, *shown])
        headers = ["network", "dtype", "batch", "way", "parameters and buffers MiB", "packed weights MiB"]
        return markdown([*headers, "process before the network MiB", "peak of the process MiB"], lines, 4)

    return _per_machine(rows, ["memory"], table)


def _demo_line(result: dict[str, Any]) -> str:
    stamp = result.get("machine", {})
    hardware = stamp.get("gpu") if result.get("device") == "cuda" else stamp.get("cpu")
    threads = "" if result.get("device") == "cuda" else f", {stamp.get('threads')} threads"
    versions = f"torch {stamp.get('torch')}, fused_resblock {stamp.get('fused_resblock')}"
    return f"{hardware}{threads}, {result.get('dtype')}. {versions}{_ending(stamp.get('commit'))}."


def _cell(record: dict[str, Any], name: str, form: str) -> str:
    return format(record[name], form) if record.get(name) is not None else NOT_MEASURED


def demo(result: dict[str, Any]) -> str:
    """The demo's photographs: latency and agreement of each network."""
    if not result.get("photos"):
        return NOT_MEASURED
    lines = []
    for photo in result["photos"]:
        blocks = photo.get("blocks", [])
        times = [_cell(photo, name, ".2f") for name in ("eager_ms", "fused_ms", "speedup")]
        same = f"{photo['same_top1']} of {photo['batch']}" if "same_top1" in photo else NOT_MEASURED
        fused = f"{sum(bool(block.get('fused')) for block in blocks)} of {len(blocks)}"
        error = _cell(photo, "max_rel_error", ".1e")
        lines.append([photo["model"], photo.get("weights", ""), photo["batch"], fused, *times, error, same])
    headers = ["network", "weights", "batch", "blocks fused", "eager ms", "fused ms", "eager / fused"]
    headers += ["largest relative difference", "same top class"]
    disturbed = [photo["other_cores"] for photo in result["photos"] if photo.get("disturbed")]
    note = f" **Times not to be trusted:** others kept {max(disturbed):.1f} cores busy." if disturbed else ""
    return f"{_demo_line(result)}{note}\n\n{markdown(headers, lines, 7)}"


def digits(result: dict[str, Any]) -> str:
    """The demo's handwritten digits: accuracy of both networks and how far they agree."""
    told = result.get("digits")
    if not told:
        return NOT_MEASURED
    lines = []
    for way in ("eager", "fused"):
        accuracy = told[f"{way}_accuracy"]
        lines.append([way, f"{round(accuracy * told['count'])} of {told['count']}", f"{accuracy:.2%}"])
    return (
        f"{_demo_line(result)}\n\n{markdown(['network', 'right', 'accuracy'], lines, 2)}\n\n"
        f"Differing predictions: {told['differing']}; largest difference of a logit: {told['max_abs_error']:.1e}."
    )
