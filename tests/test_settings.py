"""Settings of modules in a block that change before its first call, in a copy, or before it is compiled or exported."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms


class Gate(nn.Module):
    """Somebody's own module: the identity until it is switched on."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.parts = ("left", ("right", 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.on or self.scale != 1 or self.parts[0] != "left":
            return x * 2
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.gate(self.bn(self.conv(x))) + x)


def patched(block: nn.Module) -> None:
    before = block.relu.forward
    block.relu.forward = lambda x: before(x) * 3


def doubled(block: nn.Module) -> None:
    before = block.conv._conv_forward
    block.conv._conv_forward = lambda x, weight, bias: before(x, 2 * weight, bias)


CHANGES = {
    "a flag": lambda b: setattr(b.gate, "on", True),
    "what the class sets": lambda b: setattr(b.gate, "scale", 2.0),
    "an entry of a tuple": lambda b: setattr(b.gate, "parts", ("right",)),
    "padding mode": lambda b: vars(b.conv).update(
        padding_mode="circular", _reversed_padding_repeated_twice=(1, 1, 1, 1)
    ),
    "dilation": lambda b: vars(b.conv).update(dilation=(2, 2), padding=(2, 2)),
    "forward on the instance": patched,
    "_conv_forward on the instance": doubled,
}


def unpickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


BEFORE = {
    "before the first call": lambda f, x: f,
    "after a call": lambda f, x: (f(x), f)[1],
    "in a copy": lambda f, x: (f(x), copy.deepcopy(f))[1],
    "in another process": lambda f, x: (f(x), unpickled(f))[1],
}
CALLS = {
    "called": lambda m, x: m(x),
    "compiled": lambda m, x: torch.compile(m, backend="eager", fullgraph=True)(x),
    "exported": lambda m, x: torch.export.export(m, (x,)).module()(x),
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


@pytest.mark.parametrize("call", [pytest.param(f, id=name) for name, f in CALLS.items()])
@pytest.mark.parametrize("before", [pytest.param(f, id=name) for name, f in BEFORE.items()])
@pytest.mark.parametrize("change", [pytest.param(f, id=name) for name, f in CHANGES.items()])
def test_change(change, before, call):
    reference = nn.Sequential(randomize_norms(Block()), randomize_norms(Block())).eval()
    x = torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        unchanged = reference(x)
        fused = before(frb.fuse(reference, strict=True), x)
        for model in (reference, fused):
            change(model[0])
        expected = reference(x)
        torch.testing.assert_close(call(fused, x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, unchanged, rtol=1e-2), "the change changes nothing"


def test_explained_before_the_first_call():
    fused = frb.fuse(nn.Sequential(Block(), Block()).eval())
    doubled(fused[0])
    CHANGES["padding mode"](fused[1])
    reasons = [report.reason for report in frb.explain(fused)]
    assert reasons == ["the _conv_forward of a convolution is overridden on the instance", "padding mode 'circular'"]


def test_change_after_it_was_compiled():
    reference = randomize_norms(Block()).eval()
    fused = frb.fuse(reference)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    x = torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-4)
        for block in (reference, fused):
            block.gate.on = True
        torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-4)


def test_unchanged_blocks_are_fused_wherever_they_are_traced():
    """Settings that are equal, and not the same objects, are no change."""
    fused = unpickled(frb.fuse(Block().eval()))
    with torch.no_grad():
        graph = torch.export.export(fused, (torch.randn(2, 8, 6, 5),)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert any("conv_bn_act" in target for target in called), called
