"""Result files of the GPU runner: rows on disk at once, resumed, and never mixed up."""

from pathlib import Path

import pytest

from benchmarks.gpu.records import Records, read_json, write_json

ROOT = Path(__file__).parents[1]
MARKS = {"gpu": "g", "torch": "2.11", "triton": "3.6", "commit": "abc"}


def table(path, marks=MARKS):
    return Records(path, ("case",), ("status", "value", "note"), marks)


def test_rows_are_on_disk_at_once_and_are_found_again(tmp_path):
    path = tmp_path / "a.csv"
    table(path).add(case="one", status="ok", value=1.23456789)
    again = table(path)
    assert again.done("one")
    assert not again.done("two")
    assert again.rows() == [{"case": "one", "status": "ok", "value": "1.23457", "note": "", **MARKS}]


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


def test_what_ran_when_its_process_was_ended_is_a_crash(tmp_path):
    path = tmp_path / "a.csv"
    table(path).add(case="zero", status="ok")
    with table(path).running(case="one"):
        note = next(file for file in tmp_path.iterdir() if file != path)
        text = note.read_text()
    assert not note.exists()
    note.write_text(text)  # as a process leaves it that is killed
    assert not table(path, MARKS | {"commit": "other"}).done("one")
    note.write_text(text)
    assert {row["case"]: row["status"] for row in table(path).rows()} == {"zero": "ok", "one": "crash"}
    assert table(path).done("one")
    assert not note.exists()


def test_an_error_is_no_end_of_a_process(tmp_path):
    with pytest.raises(KeyError), table(tmp_path / "a.csv").running(case="one"):
        raise KeyError
    assert not table(tmp_path / "a.csv").done("one")


def test_a_quote_that_went_astray_costs_one_row(tmp_path):
    path = tmp_path / "a.csv"
    for case in ("one", "two", "three"):
        table(path).add(case=case, status="ok")
    path.write_text(path.read_text().replace("two,", 'two",').replace("one,", '"one,'))
    table(path).add(case="four", status="ok")
    found = table(path)
    assert [found.done(case) for case in ("one", "three", "four")] == [False, True, True]


@pytest.mark.parametrize("time", ["nan", "inf", "9.1.2"])
def test_times_that_are_none_do_not_count(tmp_path, time):
    def timed() -> Records:
        return Records(tmp_path / "a.csv", ("case",), ("status", "median_us"), MARKS)

    timed().add(case="one", status="ok", median_us=1.5)
    timed().add(case="two", status="ok", median_us=2.5)
    (tmp_path / "a.csv").write_text((tmp_path / "a.csv").read_text().replace("2.5", time))
    assert [row["case"] for row in timed().rows()] == ["one"]
