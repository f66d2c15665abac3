"""`filter_fn` around the blocks: which modules it is asked about, and what its error leaves behind."""

from __future__ import annotations

import pytest
from torch import nn

import fused_resblock as frb


@pytest.mark.parametrize("at", ["conv1", "fc", "avgpool"])
def test_a_filter_that_raises_at_a_stem_or_a_head_leaves_the_model_as_it_was(at):
    def filter_fn(name: str, module: nn.Module) -> bool:
        if name == at:
            raise KeyError(name)
        return True

    original = frb.models.resnet18(num_classes=3).eval().bfloat16()
    before = [(type(m), dict(vars(m))) for m in original.modules()]
    with pytest.raises(KeyError):
        frb.fuse(original, inplace=True, filter_fn=filter_fn)
    assert [(type(m), dict(vars(m))) for m in original.modules()] == before


def test_filter_fn_is_given_the_modules_of_the_model_and_not_of_its_copy():
    original, asked = frb.models.resnet18(num_classes=3).eval().bfloat16(), []
    frb.fuse(original, filter_fn=lambda name, module: asked.append((name, module)) is None)
    assert {"conv1", "layer1.0", "avgpool", "fc"} <= {name for name, _ in asked}
    assert all(original.get_submodule(name) is module for name, module in asked)
    fused = frb.fuse(original, filter_fn=lambda name, module: module not in (original.fc, original.conv1))
    assert (type(fused.fc), type(fused.conv1)) == (nn.Linear, nn.Conv2d)
