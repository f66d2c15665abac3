"""Where a stem is left alone because it would not be faster as one operation."""

from __future__ import annotations

import pytest
import torch
from stem_networks import network
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import stem as stems
from fused_resblock.models import randomize_norms
from fused_resblock.stem import StemConv


@pytest.fixture
def bound(monkeypatch) -> list[object]:
    """Every stem that is bound, with the rule for small images as it is."""
    monkeypatch.undo()  # what conftest.py sets
    found: list[object] = []
    bind = stems._bind
    monkeypatch.setattr(stems, "_bind", lambda *args: found.append(args) or bind(*args))
    return found


@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
@pytest.mark.parametrize(("size", "pays"), [(20, False), (320, True)])
def test_small_images(size, pays, frozen, bound):
    reference = network()
    fused, x = frb.fuse(reference, frozen=frozen), torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
    assert len(bound) == (pays or frozen)


class Keyword(nn.Module):
    """Is no function, as it is called with more than an image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.body(x) * scale


def test_a_frozen_network_that_is_no_function(bound):
    fused = frb.fuse(Keyword(), frozen=True)
    with torch.no_grad():
        fused(torch.randn(1, 3, 20, 20), scale=2.0)
        assert len(bound) == 0
        fused(torch.randn(1, 3, 320, 320), scale=2.0)
    assert len(bound) == 1


def test_a_larger_image_behind_a_small_one(bound):
    reference = network()
    fused = frb.fuse(reference)
    with torch.no_grad():
        for size in (20, 20, 320, 20):
            x = torch.randn(1, 3, size, size)
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
    assert len(bound) == 1


def test_large_weights_pay(bound):
    """Packing them at every call is what takes time there."""
    conv, relu = nn.Conv2d(512, 64, 3, padding=1), nn.ReLU()
    block = frb.reference.BasicBlock(64, 64)
    fused = frb.fuse(nn.Sequential(nn.Sequential(conv, relu), block).eval())
    with torch.no_grad():
        fused(torch.randn(1, 512, 4, 4))
    assert len(bound) == 1


class Block(nn.Module):
    """Fused with ReLU alone."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.activation = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.b(self.activation(self.a(x))) + x)


def small(convs: int, activation: nn.Module) -> nn.Module:
    """A network of a stem, further convolutions and a block."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    others = nn.Sequential(*(layer for _ in range(convs) for layer in (nn.Conv2d(8, 8, 3), nn.Tanh())))
    return randomize_norms(nn.Sequential(stem, others, Block(activation))).eval()


def joined(model: nn.Module) -> int:
    """How many stems `fuse` makes of a model."""
    fused = frb.fuse(model)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    return sum(isinstance(module, StemConv) for module in fused.modules())


def test_networks_in_nchw_of_which_little_is_fused():
    assert joined(small(3, nn.SiLU())) == 0
    assert joined(small(3, nn.SiLU()).to(memory_format=torch.channels_last)) == 1
    assert joined(small(3, nn.ReLU())) == 1


def test_networks_of_which_half_is_stems():
    model = small(0, nn.SiLU())
    model[1] = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    assert joined(model) == 2
