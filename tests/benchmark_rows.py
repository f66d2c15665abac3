"""Made-up results of benchmarks, for the tests of what reads and writes them."""

from __future__ import annotations

from typing import Any

from benchmarks import bench_cpu, harness, results
from benchmarks.cases import Case
from benchmarks.results import Row

MARKS = {
    "cpu": "Test CPU",
    "cpu_features": "AVX2 AMX AMX-BF16",
    "amx": "yes",
    "cores": 2,
    "threads": 2,
    "system": "Linux x86_64",
}
MARKS |= {"torch": "2.13.0", "triton": "3.7.1", "fused_resblock": "0.1.0", "commit": "abc", "date": "2026-01-02"}


def latency(
    network: str, part: str, dtype: str, batch: int, medians: dict[str, float | None], **marks: Any
) -> list[Row]:
    """Rows of one case from provider -> median in milliseconds, None for a failed one; `marks` replace `MARKS`."""
    outcomes = [
        harness.Outcome(name, None, "wrong") if ms is None else harness.Outcome(name, harness.Spread(ms, ms, ms, 5))
        for name, ms in medians.items()
    ]
    return results.stamped(bench_cpu.latency_rows(Case(network, part, dtype, batch), outcomes), MARKS | marks)
