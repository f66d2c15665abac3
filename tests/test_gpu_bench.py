"""The GPU runner's tuning and benchmarks on a machine without a GPU: what is right is timed, memory may run out."""

from pathlib import Path

import torch
from gpu_fixtures import block, context, few_tiles, one_thread, small_bench

from benchmarks.cases import BLOCKS, BODY
from benchmarks.gpu import (
    bench,
    check,
    networks,
    operations,
    space,
    tune,
)
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.records import read_json
from benchmarks.shapes import ConvShape
from fused_resblock.kernels.tables import read
from fused_resblock.models import ARCHITECTURES

ROOT = Path(__file__).parents[1]


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


def test_tune_takes_cudnn_where_it_is_worth_its_weights(context, monkeypatch):
    """Those of a 3x3 of 512 channels are 4.5 MiB in fp16, worth 6.75 us."""
    shape = ConvShape("wide", 512, 512, 7, kernel=3)
    monkeypatch.setattr(check, "shapes", lambda context: [shape])
    table = tune.records(context)

    def add(backend: str, us: float) -> None:
        key = {"dtype": "fp16", "case": space.key_of(shape), "batch": 1, "backend": backend, "tile": ""}
        table.add(**key, status="ok", median_us=us)

    for cudnn, backend in ((100.0, "triton"), (99.9, "cudnn")):
        for name, us in (("cudnn", cudnn), ("triton", 106.7), ("cudnn-frontend", 1.0)):
            add(name, us)
        assert tune.write_winners(context, table) == 1
        (winner,) = read_json(context.folder / "tiles.json")["winners"]
        assert winner["backend"] == backend


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


def test_l2_is_emptied_or_filled_before_each_call(context, monkeypatch):
    """By the group: emptied for each of two rounds of the four providers, each as it is and as a graph."""
    calls = []

    class Counting(torch.nn.Module):
        def forward(self, x):
            calls.append(1)
            return x + 1

    model = Counting()
    makers = {"eager": lambda model, x: model}
    monkeypatch.setattr(bench, "prepare", lambda case, *rest: (model, torch.randn(2, 16, 4, 4)))
    for group, flushed, each in (("main", 0, 1), ("cold", 4, 1), ("warm", 0, 2)):
        monkeypatch.setitem(networks.GROUPS, group, makers)
        before, context.device.flushed = len(calls), 0
        bench.measure(context, networks.Case("resnet18", 2, group=group, dtype="ieee"), bench.records(context))
        assert context.device.flushed == flushed
        called = len(calls) - before
        if group == "main":
            usual = called
        assert called == usual + 4 * (each - 1)


def test_in_tf32_the_bound_is_the_larger_error_of_torch_and_of_an_ideal_unit(monkeypatch):
    model, x = torch.nn.Conv2d(8, 8, 3).requires_grad_(False), torch.randn(2, 8, 6, 6)
    exact = model.double()(x.double())
    model.float()
    off = {d: (bench.bounding_output(d, model, x, exact) - exact).abs().max() for d in ("ieee", "tf32")}
    assert off["tf32"] > 50 * off["ieee"]
    monkeypatch.setattr(bench, "own", lambda dtype, function: exact.float())
    assert torch.equal(bench.bounding_output("tf32", model, x, exact), model(x))


def test_what_is_planned_is_every_network_in_every_dtype():
    planned = bench.planned()
    assert len(planned) == len(set(planned))
    whole = {(of.network, of.dtype, of.batch) for of, _ in planned if of.part == "whole"}
    assert whole == {(n, d, b) for n in ARCHITECTURES for d in ("fp16", "bf16", "tf32") for b in bench.BATCHES}
    assert {c.group for c in bench.cases() if c.part in BLOCKS} == {"main", "cold", "warm", "compile"}


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


def test_half_the_batch_is_measured_by_the_next_run_if_there_was_no_time(context, small_bench, monkeypatch):
    monkeypatch.setitem(networks.GROUPS, "main", {"eager": lambda model, x: model})
    context.device.out_of_memory_after = 1
    full, context.deadline = context.deadline, Deadline(1000)
    answers = [False, True]
    monkeypatch.setattr(context.deadline, "allows", lambda seconds: answers.pop())
    bench.run(context)
    assert not bench.records(context).rows(batch=1)
    context.deadline = full
    assert bench.run(context) == 0
    (row,) = bench.records(context).rows(batch=1, provider="eager")
    assert row["status"] == "ok"


def test_an_error_of_any_kind_ends_one_case_alone(context, small_bench, monkeypatch):
    def missing(*args: object) -> None:
        raise KeyError("missing")

    monkeypatch.setattr(bench, "prepare", missing)
    assert bench.run(context) == 0
    (row,) = bench.records(context).rows(provider="all")
    assert (row["status"], "missing" in row["note"]) == ("failed", True)


def test_bench_begins_nothing_that_the_deadline_forbids(context, small_bench):
    context.deadline = Deadline(0)
    bench.run(context)
    assert bench.records(context).rows() == []
    assert "1 cases left" in (context.folder / "gpu.log").read_text()


def test_what_matters_most_is_measured_first():
    cases = list(bench.cases())
    assert len(set(cases)) == len(cases)
    assert [(c.network, c.batch) for c in cases[:2]] == [("resnet50", 128), ("resnet18", 128)]
    assert [c.group for c in cases[:12]] == ["main"] * 12
    assert [c.group for c in cases[12:21]] == ["by-stage"] * 9


def test_a_stage_and_the_body_take_what_the_network_hands_them():
    whole, x = networks.prepare(networks.Case("resnet18", 2, size=32), "cpu", torch.float32)
    body, h = networks.prepare(networks.Case("resnet18", 2, BODY, size=32), "cpu", torch.float32)
    torch.testing.assert_close(whole.fc(whole.avgpool(body(h)).flatten(1)), whole(x))
    stage, before = networks.prepare(networks.Case("resnet18", 2, "layer2", size=32), "cpu", torch.float32)
    torch.testing.assert_close(body[0](h), before)
    torch.testing.assert_close(body[1](body[0](h)), stage(before))
