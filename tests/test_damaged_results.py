"""Files of results, tables of tiles and settings that are damaged, doubled or something else than a file."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import readme_tables, roofline
from benchmarks.result_tables import read_table
from fused_resblock import tuned_file
from fused_resblock.backends import tuned

CHIP = {"gpu": "g", "copy_tb_per_s": 2.0, "l2_copy_tb_per_s": 4.0, "bf16_matrix_tflops": 800.0, "multiprocessors": 132}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a,b\n1,2\n3,4\n", 2),
        ("a,b\n1,2\n3,4", 1),  # it may go on
        ("a,b\n1,2\n3\n", 1),
        ("a,b\n1,2,3\n", 0),
        ("", 0),
    ],
)
def test_rows_that_were_cut_short_do_not_count(tmp_path, text, rows):
    (tmp_path / "x.csv").write_text(text)
    assert len(read_table(tmp_path / "x.csv")) == rows


def test_a_file_that_is_no_table_is_told(tmp_path):
    (tmp_path / "x.csv").write_text('a,b\n"' + "x" * (csv.field_size_limit() + 1) + '"\n')
    with pytest.raises(ValueError, match=r"x\.csv must be a CSV file, got "):
        read_table(tmp_path / "x.csv")


def test_what_a_later_run_has_found_goes(tmp_path):
    (tmp_path / "gpu").mkdir()
    rows = ["kernel,case,status,note,commit", "k,one,error,out of memory,abc", "k,two,ok,,abc", "k,one,ok,,abc"]
    (tmp_path / "gpu" / "check.csv").write_text("\n".join([*rows, "k,one,wrong,,def", ""]))
    found = [(row["case"], row["status"], row["commit"]) for row in readme_tables.load(tmp_path).checks]
    assert found == [("one", "ok", "abc"), ("two", "ok", "abc"), ("one", "wrong", "def")]


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"gpu": "g"'])
def test_ceilings_that_name_no_gpu_are_left_out(tmp_path, text):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "ceilings.json").write_text(text)
    assert readme_tables.load(tmp_path).ceilings == {}


def test_a_demo_that_is_no_object_is_told(tmp_path, capsys):
    (tmp_path / "demo.json").write_text("[]")
    assert readme_tables.main(["--results", str(tmp_path), "--readme", str(tmp_path / "README.md")]) == 2
    assert "demo.json must hold an object, got list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "ceilings must hold an object, got list"),
        ("{", "Expecting property name"),
        (json.dumps({**CHIP, "copy_tb_per_s": 0}), "copy_tb_per_s must be above 0 and finite, got 0"),
        (json.dumps({**CHIP, "multiprocessors": -1}), "multiprocessors must be above 0 and finite, got -1"),
        (None, "No such file"),
    ],
)
def test_ceilings_that_are_none_are_told(tmp_path, text, said, capsys):
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        roofline.main(["--ceilings", str(tmp_path / "c.json"), "--out", str(tmp_path / "out.csv")])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_a_table_that_is_linked_to_stays_where_it_is(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, other = tmp_path / "there" / "t.json", tmp_path / "t.json", tmp_path / "there" / "t.part"
    link.symlink_to(target)
    other.write_text("somebody's")
    tuned_file.Growing(link, torch.device("cpu")).write()
    assert link.is_symlink()
    assert "winners" in json.loads(target.read_text())
    assert other.read_text() == "somebody's"


def test_a_name_that_no_file_can_have_is_told():
    with pytest.raises(ValueError, match="out must be a path, got "):
        tuned_file.path_of("a\0b", torch.device("cpu"))


def test_a_pipe_is_no_table(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="path must hold a table of tuned tiles, got "):
        tuned.load_config(tmp_path)


def test_a_command_whose_output_is_closed():
    command = f"{sys.executable} -m fused_resblock explain --model resnet18 >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
