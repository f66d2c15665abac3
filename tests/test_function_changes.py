"""Every change that must end a network's function, which is not frozen."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import require
from frozen_networks import CALLS, Network, functions, images, network, other_state, run_in
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fused_resblock as frb
from fused_resblock import flat
from fused_resblock.reference import Bottleneck


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def edit(tensor: str, how: str = "mul_"):
    def change(model: nn.Module) -> None:
        getattr(functools.reduce(getattr, tensor.split("."), model), how)(1.5)

    return change


def through_data(model: nn.Module) -> None:
    model.fc.weight.data.mul_(2)
    model.layer2[0].conv1.weight.data.mul_(2)


CHANGES = {
    "stem": edit("conv1.weight"),
    "block": edit("layer2.1.conv2.weight"),
    "statistics": edit("layer1.0.bn1.running_mean", "add_"),
    "classifier": edit("fc.weight"),
    "classifier's bias": edit("fc.bias"),
    "through data": through_data,
    "state": lambda n: n.load_state_dict(other_state(n)),
    "state by assignment": lambda n: n.load_state_dict(other_state(n), assign=True),
    "parameter": lambda n: setattr(n.fc, "bias", nn.Parameter(torch.ones(14))),
    "eps": lambda n: setattr(n.layer1[0].bn1, "eps", 0.5),
    "eps of the stem": lambda n: setattr(n.bn1, "eps", 0.5),
    "output size": lambda n: setattr(n.avgpool, "output_size", (1, 1)) or setattr(n, "fc", nn.Identity()),
    "pool": lambda n: setattr(n.maxpool, "kernel_size", 2),
    "stride": lambda n: setattr(n.layer2[0].conv1, "stride", (1, 1)) or setattr(n.layer2[0].downsample[0], "stride", 1),
    "classifier replaced": lambda n: setattr(n, "fc", nn.Identity()),
    "blocks in another order": lambda n: n.layer1.add_module("0", n.layer1._modules.pop("0")),
    "block deleted": lambda n: n.layer1.__delitem__(1),
    "blocks in another dictionary": lambda n: vars(n.layer1).update(_modules={"0": n.layer1[0]}),
    "block replaced": lambda n: n.layer1.__setitem__(1, nn.Identity()),
    "block removed": lambda n: n.layer1.pop(1),
    "stage replaced": lambda n: setattr(n, "layer3", nn.Sequential(nn.ReLU())),
    "class": lambda n: setattr(n.layer1[0].relu, "__class__", nn.SiLU),
    "hook on a stage": lambda n: n.layer1.register_forward_hook(lambda m, a, y: y * 2),
    "hook on a layer": lambda n: n.layer1[0].bn1.register_forward_hook(lambda m, a, y: y * 2),
    "hook on the classifier": lambda n: n.fc.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "hook on the network": lambda n: n.register_forward_hook(lambda m, a, y: y * 2),
    "forward of a stage": lambda n: setattr(n.layer2, "forward", lambda x: n.layer2[1](n.layer2[0](x)) * 2),
    "forward of a block": lambda n: setattr(n.layer1[0], "forward", lambda x: x * 2),
    "forward of the network": lambda n: setattr(n, "forward", lambda x: n.layer1(n.conv1(x))),
    "norm in train mode": lambda n: n.layer1[0].bn1.train(),
    "stage in train mode": lambda n: n.layer1.train(),
    "train mode": lambda n: n.train(),
    "attribute": lambda n: setattr(n, "scale", 3.0),
    "attribute within": lambda n: setattr(n.scaled, "scale", 3.0),
    "dtype": lambda n: n.double(),
    "parametrization": lambda n: parametrize.register_parametrization(n.fc, "weight", Doubled()),
    "pruning": lambda n: prune.custom_from_mask(n.fc, "weight", torch.eye(14, 32)),
}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Changing(Network):
    """Reads attributes of its own."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__(block)
        self.scale, self.scaled = 1.0, Scaled()
        self.fc = nn.Linear(16 * block.expansion * 2, 14) if block is Bottleneck else nn.Linear(32, 14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        x = self.layer3(self.layer2(x)) * self.scale
        x = torch.cat([self.scaled(x), x], 1)
        return self.fc(torch.flatten(self.avgpool(x), 1))


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_change(change):
    reference = network(cls=Changing)
    model = frb.fuse(reference)
    run_in(model, images())
    assert None not in functions(model)
    assert len(functions(model)) == 1
    results = []
    with torch.no_grad():
        for net in (model, reference):
            torch.manual_seed(4)
            change(net)
            x = images().to(next(net.parameters()).dtype)
            results.append([net(x) for _ in range(2 * CALLS)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("known")
def test_weights_that_somebody_puts_in_for_a_call():
    reference = network()
    model, x = frb.fuse(reference), images()
    run_in(model, x)
    with torch.no_grad():
        others = {name: p * 1.5 for name, p in reference.named_parameters()}
        for _ in range(2):
            ours = torch.func.functional_call(model, others, (x,))
            torch.testing.assert_close(ours, torch.func.functional_call(reference, others, (x,)), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(model(x), reference(x), rtol=1e-3, atol=1e-4)


class Limited(nn.Module):
    """Shows only for large numbers what its limit is."""

    limit = 20.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, max=2.0 if self.training else self.limit)


class Alike(Network):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__(block)
        self.limited = Limited()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.limited(x))


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda net: setattr(net.limited, "limit", 10.0), id="attribute"),
        pytest.param(lambda net: net.limited.train(), id="train mode"),
    ],
)
def test_another_graph_that_gives_the_same_while_it_is_learnt(change):
    reference = network(cls=Alike)
    model, x = frb.fuse(reference), images()
    run_in(model, x)
    assert functions(model)
    with torch.no_grad():
        for net in (model, reference):
            change(net)
        for factor in (*[0] * 2 * CALLS, 100):
            torch.testing.assert_close(model(x * factor), reference(x * factor), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("known")
def test_output_size_of_a_pool_in_16_bits():
    require("onednn", torch.bfloat16)
    reference = network().bfloat16()
    reference.fc = nn.Identity().eval()
    model, x = frb.fuse(reference), images().bfloat16()
    run_in(model, x)
    assert functions(model)
    with torch.no_grad():
        for net in (model, reference):
            net.avgpool.output_size = 2
        torch.testing.assert_close(model(x).float(), reference(x).float(), rtol=0.1, atol=0.1)


@pytest.mark.usefixtures("known")
def test_a_pool_that_returns_indices():
    reference = network()
    model, x = frb.fuse(reference), images()
    run_in(model, x)
    with torch.no_grad():
        for net in (model, reference):
            net.maxpool.return_indices = True
            with pytest.raises((AttributeError, TypeError)):
                net(x)


@pytest.mark.usefixtures("known")
def test_a_hook_while_it_learns(monkeypatch):
    """Another thread's, say: when it is gone the network becomes a function after all."""
    model, x = frb.fuse(network()), images()
    checked = flat.checked

    def hooked(*args):
        model.layer1[0].conv1.register_forward_hook(lambda *_: None)
        return checked(*args)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(flat, "checked", hooked)
        for _ in range(CALLS - 1):
            model(x)
    model.layer1[0].conv1._forward_hooks.clear()
    for _ in range(2):
        run_in(model, x)
    assert functions(model)
