"""What the demo prints, made from the results that it also writes as JSON."""

from __future__ import annotations

from typing import Any

from ..table import format_table


def machine_line(stamp: dict[str, Any], device: str) -> str:
    """One line on what the figures were measured with."""
    hardware = stamp["gpu"] if device == "cuda" else f"{stamp['cpu']} ({stamp['threads']} threads)"
    return f"fused_resblock {stamp['fused_resblock']}, torch {stamp['torch']}, {hardware}"


def digits(result: dict[str, Any]) -> str:
    """The paragraph on the handwritten digits."""
    count = result["count"]
    rows = [
        [way, f"{result[f'{way}_accuracy']:.2%}", f"{round(result[f'{way}_accuracy'] * count)} of {count}"]
        for way in ("eager", "fused")
    ]
    blocks = ", ".join(f"{b['name']} ({b['class']}): {b['backend'] or 'kept'}" for b in result["blocks"])
    return "\n".join(
        [
            f"\nHandwritten digits: a small trained network on {count} scanned digits that it was not trained on",
            format_table(["network", "accuracy", "right"], rows),
            f"differing predictions: {result['differing']}; largest difference of a logit: "
            f"{result['max_abs_error']:.1e}",
            f"blocks: {blocks}",
        ]
    )


def photos(result: dict[str, Any]) -> str:
    """The paragraph on one network: its outputs, its latency and its blocks."""
    images = ", ".join(result["images"])
    if result["weights"] == "random":
        weights = "weights are random: this shows speed and agreement, not classification"
    else:
        weights = f"weights from {result['weights']}; classes of the images: {result['top1']}"
    rows = [
        [b["name"], b["class"], f"{b['eager_ms']:.2f}", f"{b['fused_ms']:.2f}", f"{b['speedup']:.2f}x", _way(b)]
        for b in result["blocks"]
    ]
    whole = [f"{result['eager_ms']:.2f}", f"{result['fused_ms']:.2f}", f"{result['speedup']:.2f}x", None]
    rows.append(["whole network", None, *whole])
    return "\n".join(
        [
            f"\nPhotographs ({images}) at 224x224: {result['model']}, batch {result['batch']}",
            weights,
            format_table(["block", "class", "eager ms", "fused ms", "speed-up", "backend"], rows),
            f"fused against eager: max|difference| {result['max_abs_error']:.1e}, relative to the largest output "
            f"{result['max_rel_error']:.1e}; same top class for {result['same_top1']} of {result['batch']}",
            f"max|error| against float64: eager {result['eager_error']:.1e}, fused {result['fused_error']:.1e}",
            *_disturbance(result),
        ]
    )


def _disturbance(result: dict[str, Any]) -> list[str]:
    """A warning if other programs held cores that the measurement needed."""
    if not result["disturbed"]:
        return []
    cores = f"{result['other_cores']:.1f}"
    return [f"NOTE: other programs kept {cores} cores busy meanwhile: the times and speed-ups are not to be trusted"]


def _way(block: dict[str, Any]) -> str:
    """The backend of a fused block, or why it was left alone."""
    return block["backend"] if block["fused"] else f"kept: {block['reason']}"
