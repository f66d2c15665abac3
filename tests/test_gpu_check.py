"""The GPU runner's checks on a machine without a GPU: tiles, verdicts, ceilings, wrong and crashing kernels."""

import sys
from pathlib import Path

import pytest
import torch
from gpu_fixtures import block, context, few_tiles, one_thread, small_bench

from benchmarks.gpu import (
    ceilings,
    check,
    elementwise,
    operations,
    runner,
    space,
    steps,
    tune,
    verify,
)
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.records import read_json
from benchmarks.roofline import read_ceilings
from benchmarks.shapes import ConvShape
from fused_resblock.kernels.choice import HALO, chip_of
from fused_resblock.kernels.convolution import choose
from fused_resblock.kernels.cost import resident_programs, shared_bytes
from fused_resblock.kernels.gpu import Gpu

ROOT = Path(__file__).parents[1]


# search space


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
def test_every_shape_has_tiles_that_fit_the_chip(capability, dtype):
    shapes, gpu = space.distinct_shapes(), Gpu(132, capability)
    assert len({space.key_of(shape) for shape in shapes}) == len(shapes)
    item = operations.DTYPES[dtype][0].itemsize
    for shape in shapes:
        tiles = list(space.tiles(shape, dtype, gpu))
        assert 4 <= len(set(tiles)) == len(tiles) <= 128, shape
        second, residual = bool(shape.shortcut), shape.residual
        for tile in tiles:
            assert shared_bytes(tile, item, residual=residual, second=second) < chip_of(gpu).shared
            assert resident_programs(tile, item, chip_of(gpu).shared, residual=residual, second=second)
        assert any(tile.persistent for tile in tiles) == (capability >= 90)
        plain = (shape.kernel, shape.stride, shape.shortcut) == (3, 1, 0)
        blocks = shape.channels == shape.out_channels and shape.channels // shape.groups in (4, 8, 16, 32, 64)
        taken = plain and blocks and capability == 90 and dtype == "fp16"
        assert (HALO in tiles) == taken


def test_the_tile_that_ships_is_the_librarys_own():
    shape = ConvShape("s", 64, 64, 56, 3)
    operation = operations.build(shape, 32, torch.float16, "meta")
    assert space.chosen(shape, 32, "fp16", Gpu()) == choose(*operation.prepared(), Gpu())


def test_shapes_that_no_kernel_can_tell_apart_have_one_key():
    a, b = ConvShape("a", 64, 64, 56, 3), ConvShape("b", 64, 64, 56, 3)
    assert space.key_of(a) == space.key_of(b) == "64-64.3x3.s1.g1.plain.56px"
    assert space.case_of(a) == "64-64.3x3.s1.g1.plain"


# operations and verdicts


def test_a_wrong_kernel_is_seen_and_an_unwritten_pixel_is_nan(context):
    op = operations.build(ConvShape("s", 16, 16, 4), 2, torch.float32, "cpu")
    same, exact = op.plain(), op.to(torch.float64).plain()
    assert check.verdict(op.plain, same, exact, lambda: None)["status"] == "ok"
    assert check.verdict(lambda: same + 1, same, exact, lambda: None)["status"] == "wrong"
    unwritten = check.verdict(lambda: torch.empty_like(same), same, exact, lambda: None)
    assert unwritten["status"] == "wrong"
    assert "nan" in unwritten["note"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "crash"),
        (ValueError("no such tile"), "failed"),
    ],
)
def test_a_failing_kernel_has_a_verdict(error, status):
    def kernel():
        raise error

    y = torch.zeros(1, 1, 1, 1)
    assert check.verdict(kernel, y, y.double(), lambda: None)["status"] == status


def test_no_memory_is_no_verdict():
    def kernel():
        raise torch.OutOfMemoryError("CUDA out of memory")

    y = torch.zeros(1, 1, 1, 1)
    with pytest.raises(torch.OutOfMemoryError):
        check.verdict(kernel, y, y.double(), lambda: None)


def test_bytes_and_flops_of_an_operation():
    op = operations.build(ConvShape("s", 16, 32, 4, residual=True), 2, torch.float16, "meta")
    assert op.bytes() == 2 * (2 * 16 * 16 + 32 * 16 + 4 * 32 + 2 * 32 * 16 + 2 * 32 * 16)
    assert op.flops() == 2 * 2 * 16 * 32 * 16


# check


def test_the_elementwise_kernels_are_judged(context):
    elementwise.check_elementwise(context, check.records(context))
    rows = check.records(context).rows()
    assert {row["kernel"] for row in rows} == {"bn_act", "relu_backward"}
    assert [f"{row['dtype']} {row['case']}: {row['note']}" for row in rows if row["status"] != "ok"] == []


