"""The GPU runner's part for the stage kernel, on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch
from stand_in_device import StandIn

from benchmarks.gpu import check, tail_shapes, tails, tune
from benchmarks.gpu.context import Context
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.records import read_json
from benchmarks.shapes import ConvShape
from fused_resblock import machine
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.stage import refusal
from fused_resblock.kernels.tables import read


@pytest.fixture
def context(tmp_path, monkeypatch):
    """A quick run of one convolution and the tiny tails."""
    monkeypatch.setattr(machine, "stamp", dict)
    monkeypatch.setattr(check, "check_elementwise", lambda *args: None)
    monkeypatch.setattr(check, "shapes", lambda context: [ConvShape("tiny", 16, 16, 4, 3, residual=True)])
    stamp = {"commit": "abc", "driver": "1", "torch": "2.11", "triton": "3.6"}
    return Context(StandIn(), tmp_path, Deadline(1000), quick=True, stamp=stamp)


def test_tails_of_the_network():
    shapes = tail_shapes.shapes(quick=False)
    assert [shape.name for shape in shapes][:5] == ["l1.first", "l1.first.last", "l1", "l1.last", "l1.next"]
    assert shapes[0].case() == "64-256.s1.shortcut64.next64"
    assert shapes[1].case() == "64-256.s1.shortcut64.last"
    assert shapes[4].case() == "64-256.s1.residual.next128"
    assert shapes[5].case() == "128-512.s2.shortcut256.next128"
    for shape in shapes:
        asked = shape.build(1, torch.float16, "meta")
        assert refusal(*asked.layers[:2], asked.epilogue.shortcut, asked.reduce) is None
        for dtype in ("fp16", "tf32"):
            for capability in (80, 90):
                found = tails.tiles(shape, dtype, Gpu(132, capability))
                assert len(found) == len(set(found))
                assert (len(found) > 1) == (dtype == "fp16" or max(shape.width, shape.outputs) < 256)


def test_odd_tails_end_in_a_ragged_tile_whatever_tile_ships():
    keys = {shape.key() for shape in tail_shapes.shapes(quick=False)}
    for shape in tail_shapes.odd_shapes(quick=False):
        assert shape.key() not in keys
        pixels, gpu = 3 * shape.size**2, Gpu(132, 90)
        shipped = shape.shipped(2, gpu)
        assert shipped
        assert all(pixels % tile.block_m for tile in shipped)
        asked = shape.build(3, torch.float16, "meta")
        assert refusal(*asked.layers[:2], asked.epilogue.shortcut, asked.reduce) is None


def test_every_tile_is_judged_and_the_run_resumes(context):
    verdicts = check.records(context)
    tails.check(context, verdicts, check.verdict)
    rows = verdicts.rows(kernel="expand_shift")
    assert len(rows) == 6
    assert {row["status"] for row in rows} == {"ok"}
    tails.check(context, verdicts, check.verdict)
    assert len(verdicts.rows(kernel="expand_shift")) == 6
    assert tails.shipped_faults(context, verdicts) == []


def test_a_wrong_tile_that_ships_fails_the_check(context, monkeypatch):
    right = tails.bound

    def wrong(asked, tile):
        run = right(asked, tile)
        return lambda h, other: tuple(None if t is None else t + tile.tma for t in run(h, other))

    monkeypatch.setattr(tails, "bound", wrong)
    verdicts = check.records(context)
    tails.check(context, verdicts, check.verdict)
    assert len(verdicts.rows(kernel="expand_shift", status="wrong")) == 3
    faults = tails.shipped_faults(context, verdicts)
    assert len(faults) == 3
    assert all("t1" in fault for fault in faults)


def test_tuned_tails_are_in_the_table(context):
    assert check.run(context) == 0
    assert tune.run(context) == 0
    table = read(context.folder / "tiles.json")
    assert {case for _, case in table.stages} == {shape.case() for shape in tail_shapes.shapes(quick=True)}
    for row in read_json(context.folder / "tiles.json")["stages"]:
        assert row["faster"] == (row["us"]["stage"] < tails.MARGIN * row["us"]["apart"])
    timed = context.device.timed
    tune.run(context)
    assert context.device.timed == timed


def test_a_crash_of_the_last_tile_keeps_no_other_tail_from_being_timed(context):
    verdicts, table = check.records(context), tune.records(context)
    tails.check(context, verdicts, check.verdict)
    cases = [shape.key() for shape in tail_shapes.shapes(quick=True)]
    assert len(cases) > 1
    for row in verdicts.rows(kernel="expand_shift", case=cases[0], status="ok"):
        key = {"dtype": "ieee", "case": cases[0], "batch": 2, "backend": "stage", "tile": row["tile"]}
        table.add(**key, status="crash", note="illegal memory access")
    assert tails.tune(context, verdicts, table, "ieee", 2, "stage") == 0
    assert all(table.done("ieee", case, 2, tails.MARK, "") for case in cases)
