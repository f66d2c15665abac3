"""The GPU runner on a machine without a GPU: profiles, order of steps, time limits, arguments, the whole."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
from gpu_fixtures import block, context, few_tiles, one_thread, small_bench

from benchmarks.gpu import (
    compiling,
    device,
    launch_each,
    networks,
    profile,
    requirements,
    runner,
    steps,
    summary,
    verify,
)
from benchmarks.gpu.deadline import Deadline
from benchmarks.shapes import ConvShape
from fused_resblock.kernels.tiles import Tile

ROOT = Path(__file__).parents[1]


# profile

NCU = """==PROF== Connected to process 1
launch: block.reduce _conv_bn_act_kernel
launch: block.expand _conv_bn_act_kernel
2 kernels launched
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
    profile.record(profile.launched(NCU), launches, profile.records(context))
    assert [row["launch"] for row in profile.records(context).rows()] == ["block.reduce", "block.expand"]
    assert profile.parse("==ERROR== ERR_NVGPUCTRPERM") == []


def test_the_profiler_is_asked_for_what_it_knows():
    listing = """Device NVIDIA H100 (GH100)

smsp__issue_active                                           Counter         cycle           # of cycles
smsp__average_warps_issue_stalled_barrier_per_issue_active   Ratio           warp            average
"""
    asked = profile.known(listing)
    assert asked[: len(profile.METRICS)] == list(profile.METRICS.values())
    reasons = {"issue_percent", "stall_barrier"}
    assert set(asked[len(profile.METRICS) :]) == {profile.REASONS[reason] for reason in reasons}
    assert profile.known("==ERROR== no such option") == list(profile.METRICS.values())
    assert ",".join(asked) in profile.command("ncu", asked)
    (launch,) = profile.parse(
        '"ID","Kernel Name","Metric Name","Metric Value"\n'
        f'"0","_conv_bn_act_kernel","{profile.REASONS["stall_barrier"]}","1.25"\n'
    )
    assert launch == {"kernel": "_conv_bn_act_kernel", "stall_barrier": "1.25"}


def test_a_machine_without_ncu_is_told_so(context, monkeypatch):
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    assert profile.run(context) == 0
    assert "ncu is not installed" in (context.folder / "gpu.log").read_text()


def test_every_launch_of_the_memory_check_runs(capsys):
    assert launch_each.main(["--tiny", "--device", "cpu"]) == 0
    *launches, last = capsys.readouterr().out.splitlines()
    assert last == f"{len(launches)} kernels launched"
    assert sum(line.startswith("launch: tail.") for line in launches) == 2
    assert [line.split()[1] for line in launches[-3:]] == ["stem", "stem", "bn_act.residual"]


# compiling ahead


def _worker(job, capability):
    return compiling.Compiled(job, None, capability)


def _stuck(job, capability):
    if job.batch == 2:
        sleep(60)
    return compiling.Compiled(job, None, capability)


def test_a_compiler_that_does_not_end_costs_the_tile_that_it_compiles_alone(monkeypatch):
    monkeypatch.setattr(compiling, "workers", lambda: 1)
    monkeypatch.setattr(compiling, "PATIENCE", 8)
    jobs = [compiling.Job(ConvShape("s", 16, 16, 4), n, "fp16", Tile(64, 32, 32, 4, 1)) for n in (1, 2, 3)]
    found = [(made.job.batch, made.failure) for made in compiling.compile_all(jobs, 90, Deadline(60), worker=_stuck)]
    assert found == [(1, None), (2, "the compiler did not end in 8 s")]


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
    assert device.error_line(ValueError("a\nb")) == "ValueError: a"


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
    assert ran == ["check", "suite", "tune", "bench", "profile", "summary"]


def test_a_failed_step_does_not_stop_the_others_but_a_missing_gpu_does():
    ran = []
    args = runner.arguments([])
    assert runner.run_all(args, lambda step, left: ran.append(step) or int(step == "check")) == 1
    assert ran == ["check", "suite", "tune", "bench", "profile", "summary"]
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

    def ended() -> bool:
        return not status.exists() or status.read_text().split()[2] == "Z"

    deadline = monotonic() + 5  # a killed process still has to be scheduled once; by itself it would go on for 60 s
    while not ended() and monotonic() < deadline:
        sleep(0.01)
    assert ended()


def test_no_step_can_outlast_nine_minutes():
    assert runner.LONGEST + runner.GRACE < 540


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budget", "0"], "budget must lie in [1, 510], got 0"),
        (["--budget", "9000"], "budget must lie in [1, 510], got 9000"),
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
