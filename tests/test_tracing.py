"""What `fuse` and `explain` leave behind in the objects and hooks that a network's forward feeds: nothing."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import Tensor, fx, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock


class Features:
    """Collects what passes by, as timm's feature hooks do."""

    def __init__(self) -> None:
        self.by_device: dict = defaultdict(list)
        self.seen: list = ["nothing"]
        self.last: object = "nothing"

    def hook(self, module: nn.Module, args: tuple, y: Tensor) -> None:
        self.by_device[y.device].append(y)

    def collect(self, y: Tensor) -> None:
        self.last = self.by_device[y.shape] = y
        self.seen.append(y)


class Network(nn.Module):
    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.features = Features()
        if hooked:
            for module in (self.layer1[0].conv1, self.layer1[1], self.bn1):
                module.register_forward_hook(self.features.hook)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer1(self.relu(self.bn1(self.conv1(x))))
        self.features.collect(y)
        return y


@pytest.mark.parametrize("action", [frb.fuse, frb.explain, lambda m: frb.explain(frb.fuse(m, frozen=True))])
@pytest.mark.parametrize("hooked", [False, True], ids=["in its forward", "in hooks"])
def test_objects_of_the_network_keep_nothing(hooked, action):
    network = randomize_norms(Network(hooked)).eval()
    action(network)
    features = network.features
    assert (dict(features.by_device), features.seen, features.last) == ({}, ["nothing"], "nothing")
    copy.deepcopy(network)
    fused, x = frb.fuse(network), torch.randn(1, 3, 7, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), network(x), rtol=1e-4, atol=1e-4)
    for model in (network, fused):
        kept = [model.features.last, *model.features.seen, *model.features.by_device]
        assert not any(isinstance(item, fx.Proxy) for item in kept)
        assert model.features.seen[1:] == [model.features.last]


def test_hooks_do_not_run():
    network, ran = Network(False).eval(), []
    for module in network.modules():
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
        module.register_forward_hook(lambda module, args, y: ran.append(module))
    frb.explain(frb.fuse(network))
    assert ran == []


def test_networks_whose_features_are_collected_by_hooks():
    timm = pytest.importorskip("timm")
    network = randomize_norms(timm.create_model("xception41", features_only=True, pretrained=False)).eval()
    fused, x = frb.fuse(network), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(fused(x), network(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
