"""A forward that somebody kept and wrapped, as hooks of training libraries do, before the model changed its classes."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn

import fused_resblock as frb


def wrap(module: nn.Module, calls: list[str], name: str) -> None:
    """Call the module's forward of this moment through one of its own."""
    kept = module.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return kept(*args, **kwargs)

    module.forward = types.MethodType(forward, module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
@pytest.mark.parametrize("every", [False, True], ids=["network", "every module"])
def test_unfuse(every, frozen, dtype):
    reference = frb.models.randomize_norms(frb.models.ResNet(frb.reference.Bottleneck, [1, 2, 1, 1], num_classes=5))
    reference = reference.to(dtype).eval()
    x, calls = torch.randn(2, 3, 64, 64, dtype=dtype), []
    fused = frb.fuse(reference, frozen=frozen)
    for name, module in fused.named_modules() if every else [("", fused)]:
        if type(module).forward is not nn.Module.forward:
            wrap(module, calls, name)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x), rtol=2e-2, atol=2e-2)
        calls.clear()
        assert torch.equal(frb.unfuse(fused)(x), reference(x))
    expected = [name for name, module in reference.named_modules() if type(module).forward is not nn.Module.forward]
    assert set(calls) == set(expected if every else [""])


def test_fuse():
    """The forward of before runs the network's own code, which calls blocks that are fused since."""
    reference = frb.models.randomize_norms(frb.models.resnet18(num_classes=5)).eval()
    fused, calls = frb.fuse(reference), []
    back = frb.unfuse(fused)
    wrap(back, calls, "network")
    wrap(back.layer1[0], calls, "block")
    again = frb.fuse(back, inplace=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), reference(x), rtol=1e-4, atol=1e-4)
    assert set(calls) == {"network", "block"}
    reports = {report.name: report for report in frb.explain(again)}
    assert not reports["layer1.0"].fused
    assert reports["layer1.1"].fused


def lend(module: nn.Module, layer: nn.Module) -> None:
    """Call the module with another weight in a layer of it, which that has for the time of the call alone."""
    own = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        kept = layer.weight
        layer.weight = nn.Parameter(2 * kept)
        y = own(x)
        layer.weight = kept
        return y

    module.forward = forward


@pytest.mark.parametrize("after", [0, 6], ids=["before the first forward", "later"])
@pytest.mark.parametrize("name", ["conv1", "bn1", "front"])
def test_weights_that_a_layer_of_a_stem_has_for_its_call_alone(name, after):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
            self.conv1, self.bn1, self.relu = nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.bn1(self.conv1(self.front(x))))

    reference = frb.models.randomize_norms(Network()).eval()
    fused, x = frb.fuse(reference), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(after):
            fused(x)
        for network in (reference, fused):
            module = getattr(network, name)
            lend(module, module[0] if name == "front" else module)
        for _ in range(3):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
    assert f"the forward of {name} is overridden on the instance" in [part.reason for part in frb.explain(fused).parts]
