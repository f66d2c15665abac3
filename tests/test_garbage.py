"""What traces leave to the garbage collector."""

from __future__ import annotations

import gc
import weakref

import torch
from frozen_networks import network
from odd_blocks import ALL

import fused_resblock as frb


def test_full_collections_are_rare(monkeypatch):
    """They look at every object of the process."""
    full = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda generation=2: full.append(generation) or collect(generation))
    for cls in ALL.values():
        frb.fuse(cls().eval())
    assert full.count(2) < 0.1 * len(ALL)


def test_models_that_come_and_go_are_collected():
    """Frozen ones lie in cycles: tracing must not hide them from the automatic collections."""
    alive: list[weakref.ref] = []
    with torch.no_grad():
        for _ in range(15):
            model = frb.fuse(network(), frozen=True)
            for _ in range(5):
                model(torch.randn(1, 3, 20, 20))
            alive.append(weakref.ref(model))
            del model
    assert sum(reference() is not None for reference in alive) < 13
