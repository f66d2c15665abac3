"""Folded and repacked weights: freed with what they were made of, and made again when they are gone."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import zoo
from stem_networks import network
from torch import nn

import fused_resblock as frb
from fused_resblock import backends
from fused_resblock.models import randomize_norms
from fused_resblock.per_module import PerModule, is_kept
from fused_resblock.program import Program
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


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("options", [{}, {"stages": False}, {"stems": False, "heads": False}], ids=str)
def test_memory_is_freed_at_once(options, backend):
    """Where models come and go, they must not pile up until Python looks for cycles."""
    fused = frb.fuse(network(), backend=backend, **options)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for size in (11, 13, 11):
                fused(torch.randn(1, 3, size, size))
        gone = [weakref.ref(thing) for thing in (*fused.modules(), *fused.parameters())]
        del fused
        assert [thing() for thing in gone if thing() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("path", ["", "0", "0.conv1", "0.bn2"])
def test_memory_is_freed_with_a_model_that_hooks_know(path, frozen):
    """As objects do that show which pixels a network looked at: they hold the model, and a hook in it holds them."""
    fused = frb.fuse(randomize_norms(nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))).eval(), frozen=frozen)

    class Shower:
        def __init__(self, model: nn.Module) -> None:
            self.model = model
            model.get_submodule(path).register_forward_hook(self.see)

        def see(self, module, args, y) -> None:
            self.seen = y

    shower = Shower(fused)
    with torch.no_grad():
        for _ in range(5):
            fused(torch.randn(1, 8, 5, 5))
    assert shower.seen is not None
    gone = [weakref.ref(m) for m in fused.modules()]
    del fused, shower
    gc.collect()
    assert [m() for m in gone if m() is not None] == []


def test_memory_of_blocks_that_are_planned_for_eval_mode_is_freed():
    class Dropping(BasicBlock):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            return self.relu(self.bn2(self.drop(self.conv2(self.relu(self.bn1(self.conv1(x)))))) + x)

    fused = frb.fuse(Dropping(8, 8).eval(), strict=True)
    with torch.no_grad():
        fused(torch.randn(1, 8, 5, 5))
    gone = weakref.ref(fused)
    del fused
    gc.collect()
    assert gone() is None


def test_what_was_looked_up_is_not_copied():
    fused = made()
    assert any(is_kept(value) for module in fused.modules() for value in vars(module).values())
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        kept = [value for module in copied.modules() for value in vars(module).values() if is_kept(value)]
        assert kept
        assert all(slot.value is None and slot.owner is None for slot in kept)
        frb.unfuse(copied)
        assert not any(is_kept(value) for module in copied.modules() for value in vars(module).values())


def test_replicas_look_up_for_themselves():
    values, module, replica = PerModule[str]("value"), nn.Module(), nn.Module()
    values[module] = "mine"
    replica.__dict__ = module.__dict__.copy()
    assert values.get(module) == "mine"
    assert values.get(replica) is None
    with pytest.raises(KeyError):
        values[replica]
    values[replica] = "another"
    assert values.get(module) == "mine"


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


@pytest.mark.parametrize("frozen", [False, True], ids=["asked", "frozen"])
def test_programs_go_with_the_caches(frozen):
    fused, images = frb.fuse(network(), frozen=frozen), [torch.randn(1, 3, size, size) for size in (11, 13)]
    others = [weakref.ref(o) for o in gc.get_objects() if type(o) is Program]
    with torch.no_grad():
        for image in images * 6:
            fused(image)
        known = [other() for other in others]
        bound = [weakref.ref(o) for o in gc.get_objects() if type(o) is Program and not any(o is k for k in known)]
        assert bound
        frb.clear_caches()
        for _ in range(3):
            fused(images[0])
    del known
    gc.collect()
    assert [program() for program in bound if program() is not None] == []


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
