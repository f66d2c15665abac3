"""Write the measured tables into README.md and RESULTS.md: `python -m benchmarks.readme_tables [--check]`.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`, where NAME is one of `TABLES`. The figures come
from files in `benchmarks/results/`: `cpu.csv`, and `cpu_*.csv` for other CPUs and settings (`python -m
benchmarks.bench_cpu`), `demo.json` (`python -m fused_resblock demo --json FILE`), `roofline.csv`, `basic_block.csv`,
`predictions.csv`, `l2_rates.csv`, `activations.csv`, `codegen.csv` and `emulate*.csv` (`python -m benchmarks.roofline`
and so on), and `*/bench.csv`, `check.csv`, `profile.csv`, `tune.csv` and `ceilings.json` (`make gpu`). What none of
them holds reads "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from . import gpu_tables, network_tables, results, tables
from .gpu.records import MARKS, read_json
from .result_tables import read_table
from .results import Row

FILES = (Path(__file__).parent.parent / "README.md", Path(__file__).parent / "RESULTS.md")


class Sources(NamedTuple):
    """What a folder of results holds; empty where there is nothing."""

    rows: list[Row]  # of the CPU that is shown first
    others: list[Row]  # of other CPUs, and of other settings
    demo: dict[str, Any]
    roofline: list[dict[str, str]]
    basic_block: list[dict[str, str]]
    predictions: list[dict[str, str]]
    l2_rates: list[dict[str, str]]
    activations: list[dict[str, str]]
    codegen: list[dict[str, str]]
    emulate: list[dict[str, str]]
    gpu: list[dict[str, str]]
    checks: list[dict[str, str]]
    profile: list[dict[str, str]]
    tune: list[dict[str, str]]
    ceilings: dict[str, dict[str, Any]]  # by GPU


TABLES: dict[str, Callable[[Sources], str]] = {
    "cpu": lambda s: tables.latency(s.rows),
    "cpu-others": lambda s: tables.latency(s.others),
    "goals": lambda s: tables.judged(s.rows + s.others),
    "fuse": lambda s: tables.fusing(s.rows + s.others),
    "memory": lambda s: tables.memory(s.rows + s.others),
    "demo": lambda s: tables.demo(s.demo),
    "digits": lambda s: tables.digits(s.demo),
    "roofline": lambda s: gpu_tables.roofline(s.roofline),
    "stages": lambda s: gpu_tables.stages(s.roofline),
    "basic-block": lambda s: gpu_tables.basic_block(s.basic_block),
    "predictions": lambda s: gpu_tables.predictions(s.predictions),
    "l2-rates": lambda s: gpu_tables.l2_rates(s.l2_rates),
    "activations": lambda s: gpu_tables.activations(s.activations),
    "codegen": lambda s: gpu_tables.codegen(s.codegen),
    "emulate": lambda s: gpu_tables.emulated(s.emulate),
    "gpu": lambda s: network_tables.networks(s.gpu),
    "gpu-launched": lambda s: network_tables.launched(s.gpu),
    "gpu-l2": lambda s: network_tables.by_l2(s.gpu),
    "gpu-goals": lambda s: gpu_tables.judged(s.gpu, s.profile, s.tune, s.ceilings),
    "gpu-checks": lambda s: gpu_tables.checked(s.checks),
    "gpu-bytes": lambda s: gpu_tables.moved(s.profile),
}
#: of a folder of `make gpu`, in the order of `Sources`
GPU_FILES = ("bench", "check", "profile", "tune")
_OPEN = re.compile(r"^<!-- table:(?P<name>.*?) -->$")
_CLOSE = "<!-- /table -->"


def load(folder: Path) -> Sources:
    """Read every result in a folder.

    Raises:
        ValueError: if a CSV file has other columns, or the JSON is none.
    """
    demo = folder / "demo.json"
    shown = json.loads(demo.read_text(encoding="utf-8")) if demo.is_file() else {}
    if not isinstance(shown, dict):
        raise ValueError(f"{demo} must hold an object, got {type(shown).__name__}")
    rates = [read_json(file) for file in sorted(folder.glob("*/ceilings.json"))]
    return Sources(
        _cpu(folder, "cpu.csv"),
        _cpu(folder, "cpu_*.csv"),
        shown,
        read_table(folder / "roofline.csv"),
        read_table(folder / "basic_block.csv"),
        read_table(folder / "predictions.csv"),
        read_table(folder / "l2_rates.csv"),
        read_table(folder / "activations.csv"),
        read_table(folder / "codegen.csv"),
        _all(folder, "emulate*.csv"),
        *(_latest([_dated(row) for row in _all(folder, f"*/{name}.csv")]) for name in GPU_FILES),
        {chip["gpu"]: chip for chip in rates if "gpu" in chip},
    )


def _cpu(folder: Path, files: str) -> list[Row]:
    return [row for file in sorted(folder.glob(files)) for row in results.read(file)]


def _all(folder: Path, pattern: str) -> list[dict[str, str]]:
    return [row for file in sorted(folder.glob(pattern)) for row in read_table(file)]


def _dated(row: dict[str, str]) -> dict[str, str]:
    """A row of a GPU's table; those of networks had no dtype once, and were of fp16."""
    return {"dtype": "fp16", **row}


def _latest(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The last row of each case: what names it stands in front of its status, and with what it was measured behind."""
    found = {}
    for row in rows:
        named = takewhile(lambda name: name != "status", row)
        found[tuple(row[name] for name in (*named, *(mark for mark in MARKS if mark in row)))] = row
    return list(found.values())


def fill(text: str, sources: Sources) -> str:
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
            lines += [line, "", TABLES[opened](sources), ""]
        elif line == _CLOSE:
            opened = ""
        if not opened:
            lines.append(line)
    if opened:
        raise ValueError(f"markers must come in pairs, got no {_CLOSE} after table:{opened}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Update the README and `RESULTS.md`, or with --check only say whether they need that.

    Returns:
        0; 1 if --check finds a table out of date; 2 if a file cannot be read or the markers do not fit.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is out of date")
    parser.add_argument("--readme", type=Path, nargs="+", default=FILES, metavar="FILE")
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="FOLDER")
    args = parser.parse_args(argv)
    outdated = 0
    try:
        sources = load(args.results)
        texts = {file: file.read_text(encoding="utf-8") for file in args.readme}
        filled = {file: fill(text, sources) for file, text in texts.items()}
    except (OSError, ValueError) as error:
        print(f"readme_tables: error: {error}", file=sys.stderr)
        return 2
    for file, new in filled.items():
        if texts[file] == new:
            print(f"{file} is up to date")
        elif args.check:
            print(f"{file} is out of date: run python -m benchmarks.readme_tables", file=sys.stderr)
            outdated = 1
        else:
            file.write_text(new, encoding="utf-8")
            print(f"updated {file}")
    return outdated


if __name__ == "__main__":
    raise SystemExit(main())
