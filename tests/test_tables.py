"""Tables of measured winners: how a convolution is named, what is read, what is refused, which entry counts."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.tables import CONFIGS, Entry, StageEntry, case_name, nearest, read, scratch_us, winner
from fused_resblock.kernels.tiles import StageTile, Tile
from fused_resblock.params import PLAIN, Conv, Epilogue

TILE, STAGE = "128x64x64.w4.s3", "128x64x64.w8.s3.c2.t1"
WINNER = {"dtype": "fp16", "case": "64-64.3x3.s1.g1.plain", "pixels": 3136, "backend": "triton", "tile": TILE}
CONTENT = {
    "gpu": "Test",
    "capability": 90,
    "multiprocessors": 132,
    "winners": [WINNER, {**WINNER, "pixels": 100, "backend": "cudnn", "tile": None}],
    "stages": [{"dtype": "fp16", "case": "c", "pixels": 5, "faster": True, "tile": STAGE}],
}


def write(folder, content) -> object:
    file = folder / "table.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_read(tmp_path):
    table = read(write(tmp_path, CONTENT))
    assert (table.name, table.gpu) == ("Test", Gpu(132, 90))
    entries = table.convolutions["fp16", "64-64.3x3.s1.g1.plain"]
    assert entries == (Entry(3136, "triton", Tile.parse(TILE)), Entry(100, "cudnn", None))
    assert table.stages["fp16", "c"] == (StageEntry(5, True, StageTile.parse(STAGE)),)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="half a file"),
        pytest.param([], id="a list"),
        pytest.param({}, id="nothing"),
        pytest.param({**CONTENT, "winners": None}, id="no winners"),
        pytest.param({**CONTENT, "winners": [{**WINNER, "backend": "tensorrt"}]}, id="unknown backend"),
        pytest.param({**CONTENT, "winners": [{**WINNER, "tile": "128x64"}]}, id="no tile"),
        pytest.param({**CONTENT, "winners": [{**WINNER, "tile": 5}]}, id="a number for a tile"),
        pytest.param({**CONTENT, "winners": [{**WINNER, "pixels": 0}]}, id="no pixels"),
        pytest.param({**CONTENT, "winners": [{**WINNER, "pixels": "many"}]}, id="pixels in words"),
        pytest.param({**CONTENT, "winners": [{**WINNER, "pixels": 1.5}]}, id="half a pixel"),
        pytest.param({**CONTENT, "winners": [{**WINNER, "pixels": float("inf")}]}, id="pixels without end"),
        pytest.param({**CONTENT, "winners": [{**WINNER, "pixels": 10**400}]}, id="more pixels than can be"),
        pytest.param({**CONTENT, "winners": [{**WINNER, "pixels": True}]}, id="pixels or not"),
        pytest.param({**CONTENT, "stages": [{**CONTENT["stages"][0], "faster": "no"}]}, id="faster in words"),
        pytest.param("[" * 100000, id="too deep"),
        pytest.param({**CONTENT, "capability": -3}, id="no such chip"),
        pytest.param({**CONTENT, "multiprocessors": None}, id="no multiprocessors"),
        pytest.param({**CONTENT, "stages": [{"dtype": "fp16"}]}, id="half a stage"),
    ],
)
def test_what_is_no_table(tmp_path, content):
    file = write(tmp_path, content)
    with pytest.raises(ValueError, match=r"^path must name a table of tuned tiles, got .*table\.json: "):
        read(file)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"^path must name a table of tuned tiles, got .*none\.json"):
        read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("conv", "other", "epilogue", "name"),
    [
        (Conv(torch.empty(64, 64, 3, 3), padding=(1, 1)), False, PLAIN, "64-64.3x3.s1.g1.plain"),
        (Conv(torch.empty(256, 64, 1, 1)), True, PLAIN, "64-256.1x1.s1.g1.residual"),
        (
            Conv(torch.empty(32, 4, 3, 3), stride=(2, 1), dilation=(2, 2), groups=8),
            False,
            PLAIN,
            "32-32.3x3.s2x1.d2.g8.plain",
        ),
        (
            Conv(torch.empty(256, 64, 1, 1)),
            True,
            Epilogue(shortcut=Conv(torch.empty(256, 128, 1, 1), stride=(2, 2))),
            "64-256.1x1.s1.g1.shortcut128.s2",
        ),
    ],
)
def test_names(conv, other, epilogue, name):
    assert case_name(conv, torch.empty(1) if other else None, epilogue) == name


@pytest.mark.parametrize(
    ("us", "mib", "backend"),
    [
        pytest.param({"eager": 3.0, "triton": 2.0, "cudnn": 2.5}, 9, "triton", id="the fastest"),
        pytest.param({"triton": 10.0, "cudnn": 9.9}, 0.05, "cudnn", id="worth its few weights"),
        pytest.param({"triton": 10.0, "cudnn": 9.9}, 0.1, "triton", id="not worth its weights"),
        pytest.param({"triton": 108.0, "cudnn": 100.0}, 100, "cudnn", id="much faster"),
        pytest.param({"triton": 107.9, "cudnn": 100.0}, 100, "triton", id="not that much"),
        pytest.param({"eager": 10.1, "cudnn": 10.0, "triton": 30.0}, 1, "eager", id="the fastest of the others"),
        pytest.param({"cudnn": 10.0}, 100, "cudnn", id="nothing else"),
        pytest.param({"cudnn+bn_act": 1.0, "triton": 2.0}, 1, "triton", id="no backend"),
    ],
)
def test_cudnn_wins_where_it_is_worth_a_second_copy_of_the_weights(us, mib, backend):
    assert winner(us, int(mib * 2**20)) == backend


def test_the_winners_of_the_table_that_ships_are_the_winners_of_its_times():
    """But of the few with a note, which says why not."""
    seen = noted = 0
    for file in CONFIGS.glob("*.json"):
        for row in json.loads(file.read_text())["winners"]:
            if "note" in row:
                noted += 1
                continue
            name = re.fullmatch(r"(\d+)-(\d+)\.(\d+)x\3\..*g(\d+)\.[a-z]+(\d*)(?:\.s\d+)?", row["case"])
            if name is not None:  # no stem
                channels, k, r, groups, branch = (int(number or 0) for number in name.groups())
                itemsize = 4 if row["dtype"] == "tf32" else 2
                assert row["backend"] == winner(row["us"], k * (channels // groups * r**2 + branch) * itemsize), row
                seen += 1
    assert seen > 150
    assert noted <= 5


def test_no_table_that_ships_names_a_tile_that_is_refused():
    """On Hopper those of `conv_tma` with fewer than 64 channels."""
    for file in CONFIGS.glob("*.json"):
        table = read(file)
        for entry in (entry for entries in table.convolutions.values() for entry in entries):
            tile = entry.tile
            if tile is not None and tile.persistent and not tile.halo and not tile.ring:
                assert table.gpu.conv_tma_right(tile.block_n), entry


@pytest.mark.parametrize(
    ("split_k", "strided", "us"), [(4, True, 1.5 * 4 * 784 * 128 * 4 / 2**20), (4, False, 0.0), (1, True, 0.0)]
)
def test_partial_sums_cost_where_memory_is_short(split_k, strided, us):
    assert scratch_us(Tile(64, 64, 64, 4, 4, split_k), strided, 784, 128) == pytest.approx(us)


@pytest.mark.parametrize(
    ("pixels", "found"), [(100, 100), (150, 100), (250, 400), (1600, 400), (1601, None), (24, None)]
)
def test_nearest_within_a_factor_of_four(pixels, found):
    entry = nearest([Entry(100, "triton", None), Entry(400, "triton", None)], pixels)
    assert (entry and entry.pixels) == found


@pytest.mark.parametrize(
    ("pixels", "split_k"), [(25, 8), (100, 8), (140, 8), (150, 4), (200, 4), (300, 2), (400, 2), (1600, 1), (9999, 1)]
)
def test_a_split_loop_is_split_less_where_there_are_more_pixels(pixels, split_k):
    entry = Entry(100, "triton", Tile(64, 64, 64, 4, 4, split_k=8))
    assert entry.at(pixels) == Entry(100, "triton", replace(entry.tile, split_k=split_k))


@pytest.mark.parametrize("tile", [None, Tile(64, 64, 64, 4, 4, persistent=2)])
def test_other_tiles_are_those_of_any_number_of_pixels(tile):
    entry = Entry(100, "triton", tile)
    assert entry.at(400) == entry


@given(st.lists(st.integers(1, 10**9), max_size=5), st.integers(1, 10**9))
def test_nearest_is_never_further_than_another(counts, pixels):
    found = nearest([Entry(count, "triton", None) for count in counts], pixels)
    near = [c for c in counts if c <= 4 * pixels and pixels <= 4 * c]
    assert (found is None) == (not near)
    if found is not None:
        assert max(found.pixels / pixels, pixels / found.pixels) == min(max(c / pixels, pixels / c) for c in near)
