"""Edits that a tensor's version does not record, as on a GPU, where no words of memory are compared either."""

from __future__ import annotations

import copy

import pytest
import torch
from frozen_networks import CALLS, Network, images, network
from torch import nn, optim
from torch.nn import functional as F

import fused_resblock as frb
from fused_resblock import touched, watch
from fused_resblock.backends import folding
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock, Bottleneck


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    for module in (folding, watch):
        monkeypatch.setattr(module, "words", lambda tensors: ([], []))


def check(model: nn.Module, x: torch.Tensor) -> None:
    """The model computes what it would compute if it were not fused."""
    with torch.no_grad():
        torch.testing.assert_close(model(x), frb.unfuse(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-5)


def warmed(frozen: bool = False, block: type[nn.Module] = BasicBlock) -> Network:
    """A fused network whose programs are bound."""
    model = frb.fuse(network(block), frozen=frozen)
    with torch.no_grad():
        for _ in range(CALLS):
            model(images())
    return model


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("optimizer", [optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad])
def test_fused_optimizers(optimizer, frozen):
    model, x = warmed(frozen=frozen), images()
    steps = optimizer(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        steps.step()
        steps.zero_grad()
        check(model, x)


def a_block(backend: str) -> tuple[nn.Module, torch.Tensor]:
    """A fused block alone, which the interpreter of Triton runs in little time, bound for its input."""
    torch.manual_seed(0)
    model, x = frb.fuse(randomize_norms(BasicBlock(8, 8)).eval(), backend=backend), torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        model(x)
    return model, x


def test_fused_optimizer_with_triton():
    model, x = a_block("triton")
    model(x).sum().backward()
    optim.SGD(model.parameters(), lr=0.1, fused=True).step()
    check(model, x)


def test_optimizers_of_others_may_use_any_kernel():
    class Unrecorded(optim.Optimizer):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(1.5)

    model = warmed()
    Unrecorded(model.parameters(), {}).step()
    check(model, images())


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_recalibrated_norms(backend):
    model, x = (warmed(), images()) if backend == "auto" else a_block(backend)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean._version for norm in norms]
    for norm in norms:
        norm.train()  # the mode of blocks stays: nothing but their forward can tell
    with torch.no_grad():
        model(x * 3)
    assert [norm.running_mean._version for norm in norms] == before, "if torch records this, nothing here is needed"
    for norm in norms:
        norm.eval()
    check(model, x)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_train_mode_is_time_for_any_edit(block):
    """A CUDA graph of a training step, say, edits without any Python."""
    model = warmed(block=block).train()
    for t in (*model.parameters(), *model.buffers()):
        t.data.mul_(2)
    check(model.eval(), images())


def test_other_models_stay_bound():
    model, other = warmed(), warmed()
    with torch.no_grad():
        model(images())
    guards = [m.guard for m in _programs(model)]
    F.cross_entropy(other(images()), torch.tensor([0, 1])).backward()
    optim.SGD(other.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        model(images())
    assert [m.guard for m in _programs(model)] == guards
    assert all(guard is not None and guard.holds() for guard in guards)


def _programs(model: nn.Module) -> list:
    return [frb.handover.programs[m] for m in model.modules() if m in frb.handover.programs]


def test_views_are_touched_with_their_storage():
    whole, other = torch.zeros(6), torch.zeros(6)
    before, others = touched.when(whole[2:]), touched.when(other)
    touched.touch([whole])
    assert touched.when(whole[2:]) > before
    assert touched.when(other) == others


def test_forgotten_addresses_count_as_touched(monkeypatch):
    tensors = [torch.zeros(3) for _ in range(4)]
    before = [touched.when(t) for t in tensors]
    touched.touch(tensors[:3])
    monkeypatch.setattr(touched, "LIMIT", 2)
    touched.touch(tensors[3:])
    assert all(touched.when(t) > b for t, b in zip(tensors, before, strict=True))
