"""A network with a stem, three chains and a pool whose forward can be replaced behind the back of whoever traced it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import waiting
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock


def stage(channels: int, out: int, stride: int) -> nn.Sequential:
    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return nn.Sequential(BasicBlock(channels, out, stride, shortcut), BasicBlock(out, out))


class Network(nn.Module):
    """A stem, three chains and a pool; computes whatever `use` says."""

    def __init__(self, use) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3 = stage(8, 8, 1), stage(8, 16, 2), stage(16, 16, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.replace(use)

    def replace(self, use) -> None:
        """What the forward does from now on, behind the back of whoever traced it."""
        self.__dict__["use"] = use

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor):
        return self.use(self, x)


def usual(net: Network, x: Tensor) -> Tensor:
    """The forward that is traced."""
    x = net.stem(x)
    x = net.layer1(x)
    x = net.layer2(x)
    x = net.layer3(x)
    return net.pool(x)


def both(use=usual, **options) -> tuple[Network, Network]:
    """A network and its fused copy, which has run as the traced forward says, and does something else from now on."""
    torch.manual_seed(0)
    reference = randomize_norms(Network(usual)).eval()
    fused = frb.fuse(reference, strict=True, **options)
    with torch.no_grad():
        for _ in range(3):
            fused(images())
    reference.replace(use)
    fused.replace(use)
    return reference, fused


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def equal(ours, theirs, **tolerances) -> None:
    torch.testing.assert_close(
        torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs), **tolerances
    )


def count(monkeypatch) -> list[nn.Module]:
    """The chains that wait from now on, each time that one does."""
    made = []
    begin = waiting._begin
    monkeypatch.setattr(waiting, "_begin", lambda x, stage: (made.append(stage), begin(x, stage))[1])
    return made
