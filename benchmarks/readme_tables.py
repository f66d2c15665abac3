"""Write the measured tables into the README: `python -m benchmarks.readme_tables [--check]`.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`, where NAME is one of `TABLES`. The figures come
from `cpu*.csv` (`python -m benchmarks.bench_cpu`) and `demo.json` (`python -m fused_resblock demo --json FILE`) in
`benchmarks/results/`; what neither of them holds reads "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import results, tables
from .results import Row

README = Path(__file__).parent.parent / "README.md"
TABLES: dict[str, Callable[[list[Row], dict[str, Any]], str]] = {
    "cpu": lambda rows, demo: tables.latency(rows),
    "goals": lambda rows, demo: tables.judged(rows),
    "fuse": lambda rows, demo: tables.fusing(rows),
    "memory": lambda rows, demo: tables.memory(rows),
    "demo": lambda rows, demo: tables.demo(demo),
    "digits": lambda rows, demo: tables.digits(demo),
}
_OPEN = re.compile(r"^<!-- table:(?P<name>.*?) -->$")
_CLOSE = "<!-- /table -->"


def load(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Read every result in a folder: the rows of its `cpu*.csv` by name, and `demo.json`; empty where there is none.

    Raises:
        ValueError: if a CSV file has other columns, or the JSON is none.
    """
    rows = [row for file in sorted(folder.glob("cpu*.csv")) for row in results.read(file)]
    demo = folder / "demo.json"
    return rows, json.loads(demo.read_text(encoding="utf-8")) if demo.is_file() else {}


def fill(text: str, rows: list[Row], demo: dict[str, Any]) -> str:
    """Put the tables between their markers; everything else stays as it is.

    Raises:
        ValueError: if a table's name is unknown, or a marker lacks its counterpart.
    """
    lines: list[str] = []
    opened = ""
    for number, line in enumerate(text.split("\n"), 1):
        marker = _OPEN.match(line)
        if (marker and opened) or (line == _CLOSE and not opened):
            raise ValueError(f"markers must come in pairs, got {line} in line {number}")
        if marker:
            opened = marker["name"]
            if opened not in TABLES:
                raise ValueError(f"table must be one of {', '.join(TABLES)}, got {opened!r} in line {number}")
            lines += [line, "", TABLES[opened](rows, demo), ""]
        elif line == _CLOSE:
            opened = ""
        if not opened:
            lines.append(line)
    if opened:
        raise ValueError(f"markers must come in pairs, got no {_CLOSE} after table:{opened}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Update the README, or with --check only say whether it needs that.

    Returns:
        0; 1 if --check finds a table out of date; 2 if a file cannot be read or the markers do not fit.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README is out of date")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE")
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="FOLDER")
    args = parser.parse_args(argv)
    try:
        old = args.readme.read_text(encoding="utf-8")
        new = fill(old, *load(args.results))
    except (OSError, ValueError) as error:
        print(f"readme_tables: error: {error}", file=sys.stderr)
        return 2
    if old == new:
        print(f"{args.readme} is up to date")
        return 0
    if args.check:
        print(f"{args.readme} is out of date: run python -m benchmarks.readme_tables", file=sys.stderr)
        return 1
    args.readme.write_text(new, encoding="utf-8")
    print(f"updated {args.readme}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
