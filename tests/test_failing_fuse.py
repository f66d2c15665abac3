"""A `fuse` in place that fails half-way: the model is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_resblock as frb


class NoSubclass:
    def __init_subclass__(cls, **options):
        if cls.__name__.startswith("Fused"):
            raise TypeError("no subclass")


class Stubborn:
    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError("no other class")
        super().__setattr__(name, value)


class UnderivableConv(NoSubclass, nn.Conv2d):
    pass


class UnderivableStage(NoSubclass, nn.Sequential):
    pass


class StubbornConv(Stubborn, nn.Conv2d):
    pass


class StubbornBlock(Stubborn, frb.reference.BasicBlock):
    pass


def resnet(path: str, cls: type) -> nn.Module:
    """A ResNet-18 in which the module of a path is of another class."""
    model = frb.models.resnet18().eval().to(memory_format=torch.channels_last)
    object.__setattr__(model.get_submodule(path), "__class__", cls)
    return model


def state(model: nn.Module) -> list[tuple[object, ...]]:
    return [(module, type(module), dict(vars(module))) for module in model.modules()]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("fused_before", [False, True])
@pytest.mark.parametrize(
    ("path", "cls"),
    [
        ("conv1", UnderivableConv),
        ("layer3", UnderivableStage),
        ("conv1", StubbornConv),
        ("layer2.0", StubbornBlock),
    ],
)
def test_the_model_is_as_it_was(path, cls, fused_before, frozen):
    model = resnet(path, cls)
    if fused_before:
        frb.fuse(model.layer1, inplace=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    before = state(model)
    with pytest.raises((TypeError, AttributeError), match="no subclass|no other class"):
        frb.fuse(model, inplace=True, frozen=frozen)
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(model(x), expected)
