"""The GPU runner's part for whole blocks, on a machine without a GPU: a kernel that is computed conv by conv."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_gpu_tails import context

from benchmarks.gpu import block_shapes, check, launch_each, tails, tune
from benchmarks.gpu.block_shapes import BlockShape
from benchmarks.gpu.records import read_json
from fused_resblock.backends import whole
from fused_resblock.kernels import bottleneck, gpu
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.tables import read

TINY = BlockShape("tiny", 16, 5, outputs=64)


@pytest.fixture
def kernel(context, monkeypatch):
    """A runner for one tiny block, and two tiles, which add what this list holds to what is right."""
    wrong = {}

    def bind_tile(x, layers, tile, backend="auto"):
        run = whole.apart(x, layers, backend)
        return lambda x, _: run(x, None) + wrong.get(str(tile), 0)

    tiles = bottleneck.tiles_for(64, 256, False)[:2]
    monkeypatch.setattr(whole, "bind_tile", bind_tile)
    monkeypatch.setattr(block_shapes, "shapes", lambda quick: [TINY])
    monkeypatch.setattr(BlockShape, "shipped", lambda self, itemsize, gpu: tiles)
    of_tails = tails._tiles
    for name in ("_tiles", "_shipped"):
        monkeypatch.setattr(tails, name, lambda *a: tiles if isinstance(a[1], BlockShape) else of_tails(*a))
    return wrong, tiles


def test_blocks_of_the_networks(monkeypatch):
    monkeypatch.setattr(gpu, "triton_release", lambda: (3, 6))
    monkeypatch.setattr(bottleneck, "gpu_of", lambda device: Gpu(132, 90))
    shapes, odd = block_shapes.shapes(False), block_shapes.odd_shapes(False)
    assert [shape.case() for shape in shapes[:3]] == [
        "64-256.s1.shortcut64.from64",
        "64-256.s1.residual.from256",
        "128-512.s1.residual.from512",
    ]
    assert len({shape.key() for shape in (*shapes, *odd)}) == len(shapes) + len(odd)
    for shape in (*shapes, *odd):
        asked = shape.build(3, torch.float16, "meta")
        x = torch.empty(asked.size, dtype=torch.float16, device="meta")
        for tile in shape.shipped(2, Gpu(132, 90)):
            assert bottleneck.refusal(x, *whole.Layers.of(asked), tile) is None
        assert shape.shipped(2, Gpu(132, 90)) == tails.tiles(shape, "fp16", Gpu(132, 90)) != []
        for itemsize, other in ((4, Gpu(132, 90)), (2, Gpu(108, 80)), (2, Gpu(148, 100))):
            assert shape.shipped(itemsize, other) == []
    monkeypatch.setattr(gpu, "triton_release", lambda: (3, 8))
    assert shapes[0].shipped(2, Gpu(132, 90)) == []


def test_bytes_of_a_block():
    """16 a pixel and channel of the 3x3, the rows between two bands, and filters."""
    pixels, filters = 128 * 56 * 56, 2 * (2 * 256 * 64 + 9 * 64 * 64)
    assert BlockShape("", 64, 56).dram_bytes(128, 2) == pixels * 64 * 16 + pixels * 512 * 2 // 56 + filters


def test_checked_and_tuned(kernel, context):
    _, tiles = kernel
    assert check.run(context) == 0
    rows = check.records(context).rows(kernel="bottleneck_rows")
    assert [(row["tile"], row["status"]) for row in rows] == [(str(tile), "ok") for tile in tiles]
    assert tune.run(context) == 0
    row = next(row for row in read_json(context.folder / "tiles.json")["stages"] if row["case"] == TINY.case())
    assert row["us"].keys() == {"block", "apart"}
    assert row["faster"] == (row["us"]["block"] < tails.MARGIN * row["us"]["apart"])
    assert row["tile"] in map(str, tiles)
    assert any(case == TINY.case() for _, case in read(context.folder / "tiles.json").stages)


def test_a_wrong_tile_fails_the_check(kernel, context):
    wrong, tiles = kernel
    wrong[str(tiles[1])] = 1
    verdicts = check.records(context)
    tails.check(context, verdicts, check.verdict)
    (fault,) = tails.shipped_faults(context, verdicts)
    assert fault.startswith(f"bottleneck_rows ieee 16-64.s1.residual.from64.5px {tiles[1]}: wrong")


def test_a_block_is_faster_only_if_it_is_ahead_of_its_tail_too(kernel, context):
    table = tune.records(context)
    key = {"dtype": "ieee", "case": TINY.key(), "batch": 2, "status": "ok"}
    tile = str(kernel[1][0])
    for backend, name, us in (("block", tile, 5.0), ("apart", "", 9.0)):
        table.add(**key, backend=backend, tile=name, median_us=us)
    (row,) = tails.winners(context, table)
    assert row["faster"] is True
    table.add(**key, backend="tail", tile="", median_us=4.0)
    (row,) = tails.winners(context, table)
    assert row["faster"] is False
    assert row["us"] == {"block": 5.0, "apart": 9.0, "tail": 4.0}


def test_the_time_of_its_tail_is_kept(kernel, context, monkeypatch):
    monkeypatch.setattr(whole, "by_tail", lambda x, layers: whole.apart(x, layers))
    assert check.run(context) == 0
    assert tune.run(context) == 0
    row = next(row for row in read_json(context.folder / "tiles.json")["stages"] if row["case"] == TINY.case())
    assert row["us"].keys() == {"block", "apart", "tail"}
    timed = context.device.timed
    assert tune.run(context) == 0
    assert context.device.timed == timed


def test_what_broke_the_gpu_is_not_met_again(kernel, context, monkeypatch):
    monkeypatch.setattr(whole, "by_tail", lambda *_: pytest.fail("met again"))
    key = {"dtype": "ieee", "case": TINY.key(), "batch": 2}
    tune.records(context).add(**key, backend="tail", tile="", status="crash", note="an illegal instruction")
    assert check.run(context) == 0
    assert tune.run(context) == 0


@pytest.mark.parametrize(("gpu_there", "names"), [(Gpu(132, 90), {"l1.first", "l1", "l2"}), (Gpu(108, 80), set())])
def test_blocks_are_launched_for_the_profiler_where_there_is_a_kernel(gpu_there, names, monkeypatch):
    monkeypatch.setattr(gpu, "triton_release", lambda: (3, 6))
    monkeypatch.setattr(launch_each, "gpu_of", lambda device: gpu_there)
    before_the_stem = itertools.takewhile(lambda launch: launch[0] != "stem", launch_each.launches(False, "cuda"))
    launched = {name.removeprefix("block.") for name, _ in before_the_stem if name.startswith("block.")}
    assert names <= launched
    assert bool(launched) == bool(names)
