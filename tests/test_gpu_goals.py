"""The goals on a GPU, judged by rows made up for it."""

from __future__ import annotations

import pytest

from benchmarks.gpu import bandwidth, goals


def row(
    provider, ms=None, *, network="resnet50", part="whole", dtype="fp16", batch=128, group="main", extra="", status="ok"
):
    return {
        "network": network,
        "part": part,
        "dtype": dtype,
        "batch": str(batch),
        "group": group,
        "provider": provider,
        "status": status,
        "median_ms": "" if ms is None else str(ms),
        "extra_mib": str(extra),
    }


def verdict(rows, text, planned=()):
    (found,) = [line[1:] for line in goals.judge(rows, planned) if line[0].startswith(text)]
    return found


def test_nothing_measured():
    assert {line[1:] for line in goals.judge([])} == {("not measured", "not measured")}


def test_the_best_peer_of_each_group_counts_and_of_the_groups_the_worst():
    rows = [row("eager", 6.0), row("folded", 5.0), row("cudnn+graph", 4.0), row("fused", 3.0), row("fused+graph", 2.0)]
    assert verdict(rows, "ResNet-50, fp16, batch 128") == ("2x", "yes")
    rows += [row(name, ms, group="compile") for name, ms in (("eager", 6.0), ("compile", 2.8), ("fused", 2.0))]
    assert verdict(rows, "ResNet-50, fp16, batch 128") == ("1.4x", "no")
    assert verdict(rows, "every network") == ("1.4x", "yes")


def test_what_failed_has_no_time():
    rows = [row("cudnn", 6.0), row("compile", status="failed"), row("fused", 2.0), row("all", status="measured")]
    assert verdict(rows, "ResNet-50, fp16, batch 128") == ("3x", "yes")
    assert (
        verdict([row("cudnn", 6.0), row("fused", status="failed")], "ResNet-50, fp16, batch 128")[1] == "not measured"
    )


def test_eager_alone_is_no_peer():
    rows = [row("eager", 6.0), row("folded", 5.0), row("cudnn", status="failed"), row("fused", 2.0)]
    assert verdict(rows, "ResNet-50, fp16, batch 128")[1] == "not measured"


def test_the_worst_of_several_cases():
    rows = [row("cudnn", 2.0, network="resnet18", batch=b) for b in (1, 32, 256)]
    rows += [row("fused", ms, network="resnet18", batch=b) for b, ms in ((1, 4.0), (32, 1.0), (256, 1.8))]
    assert verdict(rows, "other networks") == ("1.11x (worst of 2; met by 1)", "no")
    assert verdict(rows, "every network") == ("0.5x (worst of 3; met by 2)", "no")


def test_what_is_planned_and_not_measured_is_told():
    def of(dtype, batch):
        return goals.Of("resnet18", "whole", dtype, batch)

    planned = [(of(dtype, batch), "main") for dtype in ("fp16", "bf16") for batch in (1, 32)]
    planned += [(of("fp16", 32), "compile")]
    end = {"network": "resnet18", "batch": 32, "status": "measured"}
    rows = [row("cudnn", 2.0, network="resnet18", batch=32), row("fused", 1.0, network="resnet18", batch=32)]
    told = "2x (worst of 1; 4 not wholly measured)"
    assert verdict(rows, "every network", planned) == (told, "yes so far"), "the group has not ended"
    rows += [row("all", **end)]
    assert verdict(rows, "every network", planned) == (told, "yes so far"), "compile has not been timed"
    rows += [row("all", **{**end, "status": "oom"}, group="compile")]
    assert verdict(rows, "every network", planned) == ("2x (worst of 1; 3 not wholly measured)", "yes so far")
    assert verdict(rows, "other networks", planned) == ("2x (worst of 1; 1 not wholly measured)", "yes so far")
    rows += [row("cudnn", 1.0, network="resnet18", batch=1), row("fused", 2.0, network="resnet18", batch=1)]
    told = "0.5x (worst of 2; met by 1; 3 not wholly measured)"
    assert verdict(rows, "every network", planned) == (told, "no")
    for dtype, batch in (("fp16", 1), ("bf16", 1), ("bf16", 32)):
        rows += [row("all", **{**end, "batch": batch}, dtype=dtype)]
    assert verdict(rows, "every network", planned) == ("0.5x (worst of 2; met by 1)", "no")


def test_commits_and_groups_are_judged_apart_and_those_of_l2_not_at_all():
    rows = [{**row(name, ms), "commit": "a"} for name, ms in (("cudnn", 4.0), ("fused", 2.0))]
    rows += [{**row(name, ms), "commit": "b"} for name, ms in (("cudnn", 3.0), ("fused", 1.0))]
    assert verdict(rows, "every network") == ("2x", "yes"), "and not 3 over 2"
    rows += [row(name, ms, group="warm") for name, ms in (("cudnn", 1.0), ("fused", 2.0))]
    assert verdict(rows, "every network") == ("2x", "yes")
    graphs = [row("fused+graph", 0.2, batch=1), row("fused+graph", 0.1, batch=1, group="compile")]
    assert verdict(graphs, "ResNet-50, fp16, batch 1,") == ("0.2 ms", "yes")


