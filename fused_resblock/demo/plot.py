"""The demo's picture: horizontal bars of each block's latency, eager and fused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".svg", ".pdf")
_EAGER, _FUSED = "#9aa5b1", "#1b6ca8"


def plot_blocks(results: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Draw one panel a network, the first block on top, and write the picture.

    Args:
        results: what `photos.measure` returned, each with its network's name under `model`.
        title: names the machine, the dtype and the batch.
        file: ends in one of `SUFFIXES`.
    """
    from matplotlib.figure import Figure

    rows = max(len(result["blocks"]) for result in results)
    width = 6.5 * len(results)
    figure = Figure(figsize=(width, 1.6 + 0.36 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        blocks = result["blocks"]
        places = range(len(blocks))
        axes.barh([p - 0.2 for p in places], [b["eager_ms"] for b in blocks], 0.4, color=_EAGER, label="eager")
        fused = axes.barh([p + 0.2 for p in places], [b["fused_ms"] for b in blocks], 0.4, color=_FUSED, label="fused")
        axes.bar_label(fused, [f"{b['speedup']:.2f}x" for b in blocks], padding=3, fontsize=8)
        axes.set_yticks(list(places), [b["name"] for b in blocks], fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.02)
        axes.set_xlabel("latency of the block, ms (median)")
        axes.set_title(
            f"{result['model']}: {result['eager_ms']:.1f} ms eager, {result['fused_ms']:.1f} ms fused "
            f"({result['speedup']:.2f}x)",
            fontsize=10,
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, dpi=150)
