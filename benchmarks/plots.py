"""Pictures of the results: `python -m benchmarks.plots`, into `benchmarks/results/`.

`cpu.png` shows the latency of every provider on the CPU, `roofline.png` the floors and predictions for the blocks and
bodies on a GPU, `gpu.png` what was measured there. A picture is drawn only where there are results for it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import results
from .network_tables import PROVIDERS
from .readme_tables import Sources, load
from .results import Row
from .tables import NOT_MEASURED, machines

#: provider or floor -> colour; what is ours is the strongest
COLOURS = {
    "eager": "#9aa5b1",
    "compile": "#e0a458",
    "max-autotune": "#c1666b",
    "fused": "#1b6ca8",
    "frozen": "#6a4c93",
    "stages": "#0b3c5d",
    "cudnn": "#7fb069",
    "floor, conv by conv": "#cfd8dc",
    "floor, stages": "#b0bec5",
    "predicted, conv by conv": "#1b6ca8",
    "predicted, with stages": "#0b3c5d",
    "measured": "#c1666b",
}
BLOCKS, NETWORKS = "blocks of resnet50, measured conv by conv", "stem and body, measured with the classifier"
Bars = Mapping[str, Mapping[str, float]]  # label of a group -> name of a bar -> value


def draw(panels: Mapping[str, Bars], unit: str, title: str, file: Path) -> None:
    """Write a picture of grouped horizontal bars, one panel a title; absent bars stay empty."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(name for bars in panels.values() for group in bars.values() for name in group))
    rows = max(len(bars) for bars in panels.values())
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(6.5 * across, 1 + down * (0.8 + rows * (0.2 + 0.17 * len(names)))), layout="constrained")
    figure.suptitle(title, fontsize=10)
    places = figure.subplots(down, across, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, (panel, bars) in zip(places, panels.items(), strict=False):
        height = 0.8 / len(names)
        for place, name in enumerate(names):
            known = [(row, group[name]) for row, group in enumerate(bars.values()) if name in group]
            offset = (place - (len(names) - 1) / 2) * height
            drawn = axes.barh(
                [row + offset for row, _ in known],
                [value for _, value in known],
                height,
                color=COLOURS.get(name, "#c0c0c0"),
                label=name,
            )
            axes.bar_label(
                drawn,
                [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for _, value in known],
                padding=2,
                fontsize=6,
            )
        axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.02)
        axes.set_xlabel(unit)
        axes.set_title(panel, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    keys = [Patch(color=COLOURS.get(name, "#c0c0c0"), label=name) for name in names]  # no panel has all of them
    figure.legend(handles=keys, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(file, dpi=120)


def cpu(rows: Sequence[Row]) -> tuple[dict[str, Bars], str] | None:
    """Latency on the first machine by batch: a panel for one image, and one for the largest batch."""
    timed = [row for row in rows if row.benchmark == "latency" and row.median_ms is not None]
    if not timed:
        return None
    timed = machines(timed)[0]
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in timed:
        panel = panels.setdefault(f"batch {row.batch}", {})
        panel.setdefault(f"{row.network} {row.part} {row.dtype}", {})[row.provider] = row.median_ms or 0.0
    last = timed[-1]
    return dict(panels), f"{last.cpu}, {last.threads} threads, torch {last.torch}"


def roofline(rows: Sequence[Mapping[str, str]]) -> tuple[dict[str, Bars], str] | None:
    """ResNet-50's stem and blocks, measured conv by conv, and all networks, measured with their classifiers."""
    if not rows:
        return None
    columns = {
        "floor, conv by conv": "per_conv_us",
        "floor, stages": "stage_us",
        "predicted, conv by conv": "predicted_us",
        "predicted, with stages": "predicted_stage_us",
        "measured": "measured_us",
    }

    def bars(row: Mapping[str, str]) -> dict[str, float]:
        return {name: float(row[column]) for name, column in columns.items() if row[column] != NOT_MEASURED}

    of_one = [row for row in rows if row["network"] == "resnet50"]
    blocks = {row["block"]: bars(row) for row in of_one if re.match(r"stem$|l\d", row["block"])}
    networks = {row["network"]: bars(row) for row in rows if row["block"] == "stem and body"}
    title = f"Floors, predictions and, where there is one, a measurement. {rows[0]['chip']}, batch {rows[0]['batch']}"
    return {BLOCKS: blocks, NETWORKS: networks}, title


def gpu(rows: Sequence[Mapping[str, str]]) -> tuple[dict[str, Bars], str] | None:
    """ResNet-18 and 50 in fp16 as CUDA graphs, a panel a batch; the ways that the README's table tells of.

    What was measured in several groups is shown as in the main one.
    """
    shown = {f"{name}+graph" for name in PROVIDERS}
    timed = [row for row in rows if row.get("status") == "ok" and row["provider"] in shown and row["part"] == "whole"]
    timed = [row for row in timed if row["network"] in ("resnet18", "resnet50") and row["dtype"] == "fp16"]
    if not timed:
        return None
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in sorted(timed, key=lambda row: (int(row["batch"]), row.get("group", "main") != "main")):
        panel = panels.setdefault(f"batch {row['batch']}", {})
        name = row["provider"].removesuffix("+graph")
        panel.setdefault(row["network"], {}).setdefault(name, float(row["median_ms"]))
    commits = len({row.get("commit") for row in timed})
    several = f", of {commits} commits" if commits > 1 else ""
    return dict(panels), f"{timed[-1]['gpu']}, torch {timed[-1]['torch']}, Triton {timed[-1]['triton']}, fp16{several}"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what there are results for, and say which pictures were written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="FOLDER")
    args = parser.parse_args(argv)
    sources: Sources = load(args.results)
    pictures = {"cpu": (cpu(sources.rows), "ms (median)"), "gpu": (gpu(sources.gpu), "ms (median)")}
    pictures["roofline"] = roofline(sources.roofline), "us"
    for name, (found, unit) in pictures.items():
        if found is not None:
            panels, title = found
            draw(panels, unit, title, args.results / f"{name}.png")
            print(f"wrote {args.results / name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
