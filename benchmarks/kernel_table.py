"""Tables with a row a compiled kernel, kept in `benchmarks/results`, one for each release of Triton.

Beside a table a `.inputs.json` may hold what each kernel was made from (`benchmarks.unchanged`): in a file of its own,
so that a diff of the table shows what a change did to the machine code and nothing else.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .results import FOLDER

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"

#: what a row is found by
KEY = ("capability", "dtype", "kernel", "case", "tile")
Key = tuple[str, ...]
Row = dict[str, Any]
#: what each kernel was made from, and its row
Kept = Mapping[Key, tuple[str, Row]]


def key_of(job: Any) -> Key:
    """The key of a job's row."""
    return tuple(str(getattr(job, field)) for field in KEY)


def key_of_row(row: Mapping[str, Any]) -> Key:
    """What a row is found by."""
    return tuple(str(row[field]) for field in KEY)


def table_of(stem: str, version: str) -> Path:
    """The kept table of a release of Triton: the pinned one's has no version in its name."""
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text(encoding="utf-8").split() if "==" in line)
    return FOLDER / (f"{stem}.csv" if version == pins.get("triton") else f"{stem}-triton-{version}.csv")


def read(table: Path) -> dict[Key, dict[str, str]]:
    """The rows of a table, as they are written, by their key; empty where there is none."""
    if not table.is_file():
        return {}
    with table.open(newline="", encoding="utf-8") as file:
        return {key_of_row(row): row for row in csv.DictReader(file)}


def _inputs(table: Path) -> Path:
    return table.with_suffix(".inputs.json")


def _value(text: str) -> bool | int | str:
    return text == "True" if text in ("True", "False") else int(text) if text.isdecimal() else text


def read_kept(table: Path) -> Kept:
    """The rows, with their values, of those kernels of which it is known what they were made from."""
    file = _inputs(table)
    inputs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {
        key: (inputs[" ".join(key)], {field: _value(text) for field, text in row.items()})
        for key, row in read(table).items()
        if " ".join(key) in inputs
    }


def write(table: Path, rows: Sequence[Row], inputs: Sequence[str] = ()) -> None:
    """Write a table and, where it is given, what each row's kernel was made from."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if inputs:
        keys = [" ".join(key_of_row(row)) for row in rows]
        text = json.dumps(dict(zip(keys, inputs, strict=True)), indent=0)
        _inputs(table).write_text(text + "\n", encoding="utf-8")
