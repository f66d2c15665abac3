"""The goals on a GPU, judged by rows made up for it."""

from __future__ import annotations

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
    planned = [goals.Of("resnet18", "whole", dtype, batch) for dtype in ("fp16", "bf16") for batch in (1, 32)]
    rows = [row("cudnn", 2.0, network="resnet18", batch=32), row("fused", 1.0, network="resnet18", batch=32)]
    assert verdict(rows, "every network", planned) == ("2x (worst of 1, 3 not measured)", "yes so far")
    rows += [row(name, 1.0, network="resnet18", dtype="bf16", batch=1) for name in ("cudnn", "fused")]
    assert verdict(rows, "other networks", planned) == ("2x (worst of 1, 1 not measured)", "yes so far")
    rows += [row("cudnn", 1.0, network="resnet18", batch=1), row("fused", 2.0, network="resnet18", batch=1)]
    assert verdict(rows, "every network", planned) == ("0.5x (worst of 3, 1 not measured; met by 2)", "no")


def test_most_is_more_than_half():
    rows = [row("cudnn", ms, part=f"layer{n}.0") for n, ms in ((1, 2.0), (2, 1.0), (3, 2.0), (4, 1.1))]
    rows += [row("fused", 1.0, part=f"layer{n}.0") for n in (1, 2, 3, 4)]
    assert verdict(rows, "most blocks") == ("1x (worst of 4; met by 2)", "no")
    rows += [row("cudnn", 1.3, part="layer1.1"), row("fused", 1.0, part="layer1.1")]
    assert verdict(rows, "most blocks") == ("1x (worst of 5; met by 3)", "yes")
    assert verdict(rows, "every block") == ("1x (worst of 5)", "yes")


def test_the_bandwidth_of_convolutions_that_memory_binds():
    rates = {"H100": {"copy_tb_per_s": 2.0, "bf16_matrix_tflops": 800.0}}
    made = {"dtype": "fp16", "batch": "128", "backend": "triton", "status": "ok", "gpu": "H100"}

    def timed(case, us, tb, tflops, **other):
        return {**made, "case": case, "median_us": str(us), "tb_per_s": str(tb), "tflops": str(tflops), **other}

    rows = [timed("a", 9, 1.0, 10), timed("a", 6, 1.5, 15), timed("a", 10, 0.9, 9), timed("products", 5, 1.0, 500)]
    rows += [timed("b", 1, 1.9, 1, backend="cudnn"), timed("b", 1, 1.9, 1, batch="1"), timed("b", 1, 1.9, 1, gpu="L4")]
    rows += [timed("b", 1, 1.9, 1, dtype="tf32"), timed("b", "", "", "", status="failed"), timed("b", 1, 0.5, 1)]
    assert bandwidth.shares(rows, rates) == [0.75, 0.25]
    _, line = goals.besides([], bandwidth.shares(rows, rates))
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
