"""What a forward holds on a GPU, counted on a machine without one."""

from __future__ import annotations

import csv

import pytest
import torch
from compiling import run
from frozen_networks import Network, functions, network
from torch import Tensor, nn

import fused_resblock as frb
from benchmarks import activations
from benchmarks.results import FOLDER
from fused_resblock import backends
from fused_resblock.backends import cudnn, triton
from fused_resblock.reference import BasicBlock


def kept() -> list[dict[str, str]]:
    with activations.RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_kept_table_is_what_is_counted(tmp_path):
    """It covers every network; two of its lines are counted again."""
    assert {(row["network"], row["batch"]) for row in kept()} == {
        (network, str(batch)) for network in activations.ARCHITECTURES for batch in activations.BATCHES
    }
    out = tmp_path / "again.csv"
    arguments = ["--networks", "resnet18", "resnet50", "--batches", "32", "--out", str(out)]
    done = run(f"from benchmarks.activations import main; main({arguments})")  # kernels as they are when compiled
    assert done.returncode == 0, done.stderr
    with out.open(newline="", encoding="utf-8") as file:
        again = list(csv.DictReader(file))
    assert len(again) == 2
    assert [row for row in again if row not in kept()] == []


def test_eager_is_counted_as_it_was_measured():
    """From batch 32 on; below, a GPU's allocator and cuDNN's workspaces count for something."""
    counted = {(row["network"], row["batch"]): float(row["eager_mib"]) for row in kept()}
    measured = 0
    for path in sorted(FOLDER.glob("*/bench.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                case = row["network"], row["batch"]
                measured_as = [row[name] for name in ("part", "dtype", "group", "provider")]
                told = measured_as == ["whole", "fp16", "main", "eager"] and row["extra_mib"]
                if told and case in counted and int(row["batch"]) >= 32:
                    measured += 1
                    assert counted[case] == pytest.approx(float(row["extra_mib"]), rel=0.03), case
    assert measured >= 10


def test_a_forward_holds_at_most_seven_tenths():
    """At every batch."""
    assert {int(row["batch"]) for row in kept()} == {1, 32, 128}
    for row in kept():
        eager, fused, frozen = (float(row[name]) for name in ("eager_mib", "fused_mib", "frozen_mib"))
        assert frozen <= fused <= 0.7 * eager


def test_everything_is_computed_again_behind_it():
    x = torch.ones(1, 1, 2, 2)
    with activations.nothing_computed():
        assert backends.may_be_triton("auto", x.device)
        assert torch.nn.functional.conv2d(x, x, None, (1, 1), (0, 0), (1, 1), 1).shape == (1, 1, 1, 1)
        assert (triton.unavailable(), cudnn.unavailable()) == (None, None)
    assert torch.nn.functional.conv2d(x, x).item() == 4
    assert not backends.may_be_triton("auto", x.device)
    assert cudnn.unavailable() is not None or torch.cuda.is_available()


def test_a_function_holds_nothing_that_has_been_read():
    """Unlike a forward, whose variables hold each chain's input: here the second block of a chain takes the most."""

    class Chains(Network):
        def forward(self, x: Tensor) -> Tensor:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            x = self.layer1(x)
            x = self.layer2(x)
            return self.avgpool(x)

    torch.manual_seed(0)
    model = network(cls=Chains)
    wider = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32))
    smaller = nn.Sequential(nn.Conv2d(32, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    model.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 32, 1, wider)).eval()
    model.layer2 = nn.Sequential(BasicBlock(32, 8, 2, smaller), BasicBlock(8, 8)).eval()
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    used = {}
    for promised in (False, True):
        fused = frb.fuse(model, frozen=promised)
        with torch.no_grad():
            for _ in range(6):
                fused(x)
            used[promised] = activations.allocated(lambda fused=fused: fused(x))[1]
        assert bool(functions(fused)) == promised
    assert used[True] <= used[False] - 4 * 8 * 16 * 16 * 4


def test_bad_batches_are_told(capsys):
    with pytest.raises(SystemExit):
        activations.main(["--batches", "0"])
    assert "batches must be at least 1, got 0" in capsys.readouterr().err
