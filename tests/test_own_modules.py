"""What users make of modules: classes derived from fused ones, forwards that ask attributes, calls of their own."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from frozen_networks import CALLS, Network, functions, images, network, run_in
from torch import Tensor, nn
from torch.nn import functional as F

import fused_resblock as frb
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock


def same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        y = theirs(x)
        torch.testing.assert_close(ours(x), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


class Doubling:
    """A mixin."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("path", ["", "layer1", "layer1.0", "conv1", "bn1", "fc"])
def test_a_mixin_put_before_a_fused_class(path, frozen):
    reference = network()
    fused = frb.fuse(reference, frozen=frozen)
    for model in (reference, fused):
        module = model.get_submodule(path)
        module.__class__ = type(f"Doubling{type(module).__name__}", (Doubling, type(module)), {})
    for _ in range(CALLS + 1):
        same(fused, reference, images())


class Clamped(frb.FusedBasicBlock):
    """A drop-in class with more behind it, which does nothing to small numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=3.0)


class Calling(BasicBlock):
    """Has a call of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


@pytest.mark.parametrize("block", [Clamped, Calling])
@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_that_do_more(block, frozen):
    reference = network(block)
    fused = frb.fuse(reference, frozen=frozen)
    run_in(fused, images() * 1e-3)
    same(fused, frb.unfuse(reference), images() * 100)


class Step(nn.Module):
    """A convolution and a norm, with a ReLU or not."""

    act = True

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.relu(x) if self.act else x


class Steps(nn.Module):
    """A residual block of those."""

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.a, self.b = Step(), Step()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.a(x)) + x)


