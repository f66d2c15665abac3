"""Networks that `torch.fx` has rebuilt write their forward into their class; that of a fused one stays whole."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from stem_networks import parts
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms


def resnet() -> nn.Module:
    return randomize_norms(pytest.importorskip("torchvision").models.resnet18(num_classes=3)).eval()


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(resnet())


def features() -> nn.Module:
    extract = pytest.importorskip("torchvision.models.feature_extraction").create_feature_extractor
    return extract(resnet(), ["layer1", "layer3"]).eval()


class Untraceable(nn.Module):
    """As a detection network around its backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = features()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.body(x) if x.sum() == x.sum() else {}


def recompiled(model: nn.Module) -> nn.Module:
    model.recompile()
    return model


CHANGES = {
    "train and eval": lambda model: model.train().eval(),
    "deepcopy": lambda model: copy.deepcopy(model).eval(),  # feature extractors copy themselves into train mode
    "copies of copies": lambda model: copy.deepcopy(copy.deepcopy(model)).eval(),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "fused again": frb.fuse,
    "unfused": frb.unfuse,
    "copy unfused": lambda model: frb.unfuse(copy.deepcopy(model)).eval(),
    "frozen": lambda model: frb.fuse(model, frozen=True),
}


def same(ours: object, theirs: object) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
@pytest.mark.parametrize("make", [traced, features, Untraceable])
def test_change(make, change):
    reference, x = make(), torch.randn(2, 3, 33, 33)
    fused = frb.fuse(reference)
    assert parts(fused)
    with torch.no_grad():
        same(fused(x), reference(x))
        changed = change(fused)
        for _ in range(5):
            same(changed(x), reference(x))
        same(fused(x), reference(x))


def test_recompiled():
    reference, x = traced(), torch.randn(2, 3, 33, 33)
    fused = frb.fuse(reference)
    with torch.no_grad():
        same(recompiled(fused)(x), reference(x))


def test_another_graph():
    """The ReLU of a stem is read by something else, too."""
    reference, x = traced(), torch.randn(2, 3, 33, 33)
    fused = frb.fuse(reference)
    with torch.no_grad():
        same(fused(x), reference(x))
        for model in (fused, reference):
            norm = next(node for node in model.graph.nodes if node.target == "bn1")
            output = next(node for node in model.graph.nodes if node.op == "output")
            output.args = ((output.args[0], norm),)
            model.recompile()
        same(fused(x), reference(x))


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_fused(again):
    fused = frb.fuse(traced())
    copied = again(fused)
    assert parts(copied) == parts(fused)
    with torch.no_grad():
        copied(torch.randn(1, 3, 33, 33))
    assert any("_fused_stem" in vars(module) for module in copied.modules())


def test_classes_are_given_back():
    reference = traced()
    assert "GraphModule" in type(frb.unfuse(frb.fuse(reference))).__name__
    assert not any(isinstance(m, frb.network.FusedNetwork) for m in frb.unfuse(frb.fuse(reference)).modules())
