"""Plain text: aligned tables, and what an error says in one line, for commands and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence


def _is_number(cell: object) -> bool:
    """Whether a cell reads as a number: an int, a float, or text such as `1.23`, `1.23x`, `45 %`, `1e-06`."""
    if isinstance(cell, (int, float)):
        return True
    text = str(cell).strip().removesuffix("x").removesuffix("%").replace(",", "")
    try:
        float(text)
    except ValueError:
        return text in ("", "-")
    return True


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


def error_line(error: BaseException) -> str:
    """An error in one line: its type, and what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay `rows` out under `headers` in columns two spaces apart, with a rule under the headers.

    A column whose cells all read as numbers (or are empty, or "-") is right-aligned, any other is left-aligned.
    Cells are shown by `str`; None is shown as "-". There is no trailing white space.

    Args:
        headers: one title a column.
        rows: cells, as many in each row as there are headers; may be empty.

    Returns:
        The lines, joined by newlines, without a newline at the end.

    Raises:
        ValueError: if a row is not as long as `headers`.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"rows must hold {len(headers)} cells each, got {len(row)} in {list(row)}")
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    right = [bool(rows) and all(_is_number(row[column]) for row in cells) for column in range(len(headers))]
    widths = [max([len(header), *(len(row[i]) for row in cells)]) for i, header in enumerate(headers)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(list(headers)), line(["-" * width for width in widths]), *map(line, cells)])
