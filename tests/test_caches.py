"""Folded and repacked weights: freed with what they were made of, and made again when they are gone."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import zoo
from torch import nn

import fused_resblock as frb
from fused_resblock import backends
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock, ResidualBlock


def made(backend: str = "auto") -> nn.Module:
    """A fused model of a drop-in class and a class of a user's own, which has run once."""
    reference = nn.Sequential(BasicBlock(8, 8), zoo.PooledShortcut(), ResidualBlock(12, 8))
    fused = frb.fuse(randomize_norms(reference).eval(), backend=backend)
    with torch.no_grad():
        fused(torch.randn(1, 8, 5, 5))
    return fused


def cached() -> int:
    """How many folded or repacked weights are kept."""
    caches = backends.onednn._packed, backends.triton._weights, backends.triton._affines, backends.cudnn._folded
    return sum(map(len, caches))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_memory_is_freed_with_the_model(backend):
    frb.clear_caches()
    fused = made(backend)
    assert cached() > 0
    blocks = [weakref.ref(m) for m in fused.modules()]
    del fused
    gc.collect()
    assert [r() for r in blocks if r() is not None] == []
    assert cached() == 0


def test_no_growth_over_many_calls():
    fused = made()
    with torch.no_grad():
        before = cached()
        for size in range(4, 12):
            fused(torch.randn(1, 8, size, size))
            fused[0].bn1.running_mean.add_(0.1)
    assert cached() == before


def test_clear_caches():
    fused, x = made(), torch.randn(2, 8, 7, 6)
    with torch.no_grad():
        expected = fused(x)
        frb.clear_caches()
        assert cached() == 0
        assert torch.equal(fused(x), expected)


def test_a_norm_that_is_gone_takes_its_folded_weights_along():
    frb.clear_caches()
    weight, x = torch.randn(8, 8, 3, 3), torch.randn(1, 8, 5, 5)
    norm = frb.functional.BatchNorm(torch.zeros(8), torch.ones(8))
    for backend in ("onednn", "triton"):
        frb.functional.conv_bn_act(x, weight, norm=norm, backend=backend)
    assert cached() > 0
    del norm
    gc.collect()
    weights = len(backends.triton._weights)  # repacked alone
    assert cached() == weights
