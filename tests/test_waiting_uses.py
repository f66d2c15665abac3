"""Whatever a forward does with what chains of blocks give it, it gets their values, although they wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from waiting_networks import Network, both, equal, images, usual

import fused_resblock as frb
from fused_resblock import waiting


@pytest.fixture(autouse=True)
def _even_small_ones(monkeypatch):
    monkeypatch.setattr(waiting, "WORTH", 0)


def read_twice(net: Network, x: Tensor) -> Tensor:
    a = net.layer1(net.stem(x))
    return net.layer2(a).mean((2, 3)), net.layer2(a).amax((2, 3)), a


def read_and_dropped(net: Network, x: Tensor) -> Tensor:
    a = net.layer1(net.stem(x))
    b = net.layer2(a)
    before = a.sum()
    del a
    return net.layer3(b), before


def edited_after(net: Network, x: Tensor) -> Tensor:
    a = net.layer1(net.stem(x))
    b = net.layer2(a)
    a.add_(1)
    return b, a, net.layer2(a)


def edited_input_of_nothing(net: Network, x: Tensor) -> Tensor:
    a = net.layer1(net.stem(x))
    a.mul_(2)
    return net.layer3(net.layer2(a))


def added_to_its_input(net: Network, x: Tensor) -> Tensor:
    a = net.stem(x)
    a += net.layer1(a)
    return net.layer2(a)


def last_first(net: Network, x: Tensor) -> Tensor:
    a = net.layer1(net.stem(x))
    b = net.layer2(a)
    c = net.layer3(b)
    return c.sum(), b.sum(), a.sum()


def first_first(net: Network, x: Tensor) -> Tensor:
    a = net.layer1(net.stem(x))
    b = net.layer2(a)
    c = net.layer3(b)
    return a.sum(), b.sum(), c.sum(), b + 0


USES = {
    "usual": usual,
    "returned": lambda n, x: n.layer1(n.stem(x)),
    "every result": lambda n, x: (lambda a: (a, (lambda b: [b, n.layer3(b)])(n.layer2(a))))(n.layer1(n.stem(x))),
    "read twice": read_twice,
    "read and dropped": read_and_dropped,
    "edited after the next chain": edited_after,
    "edited before the next chain": edited_input_of_nothing,
    "added to its input": added_to_its_input,
    "last first": last_first,
    "first first": first_first,
    "half of the images": lambda n, x: n.layer3(n.layer2(n.layer1(n.stem(x))[1:])),
    "another size": lambda n, x: n.layer3(n.layer2(n.layer1(n.stem(x[:, :, 4:])))),
    "chains in another order": lambda n, x: n.layer3(n.layer3(n.layer2(n.layer1(n.layer1(n.stem(x)))))),
    "a block alone": lambda n, x: n.layer2[0](n.layer1(n.stem(x))),
    "a stem behind": lambda n, x: n.maxpool(n.relu(n.bn1(n.layer1(n.stem(x))))),
    "under autocast": lambda n, x: n.layer2(autocast(n.layer1, n.stem(x)).float()),
    "in another dtype": lambda n, x: n.layer2(n.layer1(n.stem(x)).double().float()),
    "asked for its shape": lambda n, x: (lambda a: torch.tensor([*a.shape, a.dim(), a.size(1)]))(n.layer1(n.stem(x))),
    "a copy": lambda n, x: n.layer2(n.layer1(n.stem(x)).clone()),
    "without gradients within": lambda n, x: n.layer2(without_gradients(n.layer1, n.stem(x))),
}


def autocast(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


def without_gradients(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("use", [pytest.param(use, id=name) for name, use in USES.items()])
def test_use(use, mode, frozen):
    reference, fused = both(use)
    if frozen:
        fused = frb.fuse(fused, frozen=True)
    bounds = {"rtol": 0.1, "atol": 0.1} if use is USES["under autocast"] else {"rtol": 1e-4, "atol": 1e-4}
    with mode():
        for _ in range(3):
            equal(fused(images()), reference(images()), **bounds)