def test_a_norm_that_forgets_its_residual_is_wrong(context, monkeypatch):
    right = elementwise.bn_act
    monkeypatch.setattr(elementwise, "bn_act", lambda x, norm, *rest: right(x, norm))
    elementwise.check_elementwise(context, check.records(context))
    wrong = check.records(context).rows(status="wrong", kernel="bn_act", dtype="tf32")
    assert {row["case"].split(".")[-1] for row in wrong} == {"residual", "strided"}


def test_check_judges_every_tile_and_resumes(context, few_tiles):
    assert check.run(context) == 0
    rows = check.records(context).rows()
    assert {row["kernel"] for row in rows} == {"conv_bn_act"}
    assert any(".p" in row["tile"] for row in rows)
    assert {row["status"] for row in rows} == {"ok"}
    compiled = len(context.device.compile_calls)
    size = (context.folder / "check.csv").stat().st_size
    check.run(context)
    assert len(context.device.compile_calls) == compiled
    assert (context.folder / "check.csv").stat().st_size == size


def test_a_wrong_tile_that_ships_fails_the_check_and_is_never_tuned(context, few_tiles, monkeypatch):
    shape = check.shapes(context)[0]
    shipped = space.chosen(shape, 2, "ieee", context.device.gpu)
    right = operations.Operation.with_tile
    monkeypatch.setattr(operations.Operation, "with_tile", lambda op, tile: right(op, tile) + (tile == shipped))
    assert check.run(context) == 1
    verdicts = check.records(context)
    assert [row["tile"] for row in verdicts.rows(status="wrong")] == [str(shipped)]
    assert "NOT RIGHT" in (context.folder / "gpu.log").read_text()
    tiles = tune.right_tiles(verdicts, "ieee", space.key_of(shape))
    assert tiles
    assert str(shipped) not in tiles


def test_a_tile_that_does_not_compile_is_recorded(context, few_tiles, monkeypatch):
    refused = space.chosen(check.shapes(context)[0], 2, "ieee", context.device.gpu)
    context.device.refused = (refused,)
    assert check.run(context) == 1
    (row,) = check.records(context).rows(status="failed")
    assert row["tile"] == str(refused)
    assert row["note"].startswith("OutOfResources")


def test_a_crash_is_on_record_before_the_process_ends_and_is_not_met_again(context, few_tiles, monkeypatch):

    def crash(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(steps.PARTS, "check", (check.run,))
    with monkeypatch.context() as patch:
        patch.setattr(operations.Operation, "with_tile", crash)
        assert steps.run_step("check", context) == runner.LOST_CONTEXT == steps.LOST_CONTEXT
    (row,) = check.records(context).rows()
    assert row["status"] == "crash"
    assert steps.run_step("check", context) == 1  # the tile ships
    assert check.records(context).count("status")["crash"] == 1


def test_an_unexpected_error_is_one_line_with_its_traceback_in_the_log(context, monkeypatch, capsys):
    def fail(context):
        raise KeyError("what")

    monkeypatch.setitem(steps.PARTS, "tune", (fail,))
    assert steps.run_step("tune", context) == 1
    assert capsys.readouterr().out == "tune: KeyError: 'what'; what was measured is kept, details are in gpu.log\n"
    assert "Traceback" in (context.folder / "gpu.log").read_text()


def test_check_stops_at_its_deadline(context, few_tiles):
    context.deadline = Deadline(0)
    check.run(context)
    assert check.records(context).rows() == []


def test_ceilings_that_lack_a_rate_are_refused(tmp_path):
    file = tmp_path / "ceilings.json"
    file.write_text('{"gpu": "X", "copy_tb_per_s": 2.0}')
    with pytest.raises(ValueError, match=r"^ceilings must hold gpu, .*, got no 'l2_copy_tb_per_s'"):
        read_ceilings(file)


def test_ceilings_are_measured_once(context):
    ceilings.run(context)
    told = read_json(context.folder / "ceilings.json")
    assert told["copy_tb_per_s"] > 0
    assert told["gpu"] == "Stand-In 9000"
    chip = read_ceilings(context.folder / "ceilings.json")
    assert chip.name == "Stand-In 9000 (measured ceilings)"
    assert chip.l2 == pytest.approx(1e12 * told["l2_copy_tb_per_s"])
    assert chip.multiprocessors == context.device.gpu.multiprocessors
    timed = context.device.timed
    ceilings.run(context)
    assert context.device.timed == timed


def test_the_graph_check_gives_a_verdict(context, monkeypatch):
    monkeypatch.setattr(verify, "make_model", lambda *args: block(3))
    verify.check_graph(context, check.records(context))
    (row,) = check.records(context).rows(kernel="cuda-graph")
    assert (row["status"], row["note"]) == ("ok", "")


def test_a_program_that_does_not_end_is_ended():
    status, said = verify.command_output([sys.executable, "-uc", "print('hi'); import time; time.sleep(60)"], 1.5)
    assert status is None
    assert said == "hi\n"


def test_the_suite_names_files_that_exist():
    assert all((ROOT / "tests" / f"{stem}.py").is_file() for stem in verify.SUITE)
