"""The global average pool and the classifier behind the blocks: the network's own values, in 16 bits on a CPU."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import BF16, FP16, FP32, require
from parity import assert_parity
from torch import nn
from torch.nn.utils import prune

import fused_resblock as frb
from fused_resblock import head
from fused_resblock.backends import onednn
from fused_resblock.models import ResNet
from fused_resblock.reference import BasicBlock

HALVES = [pytest.param(dtype, id=str(dtype)) for dtype in (BF16, FP16)]


def network(dtype: torch.dtype = BF16) -> nn.Module:
    torch.manual_seed(0)
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).eval().to(dtype)
    return net.to(memory_format=torch.channels_last)


def features(n: int = 3, size: int = 7, dtype: torch.dtype = BF16) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(n, 512, size, size).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def packed(monkeypatch):
    """The shapes that oneDNN's product was asked for."""
    seen, linear = [], onednn.linear

    def counting(x, packed, bias):
        seen.append(tuple(x.shape))
        return linear(x, packed, bias)

    monkeypatch.setattr(onednn, "linear", counting)
    return seen


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("images", [1, 3, 16])
def test_classifier_and_pool(dtype, images, packed):
    require("onednn", dtype)
    net = network(dtype)
    fused = frb.fuse(net)
    x = features(images, dtype=dtype)
    with torch.no_grad():
        y, exact = net.avgpool(x), x.double().mean((2, 3), keepdim=True)
        assert_parity(fused.avgpool(x), y, exact, what="pool")
        assert fused.avgpool(x).stride() == y.stride()
        flat = y.flatten(1)
        exact = nn.functional.linear(flat.double(), net.fc.weight.double(), net.fc.bias.double())
        assert_parity(fused.fc(flat), net.fc(flat), exact, what="classifier")
    assert packed == [(images, 512)]


def test_network(packed):
    require("onednn", BF16)
    net = network()
    fused = frb.fuse(net)
    x = torch.randn(2, 3, 64, 64).to(BF16)
    with torch.no_grad():
        assert_parity(fused(x), net(x), copy.deepcopy(net).double()(x.double()), what="logits", floor=1e-5)
    assert packed == [(2, 512)]


@pytest.mark.parametrize(("library", "make"), [("torchvision.models", "resnet18"), ("timm.models.resnet", "resnet18")])
def test_networks_of_others(library, make, packed):
    require("onednn", BF16)
    net = getattr(pytest.importorskip(library), make)().eval().to(BF16)
    fused = frb.fuse(net)
    with torch.no_grad():
        fused(torch.randn(1, 3, 64, 64).to(BF16))
    assert len(packed) == 1


def with_nan(x: torch.Tensor) -> torch.Tensor:
    x[0, 3] = float("nan")
    return x


@torch.no_grad()
def test_nan_is_kept():
    require("onednn", BF16)
    net, x = network(), with_nan(features())
    fused = frb.fuse(net)
    assert torch.equal(fused.avgpool(x).isnan(), net.avgpool(x).isnan())
    flat = x[:, :, 0, 0]
    assert torch.equal(fused.fc(flat).isnan(), net.fc(flat).isnan())


def data_edit(fc: nn.Linear) -> None:
    for p in fc.parameters():
        p.data.mul_(-2)


def doubled_by_class(fc: nn.Linear) -> None:
    fc.__class__ = type("Doubled", (type(fc),), {"weight": property(lambda self: 2 * self._parameters["weight"])})


