"""Tails of bottlenecks whose output takes the place of their residual: where it may, and where somebody reads that yet."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, require
from chains import CHAINS, chain
from torch import Tensor, nn

import fused_resblock as frb


class OwnResidual(nn.Module):
    """Adds what its 3x3 reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(64, 64, size, padding=size // 2, bias=False) for size in (1, 3, 1)
        )
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(h)).relu()
        return (self.bn3(self.conv3(y)) + h).relu()


@pytest.mark.parametrize(
    ("make", "written"),
    [
        pytest.param(CHAINS["layer"][0], [False, True, True], id="downsample"),
        pytest.param(CHAINS["identity blocks"][0], [False, True], id="the chain's own input"),
        pytest.param(lambda: [OwnResidual(), OwnResidual()], [False, False], id="the 3x3's input"),
    ],
)
def test_output_over_a_residual_that_nobody_reads_any_more(make, written, monkeypatch):
    """Half of what a tail holds otherwise. Of an image of several tiles the 3x3 reads pixels that others write."""
    require("triton")
    from fused_resblock.kernels import stage as kernels

    asked, bind = [], kernels.bind_stage

    def note(*arguments, overwrite):
        asked.append(overwrite)
        return bind(*arguments, overwrite=overwrite)

    monkeypatch.setattr(kernels, "bind_stage", note)
    reference = chain(make)
    fused = frb.fuse(reference, backend="triton", stages="kernel", strict=True)
    x = torch.randn(2, next(reference.parameters()).shape[1], 20, 12, generator=torch.Generator().manual_seed(1)).to(
        DEVICE
    )
    before = x.clone()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)
    assert asked == written
