"""The time of a way to compute something, as rows of a table hold it: in microseconds, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..harness import Spread
from .context import Context
from .device import Broken, error_line, is_broken, is_out_of_memory
from .records import Records

ROUNDS = 30


def micros(spread: Spread) -> dict[str, float]:
    """Median, percentiles and rounds."""
    times = {f"{name}_us": 1e3 * getattr(spread, f"{name}_ms") for name in ("median", "p20", "p80")}
    return {**times, "rounds": spread.rounds}


def timed_row(
    context: Context,
    table: Records,
    key: Mapping[str, object],
    bind: Callable[[], Callable[..., Any] | None],
    *activations: Tensor | None,
) -> dict[str, Any]:
    """Status and times of what `bind` gives, called with the activations, which go on record by this key.

    Raises:
        Broken: after a crash, so that the next process does not meet it again.
        RuntimeError: if memory ran out: that says nothing about the way, and is not put on record.
    """
    row: dict[str, Any] = {"status": "failed", "note": "not bound"}
    try:
        with table.running(**key):
            run = bind()
            if run is not None:
                run(*activations)
                spread = Spread.of(context.device.times([lambda: run(*activations)], context.rounds(ROUNDS)))
                row = {"status": "ok", **micros(spread)}
    except Exception as error:  # a kernel may fail to compile, to load and to run
        if is_out_of_memory(error):
            raise
        row = {"status": "crash" if is_broken(error) else "failed", "note": error_line(error)}
    table.add(**key, **row)
    if row["status"] == "crash":
        raise Broken(f"{' '.join(str(value) for value in key.values())}: {row['note']}")
    return row
