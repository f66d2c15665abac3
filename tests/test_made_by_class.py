"""Layers that somebody makes by the class of a fused one, as adapters do: `type(layer)(...)`."""

from __future__ import annotations

import pytest
import torch
from frozen_networks import network
from torch import nn

import fused_resblock as frb


def exchange(model: nn.Module) -> None:
    """New layers of the classes that the stem's convolution, the pool and the classifier have."""
    torch.manual_seed(1)
    dtype, wide = model.fc.weight.dtype, model.fc.in_features
    model.conv1 = type(model.conv1)(3, 8, 7, 2, 3, bias=False).to(dtype)
    model.avgpool = type(model.avgpool)(1)
    model.fc = type(model.fc)(wide, 7).to(dtype)
    model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
@pytest.mark.parametrize("calls", [0, 5], ids=["before a call", "behind calls"])
def test_layers_of_a_stem_and_a_head(calls, frozen, dtype):
    reference = network().to(dtype)
    fused, x = frb.fuse(reference, frozen=frozen), torch.randn(2, 3, 20, 20, dtype=dtype)

    def check() -> list[bool]:
        for _ in range(5):
            torch.testing.assert_close(fused(x), reference(x), rtol=2e-2, atol=2e-2)
        return [part.fused for part in frb.explain(fused).parts if "Conv2d" in part.modules]

    with torch.no_grad():
        for _ in range(calls):
            fused(x)
        exchange(fused), exchange(reference)
        assert check() == [False]
        frb.fuse(fused, frozen=frozen, inplace=True)
        assert check() == [True]
