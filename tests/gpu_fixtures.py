"""What the tests of the GPU runner share: a context on the stand-in device, and small problems for it."""

from pathlib import Path

import pytest
import torch
from stand_in_device import StandIn

from benchmarks.gpu import (
    bench,
    check,
    networks,
    operations,
    stems,
    tails,
)
from benchmarks.gpu.context import Context
from benchmarks.gpu.deadline import Deadline
from benchmarks.shapes import ConvShape
from fused_resblock import machine, models, reference

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors on several threads mostly wait for one another when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def context(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "stamp", dict)
    stamp = {"commit": "abc", "driver": "1", "torch": "2.11", "triton": "3.6"}
    return Context(StandIn(), tmp_path, Deadline(1000), quick=True, stamp=stamp)


@pytest.fixture
def few_tiles(monkeypatch):
    """One shape, in fp32 alone, no elementwise kernels, no tails and no stem."""
    monkeypatch.setattr(tails, "shapes", lambda quick: [])
    monkeypatch.setattr(tails, "odd_shapes", lambda quick: [])
    monkeypatch.setattr(stems, "sizes", lambda quick: ())
    monkeypatch.setattr(stems, "plan", lambda quick: ())
    monkeypatch.setattr(check, "check_elementwise", lambda *args: None)
    monkeypatch.setattr(check, "shapes", lambda context: [ConvShape("tiny", 16, 16, 4, 3, residual=True)])
    monkeypatch.setattr(check, "DTYPES", {"ieee": operations.DTYPES["ieee"]})


def block(channels=16):
    made = models.randomize_norms(reference.BasicBlock(channels, channels)).eval().requires_grad_(False)
    return made.to(memory_format=torch.channels_last)


@pytest.fixture
def small_bench(monkeypatch):
    """A block under every provider of the main group."""
    monkeypatch.setattr(bench, "prepare", lambda case, *rest: (block(), torch.randn(case.batch, 16, 4, 4)))
    monkeypatch.setattr(
        bench,
        "cases",
        lambda quick, engines=None: iter([networks.Case("resnet18", 2, "layer1.0", size=16, dtype="ieee")]),
    )
