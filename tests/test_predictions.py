"""Predictions held against tiles that were timed, and the designs at two rates of L2."""

from __future__ import annotations

import csv
from dataclasses import replace
from statistics import median

import pytest

from benchmarks import l2_rates, predictions, roofline
from benchmarks.gpu.space import chosen, distinct_shapes, key_of
from benchmarks.gpu_tables import l2_rates as l2_table
from benchmarks.gpu_tables import predictions as table
from benchmarks.result_tables import read_table
from fused_resblock.kernels.choice import chip_of
from fused_resblock.kernels.cost import Ceilings

SHAPE = next(shape for shape in distinct_shapes() if shape.kernel == 3 and shape.channels == 256)
CHIP = chip_of(predictions.H100)


def row(tile: object, us: float, case: str = key_of(SHAPE), **other: str) -> dict[str, str]:
    made = {"backend": "triton", "case": case, "dtype": "fp16", "batch": "128", "status": "ok", "gpu": "H100"}
    return {**made, "tile": str(tile), "median_us": str(us), **other}


def test_what_is_picked_is_held_against_the_fastest():
    picked, other = chosen(SHAPE, 128, "fp16", predictions.H100), "64x64x64.w4.s2"
    rows = [row(picked, 50.0), row(other, 40.0), row(other, 1.0, status="failed"), row(other, 1.0, backend="cudnn")]
    rows += [row(other, 1.0, case="7-7.3x3.s1.g1.plain.5px")]
    tiles = list(predictions.timed(rows))
    assert [(tile.us, tile.picked) for tile in tiles] == [(50.0, True), (40.0, False)]
    (line,) = predictions.summary(tiles, CHIP)
    assert line[:5] == ["H100", "convolutions", "fp16", 128, 2]
    assert line[6:] == [1, 1, "1.250", "1.250"]
    assert float(line[5]) == pytest.approx(sum(tile.over_measured(CHIP) for tile in tiles) / 2, abs=0.01)
    (text,) = table([dict(zip(predictions.HEADERS, map(str, line), strict=True))]).splitlines()[-1:]
    assert text.startswith("| convolutions | fp16 | 128 | 2 |")


def test_tails_are_of_another_kind():
    case = "64-256.s1.residual.next64.56px"
    (tile,) = predictions.timed([row("64x64x64.w4.s3.c2", 240.0, case=case, backend="stage")])
    assert (tile.kind, tile.picked) == ("tails", False)
    (line,) = predictions.summary([tile], CHIP)
    assert line[6:] == [1, 0, "", ""]


def test_without_convolutions_l2_is_what_it_was():
    assert predictions.fitted_l2([], CHIP) == CHIP.l2
    assert predictions.fitted_l2([row("64x64x64.w4.s2", 9.0, batch="1")], CHIP) == CHIP.l2


def test_l2_is_fitted_to_what_was_timed():
    """To convolutions that took what they should at some rate, one of them more and one less."""
    true = replace(CHIP, l2=4.0e12)
    names = ("64x64x64.w4.s2", "64x64x64.w4.s3", "128x64x64.w4.s2")
    made = list(predictions.timed([row(name, 1.0) for name in names]))
    rows = [
        row(name, 1e6 * tile.seconds(true) * off) for name, tile, off in zip(names, made, (0.7, 1.0, 1.5), strict=True)
    ]
    assert predictions.fitted_l2(rows, CHIP) == pytest.approx(4.0e12, rel=0.05)


def test_the_kept_chip_has_the_rate_of_its_convolutions(monkeypatch):
    plain, kept = roofline.read_ceilings(roofline.kept_ceilings()), roofline.kept_chip()
    assert kept.l2 > 1.5 * plain.l2
    assert replace(kept, l2=plain.l2, name=plain.name) == plain
    monkeypatch.setattr(roofline, "kept_ceilings", lambda: None)
    assert roofline.kept_chip() == roofline.NOMINAL


def test_kept_tails_take_what_is_predicted():
    """Those that keep pixels or loads in shared memory, at the ceilings of the chip on which they were timed."""
    path, chip = roofline.kept_ceilings(), roofline.kept_chip()
    rows = [
        line for line in read_table(path.with_name("tune.csv")) if ".t1." in line["tile"] and line["batch"] == "128"
    ]
    tails = [tile for tile in predictions.timed(rows) if tile.kind == "tails"]
    ratios = [tile.over_measured(chip) for tile in tails]
    assert len(ratios) == 20
    assert median(ratios) == pytest.approx(1.0, abs=0.1)
    assert all(0.75 < ratio < 1.25 for ratio in ratios)


def test_designs_at_two_rates(tmp_path, monkeypatch):
    chips = iter(Ceilings(f"H100 ({rate})", 3e12, rate, 700e12, 132) for rate in (4e12, 8e12))
    monkeypatch.setattr(l2_rates, "read_ceilings", lambda path: next(chips))
    monkeypatch.setattr(l2_rates, "kept_chip", lambda: next(chips))
    assert l2_rates.main(["--out", str(tmp_path / "l2.csv")]) == 0
    with (tmp_path / "l2.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [line["l2_tb_per_s"] for line in found] == ["4.0"] * 6 + ["8.0"] * 6
    assert {line["chip"] for line in found} == {"H100"}
    slow, fast = (
        next(line for line in found if line["l2_tb_per_s"] == rate and line["part"] == "layer1")
        for rate in ("4.0", "8.0")
    )
    for name in ("predicted_us", "predicted_stage_us"):
        assert float(fast[name]) < float(slow[name])
    assert float(fast["predicted_whole_us"]) <= float(slow["predicted_whole_us"]) < float(slow["predicted_stage_us"])
    assert slow["measured_us"] == fast["measured_us"] != ""
    assert len(l2_table(found).splitlines()) == 4 + 12
