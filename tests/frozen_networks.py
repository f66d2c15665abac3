"""A small network for the tests of frozen ones, what is asked of it, and fixtures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import flat, watch
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock

CALLS = 4  # until a network is one function


class Network(nn.Module):
    """A ResNet of eight channels."""

    def __init__(self, block: type[nn.Module] = BasicBlock) -> None:
        super().__init__()
        wide = 8 * block.expansion
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        first = nn.Sequential(nn.Conv2d(8, wide, 1, bias=False), nn.BatchNorm2d(wide)) if wide > 8 else None
        second = nn.Sequential(nn.Conv2d(wide, 2 * wide, 1, 2, bias=False), nn.BatchNorm2d(2 * wide))
        self.layer1 = nn.Sequential(block(8, 8, downsample=first), block(wide, 8))
        self.layer2 = nn.Sequential(block(wide, 16, 2, second), block(2 * wide, 16))
        self.layer3 = nn.Sequential(block(2 * wide, 16))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * wide, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def network(block=BasicBlock, cls=Network) -> Network:
    torch.manual_seed(0)
    return randomize_norms(cls(block)).eval().to(memory_format=torch.channels_last)


def images(n: int = 2, size: int = 20, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def functions(model: nn.Module) -> list:
    """The functions that a network has become, one for each signature; None where it runs its own forward."""
    known = flat._flats.get(model)
    old = known is None or not known.holds(model)
    return [] if old else [None if isinstance(f, str) else f for f in known.functions.values()]


def run_in(model: nn.Module, x: Tensor) -> Tensor:
    """The last of several results, which are all the same."""
    with torch.no_grad():
        first = model(x)
        for _ in range(CALLS):
            y = model(x)
            assert torch.equal(y, first)
    return y


def double_weights(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)


def other_state(model: nn.Module) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in state:
        if name.endswith("weight"):
            state[name] *= 1.5
    return state


@pytest.fixture
def frozen() -> nn.Module:
    """A frozen network that has become a function."""
    model = frb.fuse(network(), frozen=True)
    run_in(model, images())
    assert functions(model) != [None]
    assert len(functions(model)) == 1
    return model


@pytest.fixture
def nobody_asks(monkeypatch):
    """Call it, and from then on a question whether something has changed fails the test."""

    def begin():
        monkeypatch.setattr(watch.Guard, "holds", lambda self: pytest.fail("it was asked"))

    return begin
