"""A network with a stem for the tests of stems, and what is asked of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock


class Network(nn.Module):
    """A stem, two blocks and a classifier; the stem's settings are the tests'."""

    def __init__(
        self, channels: int = 3, kernel: int = 7, pool: nn.Module | None = None, width: int = 8, **conv
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, kernel, **{"stride": 2, "padding": kernel // 2, "bias": False, **conv})
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool is None else pool
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer1(x).mean((2, 3)))


def network(**settings) -> Network:
    """The reference in eval mode."""
    torch.manual_seed(0)
    return randomize_norms(Network(**settings)).eval()


def same_at_several(fused: nn.Module, model: nn.Module, *size: int) -> None:
    """Hold a fused network to its own forward, at several batches of images."""
    with torch.no_grad():
        for seed in range(6):
            torch.manual_seed(seed)
            x = torch.randn(size)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def parts(model: nn.Module) -> list[str]:
    """The modules of every stem that `explain` lists."""
    return [part.modules for part in frb.explain(model).parts if "blocks" not in part.modules]
