"""Small tables of results as CSV files: read as they are, written and printed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from fused_resblock.table import format_table


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, headers: Sequence[str], lines: Sequence[Sequence[object]], hidden: int = 0) -> None:
    """Write a CSV file, and print what is in it but for the first `hidden` columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([headers, *lines])
    print(format_table(headers[hidden:], [line[hidden:] for line in lines]))
