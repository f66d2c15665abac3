"""Images that are smaller than a filter: a fused block says what its own forward says."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, DEVICE, require
from torch import Tensor, nn

import fused_resblock as frb


class Unpadded(nn.Module):
    """Its first 3x3 takes a border away, and its second one gives it back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=2, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x).relu()


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("chain", [False, True], ids=["block", "chain"])
@pytest.mark.parametrize("size", [(2, 2), (1, 4), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_images_smaller_than_the_filter(backend, size, chain, grad):
    require(backend)
    reference = (nn.Sequential(Unpadded(), Unpadded()) if chain else Unpadded()).eval().to(DEVICE)
    fused, x = frb.fuse(reference, backend=backend, strict=True), torch.randn(2, 8, *size, device=DEVICE)
    with torch.set_grad_enabled(grad):
        for model in (reference, fused):
            with pytest.raises(RuntimeError, match="^Calculated padded input size per channel"):
                model(x)
        assert fused(torch.randn(2, 8, 3, 3, device=DEVICE)).shape == (2, 8, 3, 3)
