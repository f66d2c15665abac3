"""The steps check and tune of the stem, on the stand-in device: rows, faults, resuming, and what a table gets."""

from __future__ import annotations

import pytest
import torch
from stand_in_device import StandIn

from benchmarks.gpu import check, stems, tune
from benchmarks.gpu.context import Context
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.device import Broken
from fused_resblock.kernels import tables

pytest.importorskip("triton")


@pytest.fixture
def context(tmp_path):
    """A quick run; on the stand-in it measures in IEEE fp32."""
    stamp = {"commit": "abc", "driver": "1", "torch": "2.11", "triton": "3.6", "gpu": "stand-in", "date": "today"}
    return Context(StandIn(), tmp_path, Deadline(1000), quick=True, stamp=stamp)


def test_every_dtype_is_judged_once(context):
    verdicts = check.records(context)
    stems.check(context, verdicts, check.verdict)
    rows = verdicts.rows(kernel="stem")
    assert [row["dtype"] for row in rows] == ["fp16", "bf16", "tf32", "ieee"]
    assert {row["status"] for row in rows if row["dtype"] != "bf16"} == {"ok"}  # the interpreter truncates to bf16
    stems.check(context, verdicts, lambda *args: pytest.fail("judged again"))


def test_a_wrong_stem_is_a_fault(context, monkeypatch):
    right = stems.fused
    monkeypatch.setattr(stems, "fused", lambda op: lambda x, other: right(op)(x, other).roll(1, -1))
    verdicts = check.records(context)
    stems.check(context, verdicts, check.verdict)
    assert {row["status"] for row in verdicts.rows(kernel="stem")} == {"wrong"}


def test_what_is_fastest_goes_into_a_table(context):
    table = tune.records(context)
    assert stems.tune(context, table, "ieee", 2) == 0
    rows = {row["backend"]: row for row in table.rows()}
    assert rows.keys() == {"triton", "cudnn", "eager", "stem"}
    assert rows["cudnn"]["status"] == "failed", "there is no cuDNN on a CPU"
    stems.tune(context, table, "ieee", 2)
    assert len(table.rows()) == 4
    (winner,) = stems.winners(context, table)
    assert winner["case"] == "3-64.7x7.s2.g1.plain.pool"
    assert winner["pixels"] == 2 * 10 * 10
    assert winner["backend"] == min(winner["us"], key=winner["us"].__getitem__)
    assert tune.write_winners(context, table) == 1
    read = tables.read(context.folder / "tiles.json")
    assert list(read.convolutions) == [("ieee", "3-64.7x7.s2.g1.plain.pool")]


def test_out_of_memory_and_a_passed_deadline(context, monkeypatch):
    table = tune.records(context)
    context.deadline = Deadline(0)
    assert stems.tune(context, table, "ieee", 2) == 1
    context.deadline = Deadline(1000)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stems, "operation", lambda *args: full() if args[3] != "meta" else build(*args))
    build = stems.build
    monkeypatch.setattr(stems, "_case", lambda size: "stem")
    stems.tune(context, table, "ieee", 2)
    assert [row["status"] for row in table.rows()] == ["oom"]


def test_a_crash_is_on_record_and_not_met_again(context, monkeypatch):
    def crash(op):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(stems, "fused", crash)
    table = tune.records(context)
    with pytest.raises(Broken, match="illegal memory access"):
        stems.tune(context, table, "ieee", 2)
    assert [(row["backend"], row["status"]) for row in table.rows()] == [("triton", "crash")]
    monkeypatch.setattr(stems, "fused", lambda op: pytest.fail("met again"))
    assert stems.tune(context, table, "ieee", 2) == 0
    assert {row["backend"]: row["status"] for row in table.rows()}["stem"] == "tuned"