def test_most_is_more_than_half():
    rows = [row("cudnn", ms, part=f"layer{n}.0") for n, ms in ((1, 2.0), (2, 1.0), (3, 2.0), (4, 1.1))]
    rows += [row("fused", 1.0, part=f"layer{n}.0") for n in (1, 2, 3, 4)]
    assert verdict(rows, "most blocks") == ("1.55x (median of 4; met by 2)", "no")
    to_come = [(goals.Of("resnet50", "layer3.1", "fp16", 128), "main")]
    told = "1.55x (median of 4; met by 2; 1 not wholly measured)"
    assert verdict(rows, "most blocks", to_come) == (told, "no so far")
    rows += [row("cudnn", 1.3, part="layer1.1"), row("fused", 1.0, part="layer1.1")]
    assert verdict(rows, "most blocks") == ("1.3x (median of 5; met by 3)", "yes")
    assert verdict(rows, "every block") == ("1x (worst of 5)", "yes")


def test_the_bandwidth_of_convolutions_that_memory_binds():
    """A reduce, of 10 bytes a pixel and channel of 64; a shortcut of stride 2, of whose input a quarter is read."""
    rates = {"H100": {"copy_tb_per_s": 2.0, "bf16_matrix_tflops": 800.0}}
    made = {"dtype": "fp16", "batch": "128", "backend": "triton", "status": "ok", "gpu": "H100"}
    reduce, wide = "256-64.1x1.s1.g1.plain.56px", "512-512.3x3.s1.g1.plain.7px"
    pixels = 128 * 56**2
    moved = (10 * 64 * pixels + 2 * 64 * 256) / 1e6  # bytes over 1e6 are TB/s over us
    rows = [{**made, "case": reduce, "median_us": str(us)} for us in (200.0, 150.0, 170.0)]
    rows += [{**made, "case": wide, "median_us": "40"}, {**made, "case": "7-7.1x1.s1.g1.plain.7px", "median_us": "1"}]
    for other in ({"backend": "cudnn"}, {"batch": "1"}, {"gpu": "L4"}, {"dtype": "tf32"}, {"status": "failed"}):
        rows += [{**made, "case": reduce, "median_us": "1", **other}]
    assert bandwidth.shares(rows, rates) == [pytest.approx(moved / 150 / 2)]
    for case, elements in (
        ("64-256.1x1.s1.g1.shortcut64.s1.56px", (64 + 64 + 256) * pixels),
        ("128-512.1x1.s1.g1.shortcut256.s2.28px", (128 + 256 + 512) * pixels / 4),
    ):
        share = bandwidth.shares([{**made, "case": case, "median_us": "150"}], rates)
        assert share == [pytest.approx(2 * elements / 150e6 / 2, rel=0.01)]
    _, line = goals.besides([], [0.75, 0.25])
    assert line[1:] == ("0.25x (worst of 2; met by 1)", "no")


def test_blocks_latency_and_memory():
    assert verdict([row("cudnn", 2.0, part="layer1.0"), row("fused", 1.0, part="layer1.0")], "every block") == (
        "2x",
        "yes",
    )
    rows = [row("fused+graph", 0.34, batch=1), row("fused", 0.9, batch=1)]
    assert verdict(rows, "ResNet-50, fp16, batch 1,") == ("0.34 ms", "yes")
    rows = [row("eager", 2.0, extra=1000), row("fused", 1.0, extra=800)]
    assert verdict(rows, "memory") == ("0.8x", "no")


def test_stages_are_held_against_the_same_convolution_by_convolution_in_the_same_run():
    stage = {"part": "layer1", "group": "by-stage"}
    rows = [row("conv-by-conv+graph", 1.4, **stage), row("fused+graph", 1.0, **stage), row("eager+graph", 4.0, **stage)]
    rows += [row("fused+graph", 0.1, part="layer1", group="max-autotune")]
    assert verdict(rows, "layer1 and layer2 of ResNet-50, batch 64 to 256: the time conv") == ("1.4x", "yes")
    rows += [row("max-autotune+graph", 0.19, part="layer1", group="max-autotune")]
    assert verdict(rows, "layer1 and layer2 of ResNet-50, batch 64 to 256: the time of max") == ("1.9x", "no")
    assert verdict(rows, "every block")[1] == "not measured"
    assert verdict([row("fused+graph", 2.8, part="layer1-4", group="by-stage")], "body") == ("2.8 ms", "no")
