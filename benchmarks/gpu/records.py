"""Results on disk: rows appended as they are measured, so that a run that is killed loses at most one row."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

#: what a row must share with this run to count as measured already
MARKS = ("gpu", "torch", "triton", "commit")
#: a case that ended so is tried again by the next run
UNFINISHED = ("error", "timeout")

Row = dict[str, str]


def cell(value: object) -> str:
    """A value as it stands in a file: a float with six significant digits, None as nothing."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())[:300]


def mend(path: Path) -> None:
    """Cut off what follows the last newline: the row that a killed run was writing."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))


def _fields(line: str) -> list[str]:
    """The cells of a row, none of which holds the end of a line; none where a quote went astray."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _finite(text: str) -> bool:
    try:
        return math.isfinite(float(text or 0))
    except ValueError:
        return False


class Records:
    """One CSV file: the rows of this GPU, these versions and this commit, by key; others are kept and not read.

    A case that was `running` when its process was ended, by a signal or because it took too long, is a "crash".

    Args:
        path: is made on the first row. A half-written last row is dropped; a file with other columns is renamed to
            `<name>.old`, or `.old2` and so on.
        key: columns that name a case.
        columns: the others; MARKS are added.
        marks: the values of MARKS.
    """

    def __init__(self, path: Path, key: Sequence[str], columns: Sequence[str], marks: Mapping[str, object]) -> None:
        self.path, self.key = path, tuple(key)
        self.columns = (*key, *columns, *MARKS)
        self.marks = {name: cell(marks.get(name)) for name in MARKS}
        self._rows: dict[tuple[str, ...], Row] = {}
        if path.is_file():
            self._load()
        self._running = path.with_name(f"{path.name}.running")
        self._settle()

    def _load(self) -> None:
        mend(self.path)
        text = self.path.read_text(encoding="utf-8", errors="replace")
        header, *lines = text.split("\n")
        if tuple(_fields(header)) != self.columns:
            if text.strip():
                names = (f"{self.path.name}.old{number if number > 1 else ''}" for number in count(1))
                free = (self.path.with_name(name) for name in names)
                self.path.replace(next(path for path in free if not path.exists()))
            else:
                self.path.unlink()
            return
        times = [name for name in self.columns if name.endswith(("_us", "_ms"))]
        for fields in map(_fields, lines):
            row = dict(zip(self.columns, fields, strict=False))
            if len(fields) != len(self.columns) or not all(_finite(row[name]) for name in times):
                continue
            if all(row[name] == value for name, value in self.marks.items()):
                self._rows[tuple(row[name] for name in self.key)] = row

    def _settle(self) -> None:
        """Put what was running when its process was ended on record, so that nobody runs it again."""
        known = read_json(self._running)
        self._running.unlink(missing_ok=True)
        names = known.get("key")
        if known.get("marks") == self.marks and isinstance(names, list) and len(names) == len(self.key):
            self.add(**dict(zip(self.key, names, strict=True)), status="crash", note="its process was ended")

    @contextmanager
    def running(self, **key: object) -> Iterator[None]:
        """Leave a note of the case for as long as it runs."""
        write_json(self._running, {"marks": self.marks, "key": [cell(key[name]) for name in self.key]})
        try:
            yield
        finally:
            self._running.unlink(missing_ok=True)

    def done(self, *key: object) -> bool:
        """Whether the case has been finished."""
        row = self._rows.get(tuple(map(cell, key)))
        return row is not None and row.get("status") not in UNFINISHED

    def add(self, **values: object) -> None:
        """Append one row and see it to the disk."""
        unknown = set(values) - set(self.columns)
        assert not unknown, f"no columns {unknown} in {self.path.name}"
        row = {name: cell(values.get(name)) for name in self.columns} | self.marks
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.is_file()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self._rows[tuple(row[name] for name in self.key)] = row

    def rows(self, **wanted: object) -> list[Row]:
        """The rows of this GPU, these versions and this commit, the last of each key, that have these values."""
        want = {name: cell(value) for name, value in wanted.items()}
        return [row for row in self._rows.values() if all(row[name] == value for name, value in want.items())]

    def count(self, column: str, rows: Iterable[Row] | None = None) -> dict[str, int]:
        """How often each value of a column occurs."""
        counts: dict[str, int] = {}
        for row in self._rows.values() if rows is None else rows:
            counts[row[column]] = counts.get(row[column], 0) + 1
        return counts


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step: a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
