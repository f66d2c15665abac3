"""Tables with a row a compiled kernel: rows come back with their values, and only where it is known what made them."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

from benchmarks import kernel_table as table

ROW = {
    "triton": "3.7.1",
    "capability": 90,
    "dtype": "fp16",
    "kernel": "stem",
    "case": "7x7",
    "tile": "",
    "registers": 80,
    "max_nan": True,
}
KEY = ("90", "fp16", "stem", "7x7", "")


def test_rows_come_back(tmp_path):
    file = tmp_path / "new" / "codegen.csv"
    table.write(file, [ROW, {**ROW, "dtype": "bf16", "max_nan": False}], ["ABC", "DEF"])
    kept = table.read_kept(file)
    assert kept[KEY] == ("ABC", ROW)
    assert kept["90", "bf16", "stem", "7x7", ""] == ("DEF", {**ROW, "dtype": "bf16", "max_nan": False})
    assert table.read(file)[KEY]["registers"] == "80"
    assert table.key_of(SimpleNamespace(**ROW)) == KEY


def test_a_row_of_unknown_origin_is_not_kept(tmp_path):
    file = tmp_path / "codegen.csv"
    table.write(file, [ROW, {**ROW, "dtype": "bf16"}], ["ABC", "DEF"])
    origins = json.loads((tmp_path / "codegen.inputs.json").read_text())
    del origins[" ".join(KEY)]
    (tmp_path / "codegen.inputs.json").write_text(json.dumps(origins))
    assert [key[1] for key in table.read_kept(file)] == ["bf16"]
    (tmp_path / "codegen.inputs.json").unlink()
    assert table.read_kept(file) == {}
    assert len(table.read(file)) == 2


def test_no_table_is_an_empty_one(tmp_path):
    assert table.read(tmp_path / "none.csv") == table.read_kept(tmp_path / "none.csv") == {}


def test_the_pinned_triton_needs_no_version_in_the_name():
    (pinned,) = re.findall(r"^triton==(\S+)$", table.CONSTRAINTS.read_text(), re.MULTILINE)
    assert table.table_of("codegen", pinned).name == "codegen.csv"
    assert table.table_of("codegen", "3.6.0").name == "codegen-triton-3.6.0.csv"
