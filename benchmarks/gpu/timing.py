"""The time of a way to compute something, as rows of a table hold it: in microseconds, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..harness import Spread
from .context import Context
from .device import error_line, is_broken, is_out_of_memory

ROUNDS = 30


def micros(spread: Spread) -> dict[str, float]:
    """Median, percentiles and rounds."""
    times = {f"{name}_us": 1e3 * getattr(spread, f"{name}_ms") for name in ("median", "p20", "p80")}
    return {**times, "rounds": spread.rounds}


def timed_row(
    context: Context, bind: Callable[[], Callable[..., Any] | None], *activations: Tensor | None
) -> dict[str, Any]:
    """Status and times of what `bind` gives, called with the activations.

    Raises:
        RuntimeError: if memory ran out: that says nothing about the way.
    """
    try:
        run = bind()
        if run is None:
            return {"status": "failed", "note": "not bound"}
        run(*activations)
        spread = Spread.of(context.device.times([lambda: run(*activations)], context.rounds(ROUNDS)))
    except Exception as error:  # a kernel may fail to compile, to load and to run
        if is_out_of_memory(error):
            raise
        return {"status": "crash" if is_broken(error) else "failed", "note": error_line(error)}
    return {"status": "ok", **micros(spread)}
