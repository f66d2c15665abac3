"""The goals on a GPU, judged by rows made up for it."""

from __future__ import annotations

from benchmarks.gpu import goals


def row(provider, ms=None, *, network="resnet50", part="whole", batch=128, group="main", extra="", status="ok"):
    return {
        "network": network,
        "part": part,
        "batch": str(batch),
        "group": group,
        "provider": provider,
        "status": status,
        "median_ms": "" if ms is None else str(ms),
        "extra_mib": str(extra),
    }


def verdict(rows, text):
    (found,) = [line[1:] for line in goals.judge(rows) if line[0].startswith(text)]
    return found


def test_nothing_measured():
    assert {line[1:] for line in goals.judge([])} == {("not measured", "not measured")}


def test_the_best_peer_of_each_group_counts_and_of_the_groups_the_worst():
    rows = [row("eager", 6.0), row("folded", 5.0), row("cudnn+graph", 4.0), row("fused", 3.0), row("fused+graph", 2.0)]
    assert verdict(rows, "ResNet-50, batch 128") == ("2x", "yes")
    rows += [row(name, ms, group="compile") for name, ms in (("eager", 6.0), ("compile", 2.8), ("fused", 2.0))]
    assert verdict(rows, "ResNet-50, batch 128") == ("1.4x", "no")
    assert verdict(rows, "every network") == ("1.4x", "yes")


def test_what_failed_has_no_time():
    rows = [row("cudnn", 6.0), row("compile", status="failed"), row("fused", 2.0), row("all", status="measured")]
    assert verdict(rows, "ResNet-50, batch 128") == ("3x", "yes")
    assert verdict([row("cudnn", 6.0), row("fused", status="failed")], "ResNet-50, batch 128")[1] == "not measured"


def test_eager_alone_is_no_peer():
    rows = [row("eager", 6.0), row("folded", 5.0), row("cudnn", status="failed"), row("fused", 2.0)]
    assert verdict(rows, "ResNet-50, batch 128")[1] == "not measured"


def test_the_worst_of_several_cases():
    rows = [row("cudnn", 2.0, network="resnet18", batch=b) for b in (1, 32, 256)]
    rows += [row("fused", ms, network="resnet18", batch=b) for b, ms in ((1, 4.0), (32, 1.0), (256, 1.8))]
    assert verdict(rows, "other networks") == ("1.11x (worst of 2)", "no")
    assert verdict(rows, "every network") == ("0.5x (worst of 3)", "no")


def test_blocks_latency_and_memory():
    assert verdict([row("cudnn", 2.0, part="layer1.0"), row("fused", 1.0, part="layer1.0")], "every block") == (
        "2x",
        "yes",
    )
    rows = [row("fused+graph", 0.34, batch=1), row("fused", 0.9, batch=1)]
    assert verdict(rows, "ResNet-50, batch 1,") == ("0.34 ms", "yes")
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
