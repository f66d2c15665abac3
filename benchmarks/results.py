"""Results as CSV: one row a figure, each with the machine, the versions, the commit and the date it was taken with."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fused_resblock import machine

from .result_tables import read_table

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measurement; a field that was not measured is empty, in the file as here.

    `benchmark` is "latency" (one forward), "fuse" (`fuse(model)`), "packing" (what the first fused call takes longer
    than the next one) or "memory" (a process of its own). Times are in milliseconds, memory in MiB. `part` is "whole"
    or "layer1-4", `size` the height and width of the image, `status` "ok" or "failed"; `note` says why it failed.
    `speedup_vs_eager` and `ratio_to_compile` are quotients of medians: eager / this, and this / compile.
    `other_cores` is how many of the machine's `cores` other programs kept busy while times were taken. `imports_mib` is
    the resident memory before the network was built, `peak_rss_mib` the process's peak.
    """

    benchmark: str
    network: str
    part: str
    provider: str
    dtype: str
    batch: int
    size: int
    status: str = "ok"
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    speedup_vs_eager: float | None = None
    ratio_to_compile: float | None = None
    max_error: float | None = None
    error_bound: float | None = None
    other_cores: float | None = None
    state_mib: float | None = None
    packed_mib: float | None = None
    imports_mib: float | None = None
    peak_rss_mib: float | None = None
    note: str = ""
    cpu: str = ""
    cpu_features: str = ""
    amx: str = ""
    cores: int | None = None
    threads: int | None = None
    system: str = ""
    malloc: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    fused_resblock: str = ""
    commit: str = ""
    date: str = ""

    def disturbed(self) -> bool:
        """Whether other programs held cores that the threads needed (a quarter of one is the system's own)."""
        return None not in (self.other_cores, self.threads, self.cores) and (
            self.other_cores + self.threads > self.cores + 0.25  # type: ignore[operator]
        )


COLUMNS = tuple(field.name for field in fields(Row))
_INTS = {field.name for field in fields(Row) if field.type in ("int", "int | None")}
_FLOATS = {field.name for field in fields(Row) if field.type == "float | None"}


def stamp() -> dict[str, object]:
    """The columns that say what a row was measured with; take it once, before the first result is written."""
    told: dict[str, Any] = machine.stamp()
    features = told["cpu_features"]
    return {
        "cpu": told["cpu"],
        "cpu_features": " ".join(features),
        "amx": "yes" if "AMX-BF16" in features else "no",
        "cores": os.cpu_count(),
        "threads": told["threads"],
        "system": told["system"],
        "malloc": " ".join(f"{name}={value}" for name, value in told["malloc"].items()),
        **{name: told[name] or "" for name in ("python", "torch", "triton", "fused_resblock", "commit")},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def stamped(rows: Iterable[Row], marks: dict[str, object]) -> list[Row]:
    """The rows with the columns of `stamp`."""
    return [replace(row, **marks) for row in rows]  # type: ignore[arg-type]


class Writer:
    """Writes rows to a new CSV file as they come, so that a run that is cut short leaves what it had."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)

    def write(self, rows: Iterable[Row]) -> None:
        """Append rows; a float keeps six significant digits."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            for row in rows:
                writer.writerow(_cell(value) for value in asdict(row).values())


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """Read a file of `Writer`.

    Raises:
        ValueError: if its columns are not those of `Row`.
    """
    lines = read_table(path, COLUMNS)
    return [Row(**{name: _value(name, cell) for name, cell in line.items()}) for line in lines]  # type: ignore[arg-type]


def _value(name: str, cell: str) -> str | int | float | None:
    if name in _INTS | _FLOATS:
        return None if cell == "" else (int(cell) if name in _INTS else float(cell))
    return cell
