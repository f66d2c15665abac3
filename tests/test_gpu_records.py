"""Result files of the GPU runner: rows on disk at once, resumed, and never mixed up."""

from pathlib import Path

import pytest

from benchmarks.gpu.records import Records, read_json, write_json

ROOT = Path(__file__).parents[1]
MARKS = {"gpu": "g", "torch": "2.11", "triton": "3.6", "commit": "abc"}


def table(path, marks=MARKS):
    return Records(path, ("case",), ("status", "value"), marks)


def test_rows_are_on_disk_at_once_and_are_found_again(tmp_path):
    path = tmp_path / "a.csv"
    table(path).add(case="one", status="ok", value=1.23456789)
    again = table(path)
    assert again.done("one")
    assert not again.done("two")
    assert again.rows() == [{"case": "one", "status": "ok", "value": "1.23457", **MARKS}]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_half_written_last_line_is_dropped_and_nothing_else(tmp_path, cut):
    path = tmp_path / "a.csv"
    table(path).add(case="one", status="ok", value="x")
    table(path).add(case="two", status="ok", value="y")
    path.write_bytes(path.read_bytes()[:-cut])
    resumed = table(path)
    assert resumed.done("one")
    assert not resumed.done("two")
    resumed.add(case="two", status="ok", value="z")
    assert [row["value"] for row in table(path).rows()] == ["x", "z"]


def test_a_file_cut_within_its_header_starts_anew(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("case,sta")
    table(path).add(case="one", status="ok")
    assert table(path).done("one")


def test_a_file_with_other_columns_is_set_aside(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("something,else\n1,2\n")
    table(path).add(case="one", status="ok")
    assert (tmp_path / "a.csv.old").read_text() == "something,else\n1,2\n"
    assert table(path).done("one")


@pytest.mark.parametrize("mark", MARKS)
def test_rows_of_another_gpu_version_or_commit_do_not_count(tmp_path, mark):
    path = tmp_path / "a.csv"
    table(path, MARKS | {mark: "other"}).add(case="one", status="ok")
    mine = table(path)
    assert not mine.done("one")
    mine.add(case="one", status="ok")
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("status", ["error", "timeout"])
def test_unfinished_cases_are_tried_again_and_the_last_row_counts(tmp_path, status):
    path = tmp_path / "a.csv"
    table(path).add(case="one", status=status)
    assert not table(path).done("one")
    table(path).add(case="one", status="ok")
    assert [row["status"] for row in table(path).rows()] == ["ok"]


def test_json_is_replaced_whole_and_a_damaged_one_is_empty(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": ')
    assert read_json(path) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
