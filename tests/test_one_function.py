"""Networks that are not frozen as one function: which become one, and every change that must end it."""

from __future__ import annotations

import copy
import functools
import gc
import linecache
import weakref
from collections import OrderedDict

import pytest
import torch
from frozen_networks import CALLS, Network, functions, images, network, run_in
from parity import assert_parity
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import flat, trusted, watch
from fused_resblock.models import ResNet, randomize_norms
from fused_resblock.reference import BasicBlock, Bottleneck


def test_ours():
    reference = randomize_norms(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5)).eval()
    model = frb.fuse(reference)
    x = images(size=33)
    y = run_in(model, x)
    assert None not in functions(model)
    assert len(functions(model)) == 1
    with torch.no_grad():
        assert_parity(y, reference(x), copy.deepcopy(reference).double()(x.double()), what="logits", floor=1e-5)


def test_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    reference = randomize_norms(torchvision.models.mnasnet0_5()).eval()
    model = frb.fuse(reference)
    torch.testing.assert_close(run_in(model, images(size=32)), reference(images(size=32)), rtol=1e-3, atol=1e-4)
    assert None not in functions(model)


@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_dictionaries(kind, frozen, known):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = randomize_norms(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            found = kind()
            found["out"] = self.body(x)
            return kind([("scores", found["out"].softmax(1)), ("inner", found)])

    reference = Network().eval()
    model, x = frb.fuse(reference, frozen=frozen), images(size=33)
    with torch.no_grad():
        for _ in range(CALLS):
            y = model(x)
        torch.testing.assert_close(y, reference(x), rtol=1e-3, atol=1e-4)
    assert len(functions(model)) == 1
    assert None not in functions(model)
    assert type(y) is type(y["inner"]) is kind


class Own(Network):
    """Somebody's."""


def foreign(x: Tensor) -> Tensor:
    return x


def holding(value: object) -> nn.Module:
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    model.layer1[0].function = value
    return model


class Callable:
    def __call__(self, x: Tensor) -> Tensor:
        return x


class Property(ResNet):
    """All that is its own is no function."""

    factor = property(lambda self: 2.0)


def patched() -> nn.Module:
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    model.__class__ = type("ResNet", (ResNet,), {"__module__": ResNet.__module__, "forward": lambda self, x: x})
    return model


UNTRUSTED = {
    "own object": lambda: holding(Callable()),
    "own method in a class": patched,
    "own property": lambda: Property(BasicBlock, [1, 1, 1, 1]),
    "own class": lambda: Own(),
    "own block": lambda: nn.Sequential(nn.ReLU(), Own()),
    "own function": lambda: holding(foreign),
    "own function in part": lambda: holding(functools.partial(foreign)),
    "graph": lambda: torch.fx.symbolic_trace(ResNet(BasicBlock, [1, 1, 1, 1])),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in UNTRUSTED.items()])
def test_what_is_not_trusted(make):
    assert not trusted.is_trusted(make())
    model = frb.fuse(make().eval())
    with torch.no_grad():
        for _ in range(CALLS):
            model(images(size=32))
    assert not functions(model)


@pytest.mark.parametrize("value", [torch.relu, functools.partial(torch.relu), nn.ReLU, None, [1]])
def test_what_is_trusted(value):
    assert trusted.is_trusted(holding(value))


@pytest.mark.usefixtures("known")
def test_a_function_again_once_its_weights_stay():
    model, x = frb.fuse(network()), images()
    for _ in range(2):
        run_in(model, x)
        assert functions(model)
        with torch.no_grad():
            model.conv1.weight.mul_(2)
        for _ in range(CALLS):
            run_in(model, x)
    assert functions(model)


@pytest.mark.usefixtures("known")
def test_a_network_that_changes_all_the_time_is_left_alone(monkeypatch):
    model, x = frb.fuse(network()), images()
    recorded = []
    learn = flat._Flat.learn
    monkeypatch.setattr(flat._Flat, "learn", lambda *args: recorded.append(1) or learn(*args))
    with torch.no_grad():
        for _ in range(100):
            model(x)
            model.conv1.weight.mul_(1.01)
    assert len(recorded) < 25


@pytest.mark.usefixtures("known")
def test_asked_once_a_call(monkeypatch):
    model, x = frb.fuse(network()), images()
    run_in(model, x)
    asked = []
    holds = watch.Guard.holds
    monkeypatch.setattr(watch.Guard, "holds", lambda self: asked.append(self) or holds(self))
    with torch.no_grad():
        model(x)
    assert len(asked) == 1


@pytest.mark.usefixtures("known")
def test_a_part_in_train_mode_is_no_function():
    """Its graph, which is that of eval mode, would be right only as long as all of it is."""
    model = frb.fuse(network())
    model.layer1[0].train()
    run_in(model, images())
    assert not functions(model)
    model.eval()
    for _ in range(2):
        run_in(model, images())
    assert functions(model)


@pytest.mark.usefixtures("known")
def test_a_weight_that_is_no_parameter():
    reference = network()
    weight = reference.conv1.weight.detach().clone()
    del reference.conv1.weight
    reference.conv1.weight = weight
    model, x = frb.fuse(reference), images()
    run_in(model, x)
    for net in (model, reference):
        net.conv1.weight.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("known")
def test_sources_of_functions_are_let_go():
    def kept() -> list[str]:
        return [*torch.fx.graph_module._loader.eval_cache, *(n for n in linecache.cache if n.startswith("<eval_with"))]

    model = frb.fuse(network())
    before = kept()
    run_in(model, images())
    assert functions(model)
    assert kept() == before


@pytest.mark.usefixtures("known")
def test_a_network_within_another():
    inner = frb.fuse(network())
    outer = frb.fuse(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), inner).eval())
    with torch.no_grad():
        for _ in range(CALLS + 1):
            torch.testing.assert_close(outer(images()), inner(outer[1](outer[0](images()))), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("known")
def test_freed():
    model = frb.fuse(network())
    run_in(model, images())
    assert functions(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.usefixtures("known")
def test_frozen_and_back():
    model, x = frb.fuse(network()), images()
    first = run_in(model, x)
    for frozen in (True, False, True):
        frb.fuse(model, inplace=True, frozen=frozen)
        assert not functions(model)
        assert torch.equal(run_in(model, x), first)
        assert functions(model)


@pytest.mark.parametrize("frozen", [False, True], ids=["asked", "frozen"])
def test_a_chain_that_calls_a_block_twice(frozen):
    """Its first images are empty, of which more calls would make the same, as its norms are new."""
    block = BasicBlock(8, 8)
    reference = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(block, block)).eval()
    model, x = frb.fuse(reference, frozen=frozen), images(size=32)
    with torch.no_grad():
        for _ in range(CALLS):
            model(torch.zeros_like(x))
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    assert functions(model)
    assert None not in functions(model)
