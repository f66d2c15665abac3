"""The benchmarks' own machinery: the order of rounds and their medians, wrong providers, and the cases."""

import itertools
from functools import partial

import pytest
import torch
from benchmark_rows import latency

from benchmarks import bench_cpu, cases, harness, memory, results
from benchmarks.cases import Case


@pytest.fixture
def one_thread():
    """Tiny convolutions on several threads mostly wait for one another when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scripted_clock(durations):
    """A clock on which the n-th timed call takes the n-th duration, in milliseconds."""
    readings = itertools.chain.from_iterable((0, round(ms * 1e6)) for ms in durations)
    return lambda: next(readings)


def test_every_provider_takes_every_place_and_precedes_each_other_equally_often():
    orders = [harness.turn("abc", number) for number in range(6)]
    for place in range(3):
        assert sorted(order[place] for order in orders) == ["a", "a", "b", "b", "c", "c"]
    for first, second in itertools.permutations("abc", 2):
        assert sum(order.index(first) < order.index(second) for order in orders) == 3


def test_rounds_follow_the_turns_after_the_warm_up():
    called, ticks = [], []
    calls = {name: partial(called.append, name) for name in "abc"}
    harness.time_in_turns(calls, rounds=4, warm_up=2, tick=lambda: ticks.append(len(called)))
    assert called[:6] == list("aabbcc")
    assert called[6:] == [name for number in range(4) for name in harness.turn("abc", number)]
    assert ticks == [9, 12, 15, 18]


def test_what_is_timed_is_prepared_outside_of_its_time():
    told = []
    calls = {name: partial(told.append, name) for name in "ab"}
    readings = iter(range(100))

    def clock():
        told.append("clock")
        return next(readings)

    harness.time_in_turns(calls, rounds=2, warm_up=0, clock=clock, prepare=lambda call: call())
    assert told == [step for name in "abba" for step in (name, "clock", name, "clock")]


def test_median_and_percentiles_belong_to_their_provider():
    times = {"a": [1.0, 9.0, 2.0, 3.0, 100.0], "b": [10.0, 30.0, 20.0, 50.0, 40.0]}
    dealt = [times[name][number] for number in range(5) for name in harness.turn("ab", number)]
    spreads = harness.time_in_turns(
        {"a": lambda: None, "b": lambda: None}, rounds=5, warm_up=0, clock=scripted_clock(dealt)
    )
    assert spreads["a"] == harness.Spread(3.0, pytest.approx(1.8), pytest.approx(27.2), 5)
    assert spreads["b"] == harness.Spread(30.0, 18.0, 42.0, 5)


def test_one_round_is_its_own_median():
    assert harness.Spread.of([2_000_000]) == harness.Spread(2.0, 2.0, 2.0, 1)


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        harness.time_in_turns({"a": lambda: None}, rounds=0)


def test_wrong_providers_are_reported_without_a_speed():
    x = torch.randn(2, 8, 4, 4)
    exact = x.double().square() / 3

    def broken():
        raise OSError("no compiler\nsecond line")

    def careless(x):
        return x.square_().div_(3)

    makers = {
        "eager": lambda: lambda x: x.square() / 3,
        "same": lambda: lambda x: x * x / 3,
        "wrong": lambda: lambda x: x.square() / 3 + 1e-3,
        "nan": lambda: lambda x: x.square() / 3 + torch.nan,
        "shape": lambda: lambda x: x[:1].square() / 3,
        "dtype": lambda: lambda x: x.double().square() / 3,
        "broken": broken,
        "careless": lambda: careless,
    }
    outcomes = {o.provider: o for o in harness.compare(makers, x, exact, rounds=3)}
    assert [name for name, o in outcomes.items() if o.spread is not None] == ["eager", "same"]
    assert "max error" in outcomes["wrong"].failure
    assert outcomes["wrong"].max_error > outcomes["wrong"].error_bound
    assert "max error nan" in outcomes["nan"].failure
    assert outcomes["shape"].failure == "output is torch.float32 (1, 8, 4, 4), not torch.float32 (2, 8, 4, 4)"
    assert "torch.float64" in outcomes["dtype"].failure
    assert outcomes["broken"].failure == "OSError: no compiler"
    assert outcomes["careless"].failure == "changes its input"
    assert torch.equal(x.double().square() / 3, exact)

    rows = {row.provider: row for row in bench_cpu.latency_rows(Case("resnet18"), list(outcomes.values()))}
    assert rows["wrong"].status == "failed"
    assert rows["wrong"].median_ms is rows["wrong"].speedup_vs_eager is rows["wrong"].rounds is None
    assert rows["wrong"].note == outcomes["wrong"].failure
    assert rows["same"].speedup_vs_eager > 0


def test_the_bound_may_be_that_of_another_result():
    x = torch.randn(2, 8, 4, 4)
    makers = {"eager": lambda: lambda x: x, "worse": lambda: lambda x: x + 1e-3}
    for same_dtype, failed in ((None, 1), (x + 1e-3, 0)):
        outcomes = harness.compare(makers, x, x.double(), rounds=1, same_dtype=same_dtype)
        assert sum(o.failure is not None for o in outcomes) == failed


@pytest.mark.parametrize("part", ["whole", cases.BODY, "layer2", "layer2.0", "layer3.1"])
def test_a_part_is_what_the_network_runs_on_what_it_hands_it(part, one_thread):
    model, x = cases.prepare(Case("resnet18", part, size=64))
    whole, images = cases.prepare(Case("resnet18", size=64))
    place = {"whole": whole, cases.BODY: whole.layer4}.get(part) or whole.get_submodule(part)
    seen = []
    place.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        whole(images)
        torch.testing.assert_close(model(x), seen[0])
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_many_small_errors_fail_where_the_largest_one_does_not():
    exact = torch.zeros(1000, dtype=torch.float64)
    same_dtype = torch.zeros(1000)
    same_dtype[0] = 1.0
    assert harness.parity(torch.full((1000,), 0.5), same_dtype, exact)[0].startswith("rms error")
    assert harness.parity(same_dtype * 2, same_dtype, exact)[0] is None


def test_nothing_is_measured_against_numbers_that_are_not_finite():
    x = torch.full((1, 1), torch.inf)
    with pytest.raises(RuntimeError, match="eager must give finite numbers"):
        harness.compare({"eager": lambda: lambda x: x - x}, x, torch.zeros(1, 1).double(), rounds=1)


def test_quotients_are_of_medians_and_absent_where_the_other_failed():
    rows = {row.provider: row for row in latency("resnet18", "whole", "float32", 1, {"eager": 4.0, "fused": 2.0})}
    assert (rows["fused"].speedup_vs_eager, rows["fused"].ratio_to_compile) == (2.0, None)
    medians = {"eager": 4.0, "fused": 2.0, "compile": 1.6}
    rows = {row.provider: row for row in latency("resnet18", "whole", "float32", 1, medians)}
    assert rows["fused"].ratio_to_compile == 1.25


def test_a_small_case_from_the_command_line_to_the_file(tmp_path, one_thread):
    file = tmp_path / "new" / "out.csv"
    options = ["--networks", "resnet18", "--batches", "1", "--dtypes", "float32"]
    options += ["--only", "latency", "fuse", "--size", "96", "--rounds", "2", "--out", str(file)]
    options += ["--providers", "eager", "fused"]
    assert bench_cpu.main(options) == 0
    rows = results.read(file)
    assert [(row.benchmark, row.part, row.provider) for row in rows] == [
        *(("latency", part, provider) for part in cases.PARTS for provider in ("eager", "fused")),
        ("fuse", "whole", "fused"),
        ("packing", "whole", "fused"),
    ]
    assert all(row.status == "ok" and row.rounds and row.cpu and row.torch and row.date for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "0"], "batches must be at least 1, got 0"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--size", "32"], "size must be at least 64, got 32"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--networks", "vgg"], "invalid choice: 'vgg'"),
        (["--providers", "fused", "compile"], "providers must include eager, got fused compile"),
    ],
    ids=["batches", "rounds", "size", "threads", "networks", "providers"],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_cpu.main(options)
    assert message in capsys.readouterr().err


def test_the_body_is_fed_what_the_stem_makes(one_thread):
    body, x = cases.prepare(Case("resnet18", "layer1-4", "bfloat16", 2, 64))
    assert x.shape == (2, 64, 16, 16)
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert (x >= 0).all()
    with torch.no_grad():
        assert body(x).shape == (2, 512, 2, 2)
    assert cases.exact_output(body, x).dtype == torch.float64
    assert next(body.parameters()).dtype == torch.bfloat16


def test_memory_is_that_of_a_process_of_its_own():
    ballast = torch.ones(2**28, dtype=torch.uint8)  # the parent's memory must not show in the child's peak
    here = memory.resident_mib("VmHWM")
    figures = memory.measure("resnet18", "fused", "float32", 1, 64, 1, 1)
    assert 40 < figures["state_mib"] < 50
    assert figures["imports_mib"] + figures["state_mib"] + figures["packed_mib"] < figures["peak_rss_mib"] < here
    if torch.backends.mkldnn.is_available():
        assert 35 < figures["packed_mib"] < figures["state_mib"]
    del ballast


def test_memory_that_cannot_be_measured_is_told(monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    rows = bench_cpu.memory_rows(Case("resnet18", size=64), 1, lambda: None)
    assert [(row.provider, row.status, row.peak_rss_mib) for row in rows] == [
        ("eager", "failed", None),
        ("fused", "failed", None),
    ]
    assert rows[0].note.startswith("resnet18 eager float32 1 64 1 ")
    assert "must run, got exit code 1" in rows[0].note
