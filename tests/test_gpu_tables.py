"""The README's tables on GPUs, from the rows that the commands write."""

from __future__ import annotations

import pytest

from benchmarks.gpu_tables import checked, codegen, judged, moved, roofline
from benchmarks.network_tables import by_l2, launched, networks

ROOF = {
    "chip": "H100",
    "network": "resnet50",
    "batch": "128",
    "itemsize": "2",
    "block": "stem and body",
    "eager_us": "6850.7",
    "per_conv_us": "2623.9",
    "stage_us": "1797.7",
    "whole_us": "1567.1",
    "predicted_us": "3855.4",
    "predicted_stage_us": "3371.4",
    "predicted_whole_us": "3400.0",
    "measured_us": "not measured",
}
ROW = {
    "gpu": "H100",
    "torch": "2.11",
    "triton": "3.6",
    "commit": "abc",
    "network": "resnet50",
    "part": "whole",
    "dtype": "fp16",
    "batch": "128",
    "group": "main",
    "status": "ok",
    "provider": "fused+graph",
    "extra_mib": "3",
    "median_ms": "2.5",
}


def test_roofline_shows_networks_in_milliseconds():
    text = roofline([{**ROOF, "block": "l1"}, ROOF])
    assert text.startswith("H100, batch 128, 16-bit elements")
    assert text.splitlines()[-1] == "| resnet50 | 6.85 | 2.62 | 1.80 | 1.57 | 3.86 | 3.37 | 3.40 | not measured | - |"
    assert len(text.splitlines()) == 5
    text = roofline([{**ROOF, "measured_us": "6742.8"}])
    assert text.splitlines()[-1].endswith("| 3.40 | 6.74 | 0.50 |")


def test_codegen_counts_spills():
    row = {"triton": "3.7.1", "capability": "90", "registers": "128", "shared": "65536", "local": "0", "stack": "0"}
    text = codegen([row, {**row, "registers": "255", "local": "4"}, {**row, "capability": "80"}])
    assert text.splitlines()[-2:] == ["| sm_80 | 1 | 128 | 64 | 0 |", "| sm_90 | 2 | 255 | 64 | 1 |"]


def test_networks_by_gpu():
    eager, failed = (
        {**ROW, "provider": "eager", "extra_mib": "4"},
        {**ROW, "provider": "cudnn+graph", "status": "failed"},
    )
    plain, peer = {**ROW, "provider": "fused"}, {**ROW, "provider": "compile+graph", "median_ms": "5"}
    text = networks([ROW, plain, eager, failed, peer, {**ROW, "provider": "eager+graph", "median_ms": "6"}])
    assert "H100, torch 2.11, Triton 3.6, commit abc" in text
    absent = "not measured"
    cells = [
        "resnet50",
        "whole",
        "fp16",
        "128",
        "6.000",
        absent,
        "5.000",
        absent,
        absent,
        "2.500",
        "2.00x",
        "0.75x",
        "1.00x",
    ]
    assert text.splitlines()[-1] == f"| {' | '.join(cells)} |"


def test_blocks_by_l2_have_tables_of_their_own():
    block = {**ROW, "part": "layer1.0"}
    cold, warm = ({**block, "group": group, "median_ms": ms} for group, ms in (("cold", "0.3"), ("warm", "0.2")))
    assert networks([cold, warm]) == "not measured"
    text = by_l2([block, cold, warm, {**cold, "provider": "eager"}])
    assert [line for line in text.splitlines() if "layer1.0" in line] == [
        f"| resnet50 | layer1.0 | fp16 | 128 | not measured | not measured | {ms} |" for ms in ("0.300", "0.200")
    ]
    assert "L2 cold, CUDA graphs" in text
    assert by_l2([block]) == "not measured"


def test_without_a_graph():
    rows = [
        {**ROW, "provider": name, "median_ms": ms} for name, ms in (("eager", "9"), ("fused", "5"), ("frozen", "4"))
    ]
    text = launched([ROW, *rows, {**rows[1], "part": "layer1"}])
    absent = "not measured"
    assert text.splitlines()[-1] == f"| resnet50 | whole | fp16 | 128 | 9.000 | {absent} | {absent} | 5.000 | 4.000 |"
    assert launched([ROW]) == absent


def test_nothing_was_measured():
    assert checked([]) == moved([]) == roofline([]) == networks([]) == codegen([]) == "not measured"


def test_checks_are_counted_and_a_test_run_says_what_it_said():
    row = {"gpu": "H100", "commit": "abc", "kernel": "stem", "status": "ok", "note": "small"}
    run = {**row, "kernel": "pytest", "status": "failed", "note": "1 failed, 9 passed"}
    *_, stems, tests = checked([row, row, {**row, "status": "wrong"}, run]).splitlines()
    assert stems == "| H100 | abc | stem | 2 | 1 |  |"
    assert tests == "| H100 | abc | pytest | 0 | 1 | 1 failed, 9 passed |"


def test_bytes_are_those_of_a_pixel_and_channel():
    read = 12 * 128 * 28**2 * 128
    row = {"gpu": "H100", "commit": "abc", "launch": "tail.l2.b128", "kernel": "ring", "status": "ok"}
    row |= {"dram_read_bytes": str(read), "dram_write_bytes": str(read / 2)}
    text = moved([row, {**row, "launch": "tail.l2"}, {**row, "status": "failed"}])
    assert text.splitlines()[2:] == ["| 128-512.s1.residual.next128 | ring | H100 | abc | 20.0 | 18.0 | 0.90x |"]


@pytest.mark.parametrize(("share", "met"), [(1.1, "yes"), (1.2, "no"), (None, "not measured")])
def test_bytes_are_a_goal(share, met):
    counted = 2 * 128 * 28**2 * 10 * 128 + 2 * (9 * 128**2 + 2 * 128 * 512)
    row = {"launch": "tail.l2.b128", "status": "ok", "dram_read_bytes": "0"}
    profile = [] if share is None else [{**row, "dram_write_bytes": str(share * counted)}]
    last = judged([ROW], profile).splitlines()[-2]
    shown = "not measured" if share is None else f"{share}x"
    assert last == f"| tails, batch 128: bytes moved over those counted: at most 1.15x | {shown} | {met} |"
