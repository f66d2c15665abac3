"""The README's tables on GPUs: what was predicted, what was compiled, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .gpu import bandwidth, bench, goals
from .gpu.block_shapes import BlockShape
from .gpu.tails import Shape, shapes
from .tables import NOT_MEASURED, markdown

Rows = Sequence[Mapping[str, str]]


def _ms(us: str) -> str:
    return us if us == NOT_MEASURED else f"{float(us) / 1e3:.2f}"


def roofline(rows: Rows) -> str:
    """The networks without their classifiers: floors of four ways to run them, and what our kernels should take."""
    bodies = [row for row in rows if row["block"] == "stem and body"]
    if not bodies:
        return NOT_MEASURED
    first = bodies[0]
    columns = ("eager_us", "per_conv_us", "stage_us", "whole_us", "predicted_us", "predicted_stage_us")
    columns += ("predicted_whole_us",)
    headers = ["network", "floor of eager", "of conv by conv", "of stages", "of whole blocks"]
    headers += ["predicted, conv by conv", "predicted, with stages", "predicted, with whole blocks", "measured"]
    headers += ["predicted with stages / measured"]
    lines = []
    for row in bodies:
        seen = row["measured_us"]
        known = "-" if seen == NOT_MEASURED else f"{float(row['predicted_stage_us']) / float(seen):.2f}"
        lines.append([row["network"], *(_ms(row[c]) for c in columns), _ms(seen), known])
    told = f"{first['chip']}, batch {first['batch']}, {8 * int(first['itemsize'])}-bit elements, milliseconds."
    return f"{told}\n\n{markdown(headers, lines, numbers=9)}"


def stages(rows: Rows) -> str:
    """The first two stages of ResNet-50 and their blocks: floors, predictions, and what was measured."""
    shown = [row for row in rows if row["network"] == "resnet50" and re.match(r"l[12]|layer[12]|body", row["block"])]
    if not shown:
        return NOT_MEASURED
    columns = ("per_conv_us", "stage_us", "whole_us", "predicted_us", "predicted_stage_us", "predicted_whole_us")
    headers = ["part", "floor, conv by conv", "of stages", "of whole blocks"]
    headers += ["predicted, conv by conv", "predicted, with stages", "predicted, with whole blocks", "measured"]
    lines = [[row["block"], *(row[c] for c in columns), row["measured_us"]] for row in shown]
    first = shown[0]
    told = f"{first['network']}, {first['chip']}, batch {first['batch']}, microseconds."
    return f"{told}\n\n{markdown(headers, lines, numbers=7)}"


def basic_block(rows: Rows) -> str:
    """The blocks of ResNet-18: conv by conv, and what two designs that are not built would take."""
    if not rows:
        return NOT_MEASURED
    columns = ("per_conv_us", "one_floor_us", "measured_us", "predicted_us", "predicted_one_us", "winograd_bound_us")
    headers = ["block", "floor, conv by conv", "floor, one kernel", "measured, conv by conv"]
    headers += ["predicted, conv by conv", "predicted, one kernel", "bound, Winograd"]
    lines = [[row["block"], *(row[c] or "-" for c in columns)] for row in rows]
    told = f"{rows[0]['chip']}, batch {rows[0]['batch']}, fp16, microseconds."
    return f"{told}\n\n{markdown(headers, lines, numbers=6)}"


def predictions(rows: Rows) -> str:
    """Tiles that were timed: predicted over measured, and what the tile that is picked costs."""
    if not rows:
        return NOT_MEASURED
    columns = ("kind", "dtype", "batch", "tiles", "over_measured", "cases", "picked")
    columns += ("over_fastest", "worst_over_fastest")
    headers = ["", "dtype", "batch", "tiles timed", "median of predicted / measured", "cases", "pick among those timed"]
    headers += ["its time / fastest, mean", "the worst"]
    lines = [[row[column] or "-" for column in columns] for row in rows]
    return f"{rows[0]['gpu']}.\n\n{markdown(headers, lines, numbers=7)}"


def l2_rates(rows: Rows) -> str:
    """Three designs at two rates of L2, and what was measured."""
    if not rows:
        return NOT_MEASURED
    columns = ("predicted_us", "predicted_stage_us", "predicted_whole_us")
    columns += ("measured_conv_by_conv_us", "measured_us")
    headers = ["L2's rate, TB/s", "network", "part", "conv by conv", "with stages", "with whole blocks"]
    headers += ["measured, conv by conv", "measured, with stages"]
    lines = []
    for row in rows:
        rate = f"{row['l2_tb_per_s']}: {row['of']}"
        lines.append([rate, row["network"], row["part"], *(row[c] or NOT_MEASURED for c in columns)])
    return f"{rows[0]['chip']}, batch {rows[0]['batch']}, fp16, microseconds.\n\n{markdown(headers, lines, numbers=5)}"


def activations(rows: Rows) -> str:
    """What a forward holds besides weights and images, counted: eager, fused and frozen."""
    if not rows:
        return NOT_MEASURED
    headers = ["network", "batch", "eager MiB", "fused MiB", "frozen MiB", "of that between calls"]
    headers += ["fused / eager", "frozen / eager"]
    lines = []
    for row in rows:
        lines.append([row[name] for name in ("network", "batch", "eager_mib", "fused_mib", "frozen_mib", "held_mib")])
        lines[-1] += [f"{float(row[name]) / float(row['eager_mib']):.2f}x" for name in ("fused_mib", "frozen_mib")]
    told = f"{rows[0]['dtype']}, with the table of winners of an {rows[0]['table']}."
    return f"{told}\n\n{markdown(headers, lines, numbers=7)}"


def _largest(rows: Iterable[Mapping[str, str]], column: str) -> int:
    return max(int(row[column]) for row in rows)


def codegen(rows: Rows) -> str:
    """Per chip: kernels compiled, the most registers, spills."""
    if not rows:
        return NOT_MEASURED
    lines = []
    for capability in sorted({int(row["capability"]) for row in rows}):
        of_chip = [row for row in rows if int(row["capability"]) == capability]
        spilling = sum(int(row["local"]) > 0 or int(row["stack"]) > 0 for row in of_chip)
        registers, shared = _largest(of_chip, "registers"), _largest(of_chip, "shared")
        lines.append([f"sm_{capability}", len(of_chip), registers, f"{shared / 1024:.0f}", spilling])
    headers = ["chip", "kernels and tiles", "most registers", "most shared memory KiB", "with spills"]
    return f"Triton {rows[0]['triton']}.\n\n{markdown(headers, lines, numbers=4)}"


def emulated(rows: Rows) -> str:
    """Per Triton and chip: compiled kernels that were run, how many were right, and the worst bank conflicts."""
    if not rows:
        return NOT_MEASURED
    lines = []
    for release, capability in dict.fromkeys((row["triton"], row["capability"]) for row in rows):
        own = [row for row in rows if (row["triton"], row["capability"]) == (release, capability)]
        counted = [row for row in own if int(row["ideal"] or 0)]
        conflicts = max((int(row["wavefronts"]) / int(row["ideal"]) - 1 for row in counted), default=0.0)
        dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in own))
        right = sum(row["status"] == "ok" for row in own)
        lines.append([release, f"sm_{capability}", dtypes, len(own), right, f"{conflicts:.0%}"])
    headers = ["Triton", "chip", "dtypes", "kernels and tiles", "right", "most bank conflicts"]
    return markdown(headers, lines, numbers=3)


def checked(rows: Rows) -> str:
    """Per GPU, commit and kind of check how many were right and how many were not, and what a test run said."""
    kinds: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        kinds.setdefault((row["gpu"], row["commit"], row["kernel"]), []).append(row)
    lines = []
    for kind, own in kinds.items():
        right = sum(row["status"] == "ok" for row in own)
        lines.append([*kind, right, len(own) - right, own[0]["note"] if len(own) == 1 else ""])
    headers = ["GPU", "commit", "checked", "right", "not right", "said"]
    return markdown(headers, lines, numbers=3) if lines else NOT_MEASURED


def moved(rows: Rows) -> str:
    """Bytes in device memory a pixel and channel of the 3x3, of tails and blocks at batch 128: counted, and moved."""
    lines = []
    for shape, row, total in _profiled(rows):
        unit = 128 * shape.size**2 * shape.width
        marks = [shape.case(), row["kernel"], row["gpu"], row["commit"]]
        counted = shape.dram_bytes(128, 2)
        lines.append([*marks, f"{counted / unit:.1f}", f"{total / unit:.1f}", f"{total / counted:.2f}x"])
    headers = ["tail", "kernel", "GPU", "commit", "counted", "moved", "moved / counted"]
    return markdown(headers, lines, numbers=3) if lines else NOT_MEASURED


def _profiled(rows: Rows) -> Iterator[tuple[Shape, Mapping[str, str], float]]:
    """The tails and blocks that the profiler saw at batch 128, and the bytes that each moved."""
    for shape in shapes(False):
        launch = f"{'block' if isinstance(shape, BlockShape) else 'tail'}.{shape.name}.b128"
        for row in (row for row in rows if row["launch"] == launch and row["status"] == "ok"):
            yield shape, row, float(row["dram_read_bytes"]) + float(row["dram_write_bytes"])


def judged(rows: Rows, profile: Rows, tuned: Rows = (), rates: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """What is meant to be reached on a GPU, and what was.

    Args:
        rows, profile, tuned: of `bench.csv`, `profile.csv` and `tune.csv`.
        rates: GPU -> what `ceilings.json` holds.
    """
    if not rows:
        return NOT_MEASURED
    tails = [total / shape.dram_bytes(128, 2) for shape, _, total in _profiled(profile)]
    lines = goals.judge(rows, bench.planned()) + goals.besides(tails, bandwidth.shares(tuned, rates or {}))
    return markdown(["goal", "measured", "met"], [list(line) for line in lines], numbers=0)
