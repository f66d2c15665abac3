"""`table`: alignment, empty cells, and the check of the rows."""

from __future__ import annotations

import pytest

from fused_resblock.table import format_table


def test_numbers_right_text_left() -> None:
    text = format_table(["name", "ms", "speed-up"], [["a", 1.5, "1.20x"], ["longer", "10.25", "-"]])
    assert text.split("\n") == [
        "name       ms  speed-up",
        "------  -----  --------",
        "a         1.5     1.20x",
        "longer  10.25         -",
    ]


def test_one_word_makes_a_column_text() -> None:
    assert format_table(["value"], [[1], ["none"]]).split("\n") == ["value", "-----", "1", "none"]


def test_none_is_a_dash_and_counts_as_number() -> None:
    assert format_table(["n"], [[None], [12]]).split("\n") == [" n", "--", " -", "12"]


def test_without_rows() -> None:
    assert format_table(["a", "bc"], []) == "a  bc\n-  --"


def test_no_trailing_white_space() -> None:
    assert all(line == line.rstrip() for line in format_table(["a", "b"], [["x", ""], ["y", "long"]]).split("\n"))


def test_ragged_row() -> None:
    with pytest.raises(ValueError, match=r"rows must hold 2 cells each, got 1"):
        format_table(["a", "b"], [["x"]])