def circular(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


CHANGES = {
    "flag of an inner module": lambda block: setattr(block.a, "act", False),
    "another flag": lambda block: setattr(block.b, "act", 0),
    "padding of the image": lambda block: setattr(block.a.conv, "_conv_forward", MethodType(circular, block.a.conv)),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("alone", [False, True], ids=["chain", "alone"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_settings_of_inner_modules(change, when, alone, grad):
    torch.manual_seed(0)
    blocks = [Steps()] if alone else [Steps(), Steps()]
    reference = randomize_norms(nn.Sequential(*blocks)).eval()
    x = torch.randn(2, 8, 6, 6)
    if when == "before":
        CHANGES[change](reference[0])
    fused = frb.fuse(reference)
    with torch.set_grad_enabled(grad):
        fused(x), fused(x)
        if when == "after":
            for model in (reference, fused):
                CHANGES[change](model[0])
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


class Dropping(BasicBlock):
    """With a dropout that is off."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.drop(self.relu(self.bn1(self.conv1(x)))))) + x)


def test_dropout_that_is_switched_on():
    reference = randomize_norms(nn.Sequential(Dropping(8, 8), Dropping(8, 8))).eval()
    fused, x = frb.fuse(reference, strict=True), torch.randn(2, 8, 5, 5)
    same(fused, reference, x)
    results = []
    for model in (reference, fused):
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        torch.manual_seed(1)
        results.append(model(x))
    torch.testing.assert_close(*results)


class Showing(Network):
    """May give what lies within its stem, where a ReLU overwrites it."""

    feature = False
    limit: float | None = None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = seen = self.bn1(self.conv1(x))
        if not self.feature:
            del seen
        y = self.layer1(self.maxpool(self.relu(x)))
        y = self.fc(torch.flatten(self.avgpool(self.layer3(self.layer2(y))), 1))
        y = y if self.limit is None else y.clamp(max=self.limit)
        return (y, seen) if self.feature else y


@pytest.mark.parametrize("frozen", [False, True])
def test_attribute_of_a_network(frozen):
    reference = network(cls=Showing)
    fused = frb.fuse(reference, frozen=frozen)
    run_in(fused, images())
    reference.feature = fused.feature = True
    for _ in range(CALLS + 1):
        with torch.no_grad():
            for ours, theirs in zip(fused(images()), reference(images()), strict=True):
                assert type(ours) is Tensor
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert [p for p in frb.explain(fused).parts if p.name == "conv1"] == []


def test_frozen_network_with_another_attribute_is_another_function():
    reference = network(cls=Showing)
    fused = frb.fuse(reference, frozen=True)
    run_in(fused, images())
    reference.limit = fused.limit = 0.5
    run_in(fused, images() * 1e-3)
    assert functions(fused) != [None]
    same(fused, reference, images() * 100)


class Modal(Network):
    """Limits its output in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.training else y.clamp(max=0.5)


def test_frozen_network_that_was_fused_in_train_mode():
    reference = network(cls=Modal)
    fused = frb.fuse(reference.train(), frozen=True).eval()
    run_in(fused, images() * 1e-3)
    assert functions(fused) != [None]
    same(fused, reference.eval(), images() * 100)


def test_network_whose_attributes_always_change_gives_its_stems_up():
    reference = network()
    fused = frb.fuse(reference)
    fused.register_forward_hook(lambda module, args, y: setattr(module, "calls", getattr(module, "calls", 0) + 1))
    for _ in range(fused.LOOKS):
        same(fused, reference, images())
        assert frb.explain(fused).parts[0].name == "conv1"
    for _ in range(2):
        same(fused, reference, images())
    assert [p.name for p in frb.explain(fused).parts if p.modules != "2 blocks"] == []


def test_parts_of_a_fused_sequential():
    net = network()
    reference = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *net.layer1).eval()
    fused = frb.fuse(reference)
    for part in (slice(5), slice(2), slice(4, 6)):
        x = images() if part.start is None else torch.randn(2, 8, 5, 5)
        frb.explain(fused[part])
        with torch.no_grad():
            assert type(fused[part](x)) is Tensor
        same(fused[part], reference[part], x)
        same(frb.fuse(fused[part]), reference[part], x)


def test_none_for_an_image():
    class Idle(Network):
        def forward(self, x: Tensor | None = None) -> Tensor | None:
            return None if x is None else super().forward(x)

    fused = frb.fuse(network(cls=Idle), frozen=True)
    with torch.no_grad():
        assert fused(None) is None
        assert fused() is None


def test_pool_that_gives_its_indices():
    class Indexed(Network):
        def forward(self, x: Tensor) -> Tensor:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            return self.fc(
                self.avgpool(self.layer3(self.layer2(self.layer1(x[0] if type(x) is tuple else x)))).flatten(1)
            )

    reference = network(cls=Indexed)
    fused = frb.fuse(reference)
    same(fused, reference, images())
    reference.maxpool.return_indices = fused.maxpool.return_indices = True
    same(fused, reference, images())


ACTIVATIONS = {
    "another": lambda norm: setattr(norm, "act", nn.SiLU()),
    "hook": lambda norm: norm.act.register_forward_hook(lambda m, a, y: y * 2),
    "forward": lambda norm: setattr(norm.act, "forward", lambda x: x * 2),
    "class": lambda norm: setattr(norm.act, "__class__", nn.SiLU),
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in ACTIVATIONS.items()])
def test_activation_of_a_norm_in_a_stem(change):
    layers = pytest.importorskip("timm.layers")
    net = network()
    reference = nn.Sequential(net.conv1, layers.BatchNormAct2d(8), net.maxpool, *net.layer1).eval()
    fused = frb.fuse(reference)
    same(fused, reference, images())
    for model in (reference, fused):
        change(model[1])
    same(fused, reference, images())


class NoNorm(nn.Module):
    """Of a network for super-resolution, say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.conv1(x))) + x


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", [NoNorm, lambda: nn.Sequential(NoNorm(), NoNorm())], ids=["block", "chain"])
def test_one_image_without_a_batch(make, grad):
    reference = make().eval()
    fused = frb.fuse(reference, strict=True)
    x = torch.randn(8, 6, 5)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        for model in (fused, fused, compiled):
            torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
        same(fused, reference, x[None])