CHANGES = {
    "weight of its class": doubled_by_class,
    "weight in place": lambda fc: fc.weight.mul_(2),
    "bias in place": lambda fc: fc.bias.add_(1),
    "through data": data_edit,
    "new weight": lambda fc: setattr(fc, "weight", nn.Parameter(torch.ones_like(fc.weight) / 8)),
    "weight swapped": lambda fc: setattr(fc.weight, "data", torch.ones_like(fc.weight) / 8),
    "no bias": lambda fc: setattr(fc, "bias", None),
    "loaded": lambda fc: fc.load_state_dict({k: v + 1 for k, v in fc.state_dict().items()}),
    "fewer classes": lambda fc: setattr(fc, "weight", nn.Parameter(fc.weight[:4].clone())) or setattr(fc, "bias", None),
    "weight norm": torch.nn.utils.parametrizations.weight_norm,
    "weight pruned": lambda fc: prune.l1_unstructured(fc, "weight", 0.5),
    "bias pruned": lambda fc: prune.l1_unstructured(fc, "bias", 0.5),
    "a hook": lambda fc: fc.register_forward_hook(lambda m, args, y: y + 1),
    "a forward of its own": lambda fc: setattr(fc, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", [pytest.param(c, id=name) for name, c in CHANGES.items()])
@torch.no_grad()
def test_changes_are_seen(change):
    require("onednn", BF16)
    net = network()
    fused = frb.fuse(net)
    flat = features()[:, :, 0, 0]
    before = fused.fc(flat)
    change(net.fc)
    change(fused.fc)
    y, expected = fused.fc(flat), net.fc(flat)
    assert y.shape != before.shape or not torch.equal(y, before)
    torch.testing.assert_close(y, expected)


ELSEWHERE = {
    "fp32": (lambda: (network(FP32), features(dtype=FP32)), {}),
    "NCHW": (lambda: (network(), features().contiguous()), {}),
    "another backend": (lambda: (network(), features()), {"backend": "eager"}),
    "not asked for": (lambda: (network(), features()), {"heads": False}),
    "left out": (lambda: (network(), features()), {"filter_fn": lambda name, module: name != "fc"}),
    "no images": (lambda: (network(), features(0)), {}),
}


@pytest.mark.parametrize(("case", "options"), [pytest.param(*c, id=name) for name, c in ELSEWHERE.items()])
@torch.no_grad()
def test_where_it_does_not_apply(case, options, packed):
    net, x = case()
    fused = frb.fuse(net, **options)
    pooled = fused.avgpool(x)
    assert torch.equal(pooled, net.avgpool(x))
    if x.is_contiguous(memory_format=torch.channels_last):
        assert torch.equal(fused.fc(pooled.flatten(1)), net.fc(pooled.flatten(1)))
        assert not packed


@torch.no_grad()
def test_other_inputs_of_the_classifier(packed):
    fused, x = frb.fuse(network()), features()
    rows = x.permute(0, 2, 3, 1)
    assert torch.equal(fused.fc(rows), nn.functional.linear(rows, fused.fc.weight, fused.fc.bias))
    assert not packed
    with pytest.raises(RuntimeError, match="shapes"):
        fused.fc(x[:, :100, 0, 0])
    with pytest.raises(RuntimeError, match="dtype"):
        fused.fc(x[:, :, 0, 0].float())
    with torch.autocast("cpu", FP16):
        assert fused.fc(x[:, :, 0, 0]).dtype == FP16
    assert not packed


def test_gradients_and_tracing(packed):
    net = network()
    fused, x = frb.fuse(net), features(1)[:, :, 0, 0].requires_grad_()
    for module in (net, fused):
        module.fc(x).sum().backward()
    assert torch.equal(fused.fc.weight.grad, net.fc.weight.grad)
    with torch.no_grad():
        fused.eval()
        traced = torch.fx.symbolic_trace(fused.fc)
        assert torch.equal(traced(x), nn.functional.linear(x, net.fc.weight, net.fc.bias))
        assert torch.equal(torch.compile(fused.fc, fullgraph=True, backend="eager")(x), net.fc(x))
    assert not packed


def test_copies_and_the_way_back(packed):
    require("onednn", BF16)
    fused, flat = frb.fuse(network()), features()[:, :, 0, 0]
    again = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    with torch.no_grad():
        assert torch.equal(again.fc(flat), fused.fc(flat))
    assert len(packed) == 2
    assert list(again.state_dict()) == list(network().state_dict())
    assert isinstance(again.fc, nn.Linear)
    frb.fuse(again, inplace=True, backend="eager")  # once more: another backend for the same modules
    with torch.no_grad():
        again.fc(flat)
    assert len(packed) == 2
    frb.unfuse(again)
    assert (type(again.fc), type(again.avgpool)) == (nn.Linear, nn.AdaptiveAvgPool2d)
    assert "_fused_backend" not in again.fc.__dict__


def test_explain_lists_what_is_fast():
    require("onednn", BF16)
    fused = frb.fuse(network())
    heads = [(p.name, p.modules) for p in frb.explain(fused).parts if p.name in ("avgpool", "fc")]
    assert heads == [("avgpool", "AdaptiveAvgPool2d"), ("fc", "Linear")]
    assert not [p for p in frb.explain(fused.float()).parts if p.name == "fc"]


def test_only_what_the_network_itself_calls():
    class Twice(nn.Module):
        """A network in a module that cannot be traced, with a Linear of its own."""

        def __init__(self):
            super().__init__()
            self.backbone, self.last = network(), nn.Linear(10, 2).to(BF16)

        def forward(self, x):
            return self.last(self.backbone(x)) if x.sum() > 0 else x

    model = Twice().eval()
    fused = frb.fuse(model)
    heads = [name for name, module in fused.named_modules() if isinstance(module, head.Head)]
    assert heads == ["backbone.avgpool", "backbone.fc"]
