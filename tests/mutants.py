"""Deliberate faults, each of which the tests must notice: `make mutants`.

Every fault is a text replacement in a copy of the checkout; the tests named beside it must then fail, and pass in a
copy without it. A fault whose text no longer stands exactly once in its file is stale, which counts as survived.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutant import ROOT, Mutant
from mutants_table import MUTANTS

from fused_resblock.table import format_table

RESULTS = ROOT / "benchmarks" / "results" / "mutants.csv"
COPIED = ("fused_resblock", "kernels", "tests", "benchmarks", "pyproject.toml", "constraints.txt")
HEADERS = ("mutant", "file", "killed by", "seconds")
SURVIVED, STALE = "SURVIVED", "STALE"


def copy_checkout(folder: Path) -> None:
    """What the tests need of the checkout; the link `fused_resblock/kernels` stays a link, to the copy's kernels."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)
    link = folder / "fused_resblock" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels")


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run pytest in a copy; its exit status and output. PYTHONPATH puts the copy before an installed package."""
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)  # conftest sets it where there is no GPU
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    return result.returncode, result.stdout + result.stderr


def killer(output: str) -> str:
    """The first test that pytest reports as failed."""
    failed = [line.split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].split(" ", 1)[1].removeprefix("tests/") if failed else "?"


def hunt(mutant: Mutant | None, tests: Sequence[str]) -> tuple[str, float, str]:
    """Run tests in a copy with the fault, or without one; the test that failed or SURVIVED, seconds, output."""
    start = time.perf_counter()
    if mutant is not None and mutant.stale():
        return STALE, 0.0, f"the text does not stand exactly once in {mutant.file}"
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy_checkout(folder)
        if mutant is not None:
            mutant.apply(folder)
        code, output = run_tests(folder, tests)
    # 1: tests failed. Anything else (no such test, an import error) proves nothing about the fault.
    verdict = killer(output) if code == 1 else SURVIVED if code == 0 else f"{SURVIVED}: pytest exits with {code}"
    return verdict, time.perf_counter() - start, output


def survived(verdict: str) -> bool:
    """Whether a verdict is not the name of a test."""
    return verdict.startswith((SURVIVED, STALE))


def main(argv: Sequence[str] | None = None) -> int:
    """Hunt the mutants, two at a time; print and write the table. Returns 1 if one survives."""
    parser = argparse.ArgumentParser(prog="python tests/mutants.py", description=__doc__)
    parser.add_argument("only", nargs="*", metavar="NAME", help="mutants whose name holds this text; default: all")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help=f"default: {RESULTS.name} if all are run")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not args.only or any(text in m.name for text in args.only)]
    tests = sorted({test for mutant in chosen for test in mutant.killers})
    with ThreadPoolExecutor(2) as pool:
        clean = pool.submit(hunt, None, tests)
        hunts = [pool.submit(hunt, mutant, mutant.killers) for mutant in chosen]
        verdict, _, output = clean.result()
        if verdict != SURVIVED:
            print(f"{output}\nwithout any fault the tests fail already: {verdict}", file=sys.stderr)
            pool.shutdown(cancel_futures=True)
            return 1
        found = []
        for mutant, future in zip(chosen, hunts, strict=True):
            found.append(future.result())
            print(f"{mutant.file}: {mutant.name}: {found[-1][0]}", file=sys.stderr, flush=True)
    rows = [(m.name, m.file, verdict, f"{seconds:.0f}") for m, (verdict, seconds, _) in zip(chosen, found, strict=True)]
    print(format_table(HEADERS, rows))
    out = args.out or (None if args.only else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADERS, *rows])
    alive = [row for row in rows if survived(row[2])]
    print(f"{len(rows) - len(alive)} of {len(rows)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
