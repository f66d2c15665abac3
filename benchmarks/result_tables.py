"""Small tables of results as CSV files: read as they are, written and printed."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from fused_resblock.table import format_table


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file but for those that were cut short; none where there is no file.

    Raises:
        ValueError: if it is no CSV file, or has other columns.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} must be a CSV file, got {error}") from None
    if columns is not None and tuple(reader.fieldnames or ()) != tuple(columns):
        raise ValueError(f"{path} must have the columns {', '.join(columns)}, got {reader.fieldnames}")
    return [row for row in rows if None not in row and None not in row.values()]


def write_table(path: Path, headers: Sequence[str], lines: Sequence[Sequence[object]], hidden: int = 0) -> None:
    """Write a CSV file, and print what is in it but for the first `hidden` columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([headers, *lines])
    print(format_table(headers[hidden:], [line[hidden:] for line in lines]))
