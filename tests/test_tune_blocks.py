"""`tune` of whole blocks: what each is timed against, and what the table says then."""

from __future__ import annotations

from functools import partial
from itertools import count

import pytest

pytest.importorskip("triton")

from test_tuning import TAILS, X, machine_with_a_gpu, network, rows  # noqa: F401

import fused_resblock as frb
from fused_resblock import tuning
from fused_resblock.backends import tuned, whole
from fused_resblock.kernels import bottleneck, tables
from fused_resblock.kernels.tables import StageEntry
from fused_resblock.kernels.tiles import StageTile

BLOCK = "16-64.s1.residual.from64"
TILES = [StageTile(128, 64, 64, 8, stages, 4, tma=True, ring=True) for stages in (2, 3)]


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """A kernel that takes every block, and is computed conv by conv; the second tile is wrong."""

    def bind_tile(x, layers, tile, backend="auto"):
        run = whole.apart(x, layers, backend)
        return run if tile == TILES[0] else lambda x, _: 1 + run(x, None)

    monkeypatch.setattr(bottleneck, "refusal", lambda *_: None)
    monkeypatch.setattr(whole, "tiles", lambda x, layers: TILES)
    monkeypatch.setattr(whole, "bind_tile", bind_tile)


def test_a_block_is_held_against_conv_by_conv(tmp_path):
    path = frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    found = rows(path, "stages")
    assert found.keys() == {BLOCK, *TAILS}
    row = found[BLOCK]
    assert (row["pixels"], row["faster"], row["tile"]) == (48, True, str(TILES[0]))
    assert row["us"].keys() == {"block", "apart"}
    assert row["us"]["block"] < row["us"]["apart"]
    ((entry,),) = (found for (_, case), found in tables.read(path).stages.items() if case == BLOCK)
    assert (entry.pixels, entry.faster, entry.tile) == (48, True, TILES[0])


def test_and_against_its_tail_where_that_is_faster(tmp_path, monkeypatch):
    tail = StageEntry(48, True, StageTile(32, 16, 16, 4, 1, 1))
    monkeypatch.setattr(tuned, "lookup_stage", lambda h, conv, case: tail if case in TAILS else None)
    monkeypatch.setattr(whole, "by_tail", partial(whole.by_tail, backend="triton"))
    ticks = count(1)

    def median_us(call):
        call()
        return 1.0 / next(ticks)  # who comes last is the fastest

    monkeypatch.setattr(tuning, "median_us", median_us)
    row = rows(frb.tune(network(), X, out=tmp_path / "t.json", progress=False), "stages")[BLOCK]
    assert row["us"].keys() == {"block", "apart", "tail"}
    assert row["us"]["tail"] < row["us"]["apart"] < row["us"]["block"]
    assert row["faster"] is False


def test_a_block_that_is_known_is_not_timed_again(tmp_path, monkeypatch):
    frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    monkeypatch.setattr(tuning, "median_us", lambda call: pytest.fail("timed again"))
    frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
