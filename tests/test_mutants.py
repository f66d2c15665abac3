"""The mutants themselves: their texts are current, the hunt tells a killed one from one that lives."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from cases import BACKENDS, FP32, ConvCase, require
from mutant import ROOT, Mutant
from mutants import STALE, SURVIVED, hunt
from mutants_table import MUTANTS

from fused_resblock.functional import conv_bn_act


@pytest.mark.parametrize("mutant", [pytest.param(m, id=f"{m.file}: {m.name}") for m in MUTANTS])
def test_text_stands_exactly_once(mutant):
    assert not mutant.stale()
    assert mutant.old != mutant.new
    for killer in mutant.killers:
        file, _, test = killer.partition("::")
        assert f"def {test.split('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


def test_no_part_of_the_table_hides_another():
    every = {(mutant.file, mutant.name) for mutant in MUTANTS}
    for path in sorted((ROOT / "tests").glob("mutants_*.py")):
        module = importlib.import_module(path.stem)
        parts = [value for name, value in vars(module).items() if name.isupper() and isinstance(value, dict)]
        assert all((file, name) in every for part in parts for file, faults in part.items() for name, *_ in faults)


def test_names_are_unique_in_a_file():
    assert len({(m.file, m.name) for m in MUTANTS}) == len(MUTANTS)


CHEAP = next(m for m in MUTANTS if m.name == "residual sign")


def test_a_harmless_change_survives():
    harmless = Mutant("harmless", CHEAP.file, CHEAP.old, CHEAP.old + " ", CHEAP.killers)
    assert hunt(harmless, harmless.killers)[0] == SURVIVED


def test_no_test_is_no_kill():
    assert hunt(CHEAP, ["tests/test_conv_bn_act.py::test_of_no_such_name"])[0].startswith(SURVIVED)


def test_text_that_is_gone_is_stale():
    assert hunt(Mutant("gone", CHEAP.file, "no such text", "", CHEAP.killers), CHEAP.killers)[0] == STALE


def test_a_mutant_is_killed_and_by_whom_and_the_working_tree_is_left_alone():
    before = (ROOT / CHEAP.file).read_bytes()
    command = [sys.executable, str(ROOT / "tests" / "mutants.py"), "residual sign"]
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 of 1 mutants killed" in result.stdout
    assert "test_tiles.py::test_without_tma[residual]" in result.stdout
    assert (ROOT / CHEAP.file).read_bytes() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_edit_of_one_number_is_seen(backend):
    """Neither the address nor the sampled words of a weight change: only its version does."""
    require(backend)
    args = ConvCase(channels=32, out_channels=32).build(FP32)
    before = conv_bn_act(**args, backend=backend)
    args["weight"][5, 7, 1, 1].add_(100.0)
    assert not torch.equal(conv_bn_act(**args, backend=backend), before)
