"""The compiled code of every shipped tile, without a GPU: no spill, matrix instructions, 128-bit loads, NaN kept.

The interpreter and the compiler cannot both be on in one process, so the table is made by a process of its own.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from compiling import run

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


def test_gates_hold_and_nothing_is_worse_than_the_kept_table():
    """For one chip in fp16; `make codegen ARGS=--check` does all, as .ci/run calls it."""
    code = "import sys; from benchmarks.codegen import main; sys.exit(main(sys.argv[1:]))"
    result = run(code, "--check", "--capability", "90", "--dtype", "fp16")
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "every limit holds" in result.stdout


GATES = """
import sys
from benchmarks.codegen import broken_limits, jobs, worse
job = next(j for j in jobs((80,), ("fp16",)) if j.pipelined and j.rectifies)
boxes = next(j for j in jobs((90,), ("fp16",)) if j.tma)
good = dict(stack=0, local=0, shared=1000, matrix=8, async_loads=4, async_128=4, tma_loads=2, max_nan=True, resident=2,
            serialized=False)
assert broken_limits(good, job) == []
for field, value, word in (("stack", 8, "spills"), ("local", 1, "spills"), ("shared", 1 << 20, "shared memory"),
                           ("matrix", 0, "HMMA"), ("async_128", 3, "128-bit"), ("async_loads", 0, "asynchronous"),
                           ("max_nan", False, "NaN")):
    faults = broken_limits({**good, field: value}, job)
    assert any(word in fault for fault in faults), (field, faults)
assert broken_limits(good, boxes) == []
assert broken_limits({**good, "tma_loads": 0}, boxes) == ["no TMA loads"]
kept = {key: str(value) for key, value in good.items()}
assert worse(good, kept) == []
assert worse({**good, "resident": 1}, kept) == ["resident 1, was 2"]
assert worse({**good, "serialized": True}, kept) == ["matrix instructions one by one"]
"""


SASS = """
from benchmarks.offline import one_by_one
arrive, wait = "WARPGROUP.ARRIVE ;", "WARPGROUP.DEPBAR.LE gsb0, 0x{} ;"
product, last = "HGMMA.64x32x16.F32 R24, R52, gdesc[UR8], R24 ;", "HGMMA.64x32x16.F32 R24, R52, gdesc[UR8], R24, gsb0 ;"
def sass(*lines): return chr(10).join(lines)
assert one_by_one(sass(arrive, last, wait.format(0), arrive, last, wait.format(0)))
assert not one_by_one(sass(arrive, product, product, last, wait.format(0)))
assert not one_by_one(sass(arrive, last, wait.format(1), arrive, last, wait.format(1), wait.format(0)))
assert not one_by_one("HMMA.16816.F32 R4, R4, R8, R4 ;")
"""


def test_matrix_instructions_that_wait_for_each_other_are_seen():
    result = run(SASS)
    assert result.returncode == 0, result.stderr


def test_each_gate_can_fail():
    result = run(GATES)
    assert result.returncode == 0, result.stderr


SPILL = """
from benchmarks.codegen import broken_limits, compile_job, jobs
from benchmarks.gpu.operations import build
from benchmarks.shapes import ConvShape
from dataclasses import replace
from fused_resblock.kernels.tiles import Tile
import torch
job = next(j for j in jobs((80,), ("fp16",)) if j.pipelined and j.rectifies)
shape = ConvShape("wide", 256, 256, 14, 3)
operation = build(shape, 128, torch.float16, "meta")
bad = replace(job, launch=lambda: operation.with_tile(Tile(128, 256, 64, 4, 3)))
faults = broken_limits(compile_job(bad)[1], bad)
assert any("spills" in fault for fault in faults), faults
"""


def test_a_tile_that_is_too_large_is_caught():
    result = run(SPILL)
    assert result.returncode == 0, result.stderr


UNCHANGED = """
from dataclasses import replace
from benchmarks.codegen import compile_job, jobs
from benchmarks.kernel_table import key_of
from fused_resblock.kernels.relu_backward import _relu_backward_kernel as kernel
job = next(j for j in jobs((80,), ("fp16",)) if j.kernel == "relu_backward")
key, kept = key_of(job), {"registers": 1}

def compiled(job, name):
    kernel.device_caches.clear()
    return compile_job(job, {key_of(job): (name, kept)})

name, row = compile_job(job)
assert compiled(job, name) == (name, kept)
assert compiled(job, "A" * len(name)) == compiled(job, "") == (name, row)
newer = replace(job, capability=90)
assert compiled(newer, name)[1] != kept
kernel._unsafe_update_src(kernel.src.replace("<= 0.0", "< 0.0"))
edited, row = compiled(job, name)
assert edited != name and row != kept, row
"""


def test_only_what_is_made_from_something_else_is_compiled_again():
    result = run(UNCHANGED)
    assert result.returncode == 0, result.stderr


PART = """
import shutil, sys
from pathlib import Path
from benchmarks import codegen
from benchmarks.kernel_table import key_of, read_kept
table = Path(sys.argv[1]) / "codegen.csv"
for name in ("codegen.csv", "codegen.inputs.json"):
    shutil.copy(Path("benchmarks/results") / name, table.with_name(name))
before = read_kept(table)

def compiled(capabilities, dtypes, kept):
    for job in codegen.jobs(capabilities, dtypes):
        if key_of(job) in before:  # of this release of Triton
            name, row = before[key_of(job)]
            yield job, (name, {**row, "registers": 7})

codegen.compile_all = compiled
codegen.main(["--capability", "86", "--dtype", "bf16", "--out", str(table)])
after = read_kept(table)
assert list(after) == [key for key in before if key in after]
assert {key[:2] for key in after} == {key[:2] for key in before}
changed = {key[:2] for key in after if after[key] != before[key]}
assert changed == {("86", "bf16")}, changed
"""


def test_a_part_of_the_table_is_made_anew(tmp_path):
    result = run(PART, str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_kept_table_covers_every_chip_and_kernel():
    with (ROOT / "benchmarks" / "results" / "codegen.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["capability"] for row in rows} == {"80", "86", "89", "90", "100", "120"}
    assert {row["dtype"] for row in rows} == {"fp16", "bf16", "tf32"}
    assert {row["kernel"] for row in rows} == {
        *("conv_bn_act", "conv_tma", "conv_halo", "conv_pair", "conv_ring", "bn_act", "relu_backward"),
        *("expand_shift", "expand_shift_tma", "expand_shift_halo", "expand_shift_ring", "expand_shift_wide"),
        *("bottleneck_rows", "stem", "stem_hopper"),
    }
    assert all(row["local"] == row["stack"] == "0" for row in rows)
    assert all(bool(row["instruction"]) == (row["matrix"] != "0") for row in rows)
    assert all("HGMMA" in row["instruction"] for row in rows if row["capability"] == "90" and row["instruction"])
