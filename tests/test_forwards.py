"""Forwards that do more than compute: what they do to tensors, keep, and ask of their module is as it was."""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_proxies import Block
from torch import Tensor, fx, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms


@fx.wrap
def clip(y: Tensor) -> None:
    """`torch.fx` records a call of it."""
    y.clamp_(min=0)


#: each makes every negative value of an image 0, and gives None
EFFECTS: dict[str, Callable[[Tensor], object]] = {
    "out=": lambda y: torch.clamp(y, min=0, out=y),
    "clamp_": lambda y: torch.clamp_(y, min=0),
    "inplace=": lambda y: F.hardtanh(y, 0.0, 1e9, inplace=True),
    "inplace": lambda y: F.leaky_relu(y, 0.0, True),
    "method": lambda y: y.clamp_(min=0),
    "wrapped": clip,
    "operator": lambda y: operator.imul(y, (y > 0).float()),
    "data": lambda y: setattr(y, "data", y.data.clamp(min=0)),
    "item": lambda y: operator.setitem(y, y < 0, 0),
    "overload": lambda y: torch.ops.aten.relu_.default(y),
    "foreach": lambda y: torch._foreach_clamp_min_([y], 0.0),
}


class Changing(Block):
    """Does something to a tensor, and goes on with the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x
        self.answer(y)
        return y


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("effect", [pytest.param(effect, id=name) for name, effect in EFFECTS.items()])
def test_what_is_done_to_a_tensor_in_passing(effect, grad):
    reference = randomize_norms(Changing(effect)).eval().requires_grad_(False)
    fused, x = frb.fuse(reference), torch.randn(2, 8, 9, 7)
    with torch.set_grad_enabled(grad):
        y = fused(x)
    assert (y >= 0).all()
    torch.testing.assert_close(y, reference(x), rtol=1e-4, atol=1e-4)


def test_an_attribute_of_a_result():
    fused = frb.fuse(randomize_norms(Changing(lambda y: setattr(y, "tag", 5))).eval())
    with torch.no_grad():
        assert fused(torch.randn(1, 8, 4, 4)).tag == 5


class Switched(Block):
    """Asks a buffer, and what stands in a dictionary and a list."""

    def __init__(self) -> None:
        super().__init__(lambda x: True)
        self.config, self.steps = {"relu": True, "nested": [OrderedDict(on=True)]}, [True]
        self.register_buffer("on", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x
        return F.relu(y) if self.chosen() else y

    def chosen(self) -> bool:
        return self.config["relu"] and self.steps[0] and self.config["nested"][0]["on"]


class ByBuffer(Switched):
    def chosen(self) -> bool:
        return bool(self.on)


class ByTensor(Switched):
    def __init__(self) -> None:
        super().__init__()
        self.off = torch.tensor(False)

    def chosen(self) -> bool:
        return not self.off


@pytest.mark.parametrize("inner", [False, True], ids=["block", "module of a chain"])
@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (Switched, lambda b: b.config.update(relu=False)),
        (Switched, lambda b: b.config["nested"][0].update(on=False)),
        (Switched, lambda b: b.steps.clear() or b.steps.append(False)),
        (ByBuffer, lambda b: b.on.zero_()),
        (ByTensor, lambda b: b.off.fill_(1)),
    ],
    ids=["dictionary", "nested", "list", "buffer", "tensor"],
)
def test_what_a_forward_asks_of_its_block_changes(cls, change, inner):
    reference = randomize_norms(nn.Sequential(cls(), cls()) if inner else cls()).eval()
    fused, x = frb.fuse(reference), torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
        for model in (fused, reference):
            change(model[1] if inner else model)
        for _ in range(2):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


class Kept(Block):
    """Keeps its output."""

    def __init__(self, keep: Callable[[Kept, Tensor], object]) -> None:
        super().__init__(lambda x: True)
        self.feats, self.keep = {"out": []}, keep

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.keep(self, y)
        return y


SOMEWHERE: list[Tensor] = []
KEEPERS = {
    "nested": lambda block, y: block.feats["out"].append(y),
    "global list": lambda block, y: SOMEWHERE.append(y),
    "setdefault": lambda block, y: block.feats.setdefault(len(block.feats["out"]), []).append(y),
}


@pytest.mark.parametrize("keep", [pytest.param(keep, id=name) for name, keep in KEEPERS.items()])
def test_a_block_that_keeps_its_outputs_goes_on_keeping_them(keep):
    fused = frb.fuse(randomize_norms(Kept(keep)).eval())
    (entry,) = frb.explain(fused)
    assert not entry.fused
    SOMEWHERE.clear()
    with torch.no_grad():
        results = [fused(torch.randn(1, 8, 4, 4)) for _ in range(2)]
    kept = [t for t in (*SOMEWHERE, *itertools.chain(*fused.feats.values())) if type(t) is Tensor]
    assert [t is y for t, y in zip(kept, results, strict=True)] == [True, True]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_features_of_a_stem_that_a_relu_overwrites(pool, frozen):
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
            self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
            self.block = frb.reference.BasicBlock(8, 8)

        def forward(self, x: Tensor, feats: list[Tensor] | None = None) -> Tensor:
            x = self.bn(self.conv(x))
            if feats is not None:
                feats.append(x)
            return self.block(self.pool(self.relu(x)))

    reference = randomize_norms(Tapped()).eval()
    fused, x = frb.fuse(reference, frozen=frozen), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        for _ in range(3):
            ours: list[Tensor] = []
            theirs: list[Tensor] = []
            torch.testing.assert_close(fused(x, ours), reference(x, theirs), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours[0] + 0, theirs[0], rtol=1e-4, atol=1e-4)


class ByStride(nn.Module):
    """A network whose way depends on how its input lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.block = frb.reference.BasicBlock(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(F.relu(self.bn(self.conv(x))))
        try:
            z = x.view(x.size(0), -1)
        except RuntimeError:
            z = -x.flatten(1)
        return y.mean((1, 2, 3)) + z.mean(1)


def test_frozen_network_whose_input_lies_otherwise():
    reference = randomize_norms(ByStride()).eval()
    fused = frb.fuse(reference, frozen=True)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(2, 3, 9, 7)
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
        x = torch.randn(2, 3, 7, 9).transpose(2, 3)
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
