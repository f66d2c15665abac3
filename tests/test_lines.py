"""Where chains of blocks may wait: nowhere where a forward could tell, by what its graph shows or does not show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from waiting_networks import Network, both, count, equal, images, usual

import fused_resblock as frb
from fused_resblock import waiting
from fused_resblock.models import randomize_norms


@pytest.fixture(autouse=True)
def _even_small_ones(monkeypatch):
    monkeypatch.setattr(waiting, "WORTH", 0)


def waits(use) -> bool:
    """Whether chains wait in a network with this forward, which the fused one is right about."""
    reference = randomize_norms(Network(use)).eval()
    fused = frb.fuse(reference, strict=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                equal(fused(images()), reference(images()), rtol=1e-4, atol=1e-4)
    return len(getattr(fused, "_fused_lines", ())) > 0


def with_two_readers(net: Network, x: Tensor):
    a = net.layer1(net.stem(x))
    b = net.layer2(a)
    return net.pool(b), a.mean((2, 3)), net.layer3(b)


def pooled_and_read(net: Network, x: Tensor):
    a = net.layer1(net.stem(x))
    return net.pool(a), a


def input_edited(net: Network, x: Tensor):
    s = net.stem(x)
    y = net.pool(net.layer1(s))
    s.mul_(2)
    return y, s


def alias_edited(net: Network, x: Tensor):
    s = net.bn1(net.conv1(x))
    y = net.pool(net.layer1(nn.functional.relu_(s)))
    s.mul_(2)
    return y, s


def view_edited(net: Network, x: Tensor):
    s = net.stem(x)
    y = net.layer1(s[:])
    s.add_(1)
    return net.pool(y)


def asked_within_a_line(net: Network, x: Tensor):
    a = net.layer1(net.stem(x))
    return net.pool(net.layer2(a) if type(a) is torch.Tensor else a)


def called_twice(net: Network, x: Tensor):
    return net.pool(net.layer1(net.layer1(net.stem(x))))


def not_pooled(net: Network, x: Tensor):
    return net.layer2(net.layer1(net.stem(x))).mean((2, 3))


REFUSED = (with_two_readers, pooled_and_read, view_edited, asked_within_a_line, called_twice, not_pooled)


@pytest.mark.parametrize("use", REFUSED)
def test_where_anything_comes_between_nothing_waits(use):
    assert not waits(use)


@pytest.mark.parametrize("use", [usual, input_edited, alias_edited])
def test_what_comes_behind_a_line_is_right(use):
    assert waits(use)


def test_a_graph_that_changed_is_asked_again():
    reference, fused = both()
    assert list(fused._fused_lines) == [fused.layer3, fused.layer2, fused.layer1]
    for network in (reference, fused):
        network.use = with_two_readers
    with torch.no_grad():
        equal(fused(images()), reference(images()), rtol=1e-4, atol=1e-4)
    assert not fused._fused_lines


def test_arguments_that_the_graph_does_not_have(monkeypatch):
    class Optional(Network):
        def forward(self, x: Tensor, edit: bool = False):
            s = self.stem(x)
            y = self.layer1(s)
            if edit:
                s.mul_(2)
            return self.pool(y)

    reference = randomize_norms(Optional(usual)).eval()
    fused = frb.fuse(reference, strict=True)
    made = count(monkeypatch)
    with torch.inference_mode():
        for options in ({}, {}, {"edit": True}, {"edit": True}):
            equal(fused(images(), **options), reference(images(), **options), rtol=1e-4, atol=1e-4)
    assert made == [fused.layer1]
