"""Autograd on a CPU: which calls run the plan, and that nothing is packed more often than it has to be."""

from __future__ import annotations

import pytest
import torch
from frozen_networks import images, network
from torch import nn

import fused_resblock as frb
from fused_resblock.backends import layouts
from fused_resblock.reference import BasicBlock
from fused_resblock.runner import Runner


@pytest.fixture
def plans(monkeypatch) -> list[str]:
    """The backend of every plan that runs under autograd."""
    found: list[str] = []
    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, x, backend: found.append(backend) or run(self, x, backend))
    return found


@pytest.fixture
def packs(monkeypatch) -> list[object]:
    """Every packing of a weight."""
    found: list[object] = []
    fold = layouts.fold
    monkeypatch.setattr(layouts, "fold", lambda conv, dtype: found.append(conv) or fold(conv, dtype))
    return found


def test_trained_weights_run_the_own_forward(plans):
    reference = network()
    fused, x = frb.fuse(reference), images()
    for model in (reference, fused):
        model(x).sum().backward()
    assert plans == []
    for ours, theirs in zip(fused.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("backend", ["onednn", "eager", "triton"])
def test_backend_that_is_asked_for_runs(plans, backend):
    frb.fuse(network(), backend=backend)(images()).sum().backward()
    assert plans == [backend] * 5


def test_backend_of_the_environment_runs(plans, monkeypatch):
    fused = frb.fuse(network())
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "onednn")
    fused(images())
    assert len(plans) == 5


@pytest.mark.parametrize("backend", ["auto", "onednn"])
def test_weights_that_stay_are_packed_once(plans, packs, backend):
    fused, x = frb.fuse(network(), backend=backend), images()
    if backend == "auto":
        fused.requires_grad_(False)
    else:
        x.requires_grad_()
    fused(x)
    first = len(packs)
    y = fused(x)
    if backend != "auto":
        y.sum().backward()
        assert x.grad is not None
    assert len(plans) == 10
    assert first == len(packs) > 0
    with torch.no_grad():
        fused.layer1[0].conv1.weight.mul_(2)
    fused(x)
    assert len(packs) == first + 1


def test_gradients_of_the_input_alone_run_the_own_forward(plans):
    reference = network().requires_grad_(False)
    fused = frb.fuse(reference)
    ours, theirs = images().requires_grad_(), images().requires_grad_()
    fused(ours).sum().backward()
    reference(theirs).sum().backward()
    assert plans == []
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    "x", [torch.randn(1, 9, 5, 5), torch.randn(8, 5, 5), torch.randn(1, 8, 5, 5).double(), torch.ones(1, 8, 5, 5).int()]
)
def test_wrong_input_is_refused_all_the_same(x):
    block: nn.Module = frb.fuse(BasicBlock(8, 8).eval())
    with pytest.raises((ValueError, TypeError), match="^x must"):
        block(x)
