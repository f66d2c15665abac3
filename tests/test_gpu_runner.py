"""The GPU runner on a machine without a GPU: arguments, order, files, resuming, time limits, memory, wrong kernels."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stand_in_device import StandIn

from benchmarks.gpu import (
    bench,
    ceilings,
    check,
    compiling,
    device,
    elementwise,
    launch_each,
    networks,
    operations,
    profile,
    requirements,
    runner,
    space,
    steps,
    summary,
    tails,
    tune,
    verify,
)
from benchmarks.gpu.context import Context
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.records import Records, read_json, write_json
from benchmarks.roofline import read_ceilings
from benchmarks.shapes import ConvShape
from fused_resblock import machine, models, reference
from fused_resblock.kernels.choice import chip_of
from fused_resblock.kernels.convolution import choose
from fused_resblock.kernels.cost import resident_programs, shared_bytes
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.tables import read
from fused_resblock.kernels.tiles import Tile

ROOT = Path(__file__).parents[1]
MARKS = {"gpu": "g", "torch": "2.11", "triton": "3.6", "commit": "abc"}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors on several threads mostly wait for one another when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def context(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "stamp", dict)
    stamp = {"commit": "abc", "driver": "1", "torch": "2.11", "triton": "3.6"}
    return Context(StandIn(), tmp_path, Deadline(1000), quick=True, stamp=stamp)


@pytest.fixture
def few_tiles(monkeypatch):
    """One shape, in fp32 alone, no elementwise kernels and no tails."""
    monkeypatch.setattr(tails, "shapes", lambda quick: [])
    monkeypatch.setattr(check, "check_elementwise", lambda *args: None)
    monkeypatch.setattr(check, "shapes", lambda context: [ConvShape("tiny", 16, 16, 4, 3, residual=True)])
    monkeypatch.setattr(check, "DTYPES", {"ieee": operations.DTYPES["ieee"]})


# records


def table(path, marks=MARKS):
    return Records(path, ("case",), ("status", "value"), marks)


def test_rows_are_on_disk_at_once_and_are_found_again(tmp_path):
    path = tmp_path / "a.csv"
    table(path).add(case="one", status="ok", value=1.23456789)
    again = table(path)
    assert again.done("one")
    assert not again.done("two")
    assert again.rows() == [{"case": "one", "status": "ok", "value": "1.23457", **MARKS}]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_half_written_last_line_is_dropped_and_nothing_else(tmp_path, cut):
    path = tmp_path / "a.csv"
    table(path).add(case="one", status="ok", value="x")
    table(path).add(case="two", status="ok", value="y")
    path.write_bytes(path.read_bytes()[:-cut])
    resumed = table(path)
    assert resumed.done("one")
    assert not resumed.done("two")
    resumed.add(case="two", status="ok", value="z")
    assert [row["value"] for row in table(path).rows()] == ["x", "z"]


def test_a_file_cut_within_its_header_starts_anew(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("case,sta")
    table(path).add(case="one", status="ok")
    assert table(path).done("one")


def test_a_file_with_other_columns_is_set_aside(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("something,else\n1,2\n")
    table(path).add(case="one", status="ok")
    assert (tmp_path / "a.csv.old").read_text() == "something,else\n1,2\n"
    assert table(path).done("one")


@pytest.mark.parametrize("mark", MARKS)
def test_rows_of_another_gpu_version_or_commit_do_not_count(tmp_path, mark):
    path = tmp_path / "a.csv"
    table(path, MARKS | {mark: "other"}).add(case="one", status="ok")
    mine = table(path)
    assert not mine.done("one")
    mine.add(case="one", status="ok")
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("status", ["error", "timeout"])
def test_unfinished_cases_are_tried_again_and_the_last_row_counts(tmp_path, status):
    path = tmp_path / "a.csv"
    table(path).add(case="one", status=status)
    assert not table(path).done("one")
    table(path).add(case="one", status="ok")
    assert [row["status"] for row in table(path).rows()] == ["ok"]


def test_json_is_replaced_whole_and_a_damaged_one_is_empty(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": ')
    assert read_json(path) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


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
    assert chip.name == "Stand-In 9000 (measured)"
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


# tune


def test_tune_needs_a_check(context):
    assert tune.run(context) == 1
    assert "run the step check first" in (context.folder / "gpu.log").read_text()


def test_tune_writes_winners_and_resumes(context, few_tiles):
    check.run(context)
    assert tune.run(context) == 0
    (winner,) = read_json(context.folder / "tiles.json")["winners"]
    assert winner["backend"] in winner["us"]
    shape = check.shapes(context)[0]
    (entry,) = read(context.folder / "tiles.json").convolutions["ieee", space.case_of(shape)]
    assert (entry.pixels, entry.backend, str(entry.tile)) == (2 * 4 * 4, winner["backend"], winner["tile"])
    assert {row["status"] for row in tune.records(context).rows(backend="cudnn")} == {"failed"}  # there is none here
    timed = context.device.timed
    tune.run(context)
    assert context.device.timed == timed


def test_tune_goes_on_after_memory_runs_out(context, few_tiles, monkeypatch):
    check.run(context)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(context.device, "times", full)
    assert tune.run(context) == 0
    (row,) = tune.records(context).rows(backend="all")
    assert row["status"] == "oom"


def test_the_peers_compute_the_same_operation():
    for shape in (
        ConvShape("r", 16, 24, 5, 3, residual=True),
        ConvShape("s", 16, 24, 5, shortcut=8, shortcut_stride=2),
    ):
        op = operations.build(shape, 2, torch.float32, "cpu")
        torch.testing.assert_close(tune.cudnn_epilogue(op), op.plain())


# bench


def block(channels=16):
    made = models.randomize_norms(reference.BasicBlock(channels, channels)).eval().requires_grad_(False)
    return made.to(memory_format=torch.channels_last)


@pytest.fixture
def small_bench(monkeypatch):
    """A block under every provider of the main group."""
    monkeypatch.setattr(bench, "prepare", lambda case, *rest: (block(), torch.randn(case.batch, 16, 4, 4)))
    monkeypatch.setattr(bench, "cases", lambda quick: iter([networks.Case("resnet18", 2, "layer1.0", size=16)]))


def test_bench_times_what_is_right_and_resumes(context, small_bench):
    assert bench.run(context) == 0
    rows = {row["provider"]: row for row in bench.records(context).rows(part="layer1.0")}
    for name in ("eager", "folded", "fused", "triton"):
        for mode in ("", "+graph"):
            assert rows[name + mode]["status"] == "ok", rows[name + mode]["note"]
            assert float(rows[name + mode]["images_per_s"]) > 0
    assert rows["cudnn"]["status"] == "failed"
    size = (context.folder / "bench.csv").stat().st_size
    bench.run(context)
    assert (context.folder / "bench.csv").stat().st_size == size


def test_folding_changes_no_result():
    case = networks.Case("resnet18", 2, size=32)
    model, x = networks.prepare(case, "cpu", torch.float32)
    folded = networks.fold(model.double())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert [type(m) for m in folded.layer2[0].downsample] == [torch.nn.Conv2d, torch.nn.Identity]
    torch.testing.assert_close(folded(x.double()), model(x.double()))


def test_a_wrong_provider_has_no_time_and_fails_the_step(context, small_bench, monkeypatch):
    wrong = {"eager": lambda model, x: model, "bad": lambda model, x: lambda x: model(x) + 1}
    monkeypatch.setitem(networks.GROUPS, "main", wrong)
    assert bench.run(context) == 1
    (row,) = bench.records(context).rows(provider="bad")
    assert (row["status"], row["median_ms"]) == ("failed", "")


def test_out_of_memory_goes_on_at_half_the_batch(context, small_bench, monkeypatch):
    monkeypatch.setitem(networks.GROUPS, "main", {"eager": lambda model, x: model})
    context.device.out_of_memory_after = 1
    assert bench.run(context) == 0
    status = {(row["batch"], row["provider"]): row["status"] for row in bench.records(context).rows()}
    assert status["2", "all"] == "oom"
    assert status["1", "eager"] == "ok"


def test_bench_begins_nothing_that_the_deadline_forbids(context, small_bench):
    context.deadline = Deadline(0)
    bench.run(context)
    assert bench.records(context).rows() == []
    assert "1 cases left" in (context.folder / "gpu.log").read_text()


def test_what_matters_most_is_measured_first():
    cases = list(bench.cases())
    assert len(set(cases)) == len(cases)
    assert [(c.network, c.batch) for c in cases[:2]] == [("resnet50", 128), ("resnet18", 128)]
    assert cases[-1].group == "max-autotune"


# profile

NCU = """==PROF== Connected to process 1
3 kernels launched
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","_conv_bn_act_kernel","gpu__time_duration.sum","ns","1,234"
"0","1","_conv_bn_act_kernel","launch__registers_per_thread","register/thread","128"
"1","1","_conv_bn_act_kernel","gpu__time_duration.sum","ns","n/a"
==PROF== Disconnected
"""


def test_counters_are_read_from_the_profilers_table(context):
    launches = profile.parse(NCU)
    kernel = "_conv_bn_act_kernel"
    assert launches == [{"kernel": kernel, "duration_ns": "1234", "registers": "128"}, {"kernel": kernel}]
    profile.record(launches, profile.records(context))
    assert [row["launch"] for row in profile.records(context).rows()] == launch_each.names()[:2]
    assert profile.parse("==ERROR== ERR_NVGPUCTRPERM") == []


def test_a_machine_without_ncu_is_told_so(context, monkeypatch):
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    assert profile.run(context) == 0
    assert "ncu is not installed" in (context.folder / "gpu.log").read_text()


def test_every_launch_of_the_memory_check_runs(capsys):
    assert launch_each.main(["--tiny", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "10 kernels launched\n"


# compiling ahead


def _worker(job, capability):
    return compiling.Compiled(job, None, capability)


def test_jobs_are_compiled_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(compiling, "workers", lambda: 1)
    jobs = [compiling.Job(ConvShape("s", 16, 16, 4), n, "fp16", Tile(64, 32, 32, 4, 1)) for n in (1, 2, 3)]
    results = list(compiling.compile_all(jobs, 90, Deadline(60), worker=_worker))
    assert {result.job for result in results} == set(jobs)
    assert {result.shared for result in results} == {90}
    assert list(compiling.compile_all([], 90, Deadline(60))) == []


# machine


def test_errors_are_told_apart():
    assert device.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert device.is_broken(RuntimeError("CUDA error: unspecified launch failure"))
    assert not device.is_broken(RuntimeError("CUDA out of memory"))
    assert device.first_line(ValueError("a\nb")) == "ValueError: a"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"torch": "2.11.0+cu130", "triton": "3.5.1"}, "triton must be 3.6 or newer, got 3.5.1"),
        ({"torch": "2.9.0", "triton": "3.6.0"}, "torch must be 2.11 or newer, got 2.9.0"),
        ({"torch": "2.11.0", "triton": None}, "triton must be 3.6 or newer, and it is not installed"),
    ],
)
def test_old_or_missing_packages_are_named(found, message):
    with pytest.raises(requirements.Unusable, match=message):
        requirements.check_versions(found)


def test_new_enough_packages_pass():
    requirements.check_versions({"torch": "2.11.0+cu130", "triton": "3.10.0"})


# runner


def test_all_runs_the_steps_in_order_and_the_summary_last():
    ran = []
    args = runner.arguments(["--budget", "10"])
    assert runner.run_all(args, lambda step, left: ran.append(step) or 0) == 0
    assert ran == ["check", "tune", "bench", "profile", "summary"]


def test_a_failed_step_does_not_stop_the_others_but_a_missing_gpu_does():
    ran = []
    args = runner.arguments([])
    assert runner.run_all(args, lambda step, left: ran.append(step) or int(step == "check")) == 1
    assert ran == ["check", "tune", "bench", "profile", "summary"]
    ran.clear()
    assert runner.run_all(args, lambda step, left: ran.append(step) or 2) == 2
    assert ran == ["check"]


def test_a_lost_context_is_followed_by_a_new_process_within_the_same_budget():
    now, budgets, statuses = [0.0], [], iter([75, -11, 0])

    def spawn(step, left):
        budgets.append(left)
        now[0] += 100
        return next(statuses)

    assert runner.supervise("check", 500, spawn, clock=lambda: now[0]) == 0
    assert budgets == [500, 400, 300]


def test_a_step_that_keeps_crashing_or_overruns_is_given_up(capsys):
    assert runner.supervise("check", 500, lambda step, left: 75) == 1
    assert "run it again to go on" in capsys.readouterr().out
    assert runner.supervise("check", 500, lambda step, left: None) == 1
    assert "ended after 520 s" in capsys.readouterr().out


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    hang = tmp_path / "python"
    hang.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/child\nwait\n")
    hang.chmod(0o755)
    monkeypatch.setattr(runner, "GRACE", 1.0)
    monkeypatch.setattr(runner.sys, "executable", str(hang))
    assert runner.spawner(runner.arguments([]))("check", 0.5) is None
    status = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_no_step_can_outlast_nine_minutes():
    assert runner.LONGEST + runner.GRACE < 540


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budget", "0"], "budget must lie in (0, 510], got 0"),
        (["--budget", "9000"], "budget must lie in (0, 510], got 9000"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["--out", __file__], "out must be a folder"),
    ],
)
def test_wrong_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        runner.arguments(argv)
    assert message in capsys.readouterr().err


def test_results_go_to_the_folder_in_OUT(monkeypatch, tmp_path):  # noqa: N802
    monkeypatch.setenv("OUT", str(tmp_path))
    assert runner.arguments([]).out == tmp_path
    assert runner.arguments(["--out", "/elsewhere"]).out == Path("/elsewhere")
    assert runner.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu", "check", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "an NVIDIA GPU must be visible to torch" in done.stderr


def test_the_kernels_are_found_without_an_installed_package(tmp_path):
    """In a copy of the package without its link or installation, as on a machine that has only the checkout."""
    (tmp_path / "fused_resblock").mkdir()
    (tmp_path / "fused_resblock" / "__init__.py").write_text("")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("found = True")
    (tmp_path / "benchmarks" / "gpu").mkdir(parents=True)
    source = (ROOT / "benchmarks" / "gpu" / "bootstrap.py").read_text()
    (tmp_path / "benchmarks" / "gpu" / "bootstrap.py").write_text(source)
    code = "import benchmarks.gpu.bootstrap, fused_resblock.kernels as k; print(k.found)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout == "True\n", done.stderr


# summary and the whole


def test_the_summary_of_an_empty_folder_names_no_numbers(context):
    told = summary.text(context)
    assert "kernels and tiles checked: none" in told
    assert "no networks measured" in told


def test_every_step_on_the_stand_in(context, few_tiles, small_bench, monkeypatch, capsys):
    monkeypatch.setitem(networks.GROUPS, "main", {"eager": lambda model, x: model})
    monkeypatch.setattr(verify, "SUITE", ())
    monkeypatch.setattr(verify, "make_model", lambda *args: block(3))
    monkeypatch.setattr(verify.shutil, "which", lambda name: None)
    for step in (*runner.STEPS, "summary"):
        assert steps.run_step(step, context) == 0, step
    files = {path.name for path in context.folder.iterdir()}
    assert files == {"ceilings.json", "check.csv", "tune.csv", "tiles.json", "bench.csv", "gpu.log", "summary.txt"}
    with (context.folder / "bench.csv").open() as file:
        assert {row["gpu"] for row in csv.DictReader(file)} == {"Stand-In 9000"}
    assert json.loads((context.folder / "tiles.json").read_text())["commit"] == "abc"
    told = capsys.readouterr().out
    assert "convolutions tuned: 1" in told
    assert "layer1.0" in told
