"""Profiler counters of the main kernels, from Nsight Compute."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Sequence

from .context import Context
from .records import Records
from .verify import command_output

KEY = ("launch", "kernel")
#: column -> ncu's name
METRICS = {
    "duration_ns": "gpu__time_duration.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "registers": "launch__registers_per_thread",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "tensor_percent": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
}
_STALLS = ("barrier", "gmma", "long_scoreboard", "short_scoreboard", "mio_throttle", "membar", "wait")
#: what a kernel waits for, of which each profiler knows its own: shared memory's banks, and cycles a warp was stalled
REASONS = {
    "clock_hz": "sm__cycles_elapsed.avg.per_second",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "shared_read_percent": "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",
    "shared_write_percent": "l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed",
    **{f"stall_{why}": f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio" for why in _STALLS},
}
COLUMNS = ("status", *METRICS, *REASONS, "note")
KERNELS = "regex:^_(conv|expand_shift|bottleneck|pack|stem|bn_act).*_kernel$"


def records(context: Context) -> Records:
    """The counters."""
    return context.records("profile.csv", KEY, COLUMNS)


def known(listing: str) -> list[str]:
    """Of METRICS and REASONS what to ask for: all of the former, and those that `ncu --query-metrics` lists.

    One name that it does not know, and it measures nothing.
    """
    listed = {line.split()[0] for line in listing.splitlines() if line.strip()}
    return [*METRICS.values(), *(name for name in REASONS.values() if name.split(".")[0] in listed)]


def command(tool: str, metrics: Sequence[str]) -> list[str]:
    """How ncu is called: own clocks, base units, our kernels alone."""
    profiler = [tool, "--csv", "--clock-control", "none", "--print-units", "base", "--kernel-name", KERNELS]
    return [*profiler, "--metrics", ",".join(metrics), sys.executable, "-m", "benchmarks.gpu.launch_each"]


def parse(text: str) -> list[dict[str, str]]:
    """The launches in ncu's CSV, in order: kernel and metrics by our names; values that are no numbers are left out."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        return []
    found: dict[int, dict[str, str]] = {}
    ours = {name: column for column, name in (METRICS | REASONS).items()}
    for row in csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"')))):
        launch = found.setdefault(int(row["ID"]), {"kernel": row["Kernel Name"]})
        column, value = ours.get(row["Metric Name"]), row["Metric Value"].replace(",", "")
        try:
            float(value)
        except ValueError:
            continue
        if column is not None:
            launch[column] = value
    return [found[number] for number in sorted(found)]


def launched(text: str) -> list[str]:
    """The launches that `launch_each` named, in order."""
    return [line.split()[1] for line in text.splitlines() if line.startswith("launch: ")]


def record(names: list[str], launches: list[dict[str, str]], table: Records) -> None:
    """Add the counters under the launches' names."""
    for name, launch in zip(names, launches, strict=False):
        table.add(launch=name, status="ok", **launch)


def run(context: Context) -> int:
    """Profile unless it has been done; says so where ncu is missing or may not read counters."""
    table = records(context)
    if table.done("all", ""):
        context.log("profile: already measured")
        return 0
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if tool is None:
        context.log("profile: ncu is not installed; no counters are read")
        return 0
    _, listing = command_output([tool, "--query-metrics"], context.deadline.left())
    status, said = command_output(command(tool, known(listing)), context.deadline.left())
    names, launches = launched(said), parse(said)
    record(names, launches, table)
    errors = [line for line in said.splitlines() if line.startswith("==ERROR==")]
    if status or not launches or len(launches) != len(names):
        context.keep(f"--- ncu\n{said[-20000:]}")
        why = errors[0] if errors else "it ran out of time" if status is None else f"exit status {status}"
        context.log(f"profile: {len(launches)} of {len(names)} launches, {why}")
        return 0 if any("ERR_NVGPUCTRPERM" in line for line in errors) else 1
    table.add(launch="all", kernel="", status="measured")
    context.log(f"profile: {len(launches)} launches")
    return 0
