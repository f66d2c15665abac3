"""Blocks and networks whose forward has more arguments than the image: called with one, the others have defaults."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def added(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x


class Optional(Base):
    def forward(self, x, last=None):
        y = self.added(x)
        return F.relu(y) if last is None else y


class Flag(Base):
    def forward(self, x, plain=False):
        return F.relu(self.added(x)) if plain is False else self.added(x)


class KeywordOnly(Base):
    def forward(self, x, *, tap=None):
        y = self.added(x)
        return F.relu(y) if tap is None else y


class Named(Base):
    def forward(self, x, act="relu"):
        return {"relu": F.relu}.get(act, lambda t: t)(self.added(x))


class Network(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.block = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), block

    def forward(self, x, twice=None):
        y = self.block(self.relu(self.bn(self.conv(x))))
        return y if twice is None else self.block(y)


@pytest.mark.parametrize("options", [{}, {"frozen": True}], ids=["", "frozen"])
@pytest.mark.parametrize("cls", [Optional, Flag, KeywordOnly, Named])
def test_defaults_are_taken(cls, options):
    reference = randomize_norms(Network(cls())).eval()
    fused = frb.fuse(reference, strict=True, **options)
    assert [report.fused for report in frb.explain(fused)] == [True]
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(1, 3, 8, 7)
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fused(x, True), reference(x, True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [(Optional, {"last": 1}), (Flag, {"plain": True}), (KeywordOnly, {"tap": 1}), (Named, {"act": "none"})],
)
def test_arguments_that_are_given_are_obeyed(cls, arguments):
    reference = randomize_norms(cls()).eval()
    fused, x = frb.fuse(reference), torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        fused(x)
        torch.testing.assert_close(fused(x, **arguments), reference(x, **arguments), rtol=1e-4, atol=1e-4)
        assert not torch.equal(fused(x), fused(x, **arguments))
