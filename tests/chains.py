"""Chains of bottlenecks whose tails may run as one kernel, and how many of them do."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn

from fused_resblock import stage as stages
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock, Bottleneck


def downsample(inplanes: int, outplanes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


def first(inplanes: int = 32, stride: int = 2, **options) -> Bottleneck:
    return Bottleneck(inplanes, 16, stride, downsample(inplanes, 64, stride), **options)


def identity(**options) -> Bottleneck:
    return Bottleneck(64, 16, **options)


#: chains, and how many of their blocks end in the kernel
CHAINS = {
    "layer": (lambda: [first(), identity(), identity()], 3),
    "identity blocks": (lambda: [identity(), identity()], 2),
    "no stride": (lambda: [first(stride=1), identity()], 2),
    "mixed kinds": (lambda: [BasicBlock(64, 64), identity(), BasicBlock(64, 64), identity()], 2),
    "basic blocks": (lambda: [BasicBlock(64, 64), BasicBlock(64, 64)], 0),
    "dilation": (lambda: [identity(dilation=2), identity()], 1),
    "groups": (lambda: [identity(groups=2, base_width=32), identity(groups=2, base_width=32)], 0),
    "12 channels": (lambda: [Bottleneck(48, 12), Bottleneck(48, 12)], 0),
    "other widths": (lambda: [Bottleneck(64, 16), Bottleneck(64, 16, base_width=128), Bottleneck(64, 16)], 3),
}
PARAMS = [pytest.param(*chain, id=name) for name, chain in CHAINS.items()]
X = torch.randn(2, 64, 6, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
CLOSE = {"rtol": 1e-4, "atol": 1e-4} if DEVICE == "cpu" else {"rtol": 1e-2, "atol": 1e-2}  # TF32 on a GPU


def chain(make) -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(nn.Sequential(*make())).eval().to(DEVICE)


def image_for(model: nn.Module) -> Tensor:
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    return torch.randn(2, channels, 6, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def merged(fused: nn.Module) -> int:
    """How many operations of the chain's last program are the kernel."""
    (program,) = stages._programs[fused]
    return program.tails
