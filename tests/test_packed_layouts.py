"""Weights packed for oneDNN: what another size of image wants, and what sizes share."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP32, require
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.backends import layouts, onednn
from fused_resblock.backends.layouts import Layouts, layout_of
from fused_resblock.params import BatchNorm, Conv

SIZES = (56, 28, 64, 7, 40, 8, 56)


@pytest.fixture
def conv() -> Conv:
    norm = frb.models.randomize_norms(nn.BatchNorm2d(512)).eval()
    return Conv(torch.randn(512, 128, 1, 1), None, BatchNorm.of(norm))


@pytest.fixture
def folds(monkeypatch) -> list[Conv]:
    """What is folded, by a library whose layouts go by the width modulo 3."""
    folded: list[Conv] = []
    fold = layouts.fold
    monkeypatch.setattr(layouts, "fold", lambda conv, dtype: folded.append(conv) or fold(conv, dtype))
    monkeypatch.setattr(layouts, "_reorder", lambda weight, x, conv: (weight, x.shape[-1] % 3))
    monkeypatch.setattr(layouts, "layout_of", lambda packed: bytes([packed[1]]))
    monkeypatch.setattr(layouts, "_wanted", {})
    return folded


def image(size: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(1, 128, size, size).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_every_size_has_the_layout_that_it_wants(conv, dtype):
    require("onednn", dtype)
    packed = Layouts()
    for size in SIZES:
        x = image(size, dtype)
        weight, bias = packed.fit(x, conv)
        alone, _ = Layouts().fit(x, conv)
        assert layout_of(weight) == layout_of(alone)
        args = (conv.padding, conv.stride, conv.dilation, conv.groups, "none", [], "")
        pointwise = torch.ops.mkldnn._convolution_pointwise.default
        assert torch.equal(pointwise(x, weight, bias, *args), pointwise(x, alone, bias, *args))


def test_sizes_that_want_the_same_layout_share_a_weight(conv, folds):
    packed = Layouts()
    weights = {size: packed.fit(image(size), conv)[0] for size in range(4, 22)}
    assert len(packed) == len(folds) == 3
    assert {weight[1] == size % 3 for size, weight in weights.items()} == {True}
    assert len(set(map(id, weights.values()))) == 3
    assert packed.fit(image(5), conv)[0] is weights[8]


def test_layouts_that_are_known_are_not_asked_for(conv, folds, monkeypatch):
    packed = Layouts()
    packed.fit(image(3), conv), packed.fit(image(4), conv)
    monkeypatch.setattr(torch, "empty_like", None)
    packed.fit(image(3), conv), packed.fit(image(4), conv)
    assert len(folds) == 2
    Layouts().fit(image(4), conv)  # a convolution like this one
    assert len(folds) == 3


def test_how_much_is_kept(conv, folds, monkeypatch):
    monkeypatch.setattr(layouts, "MOST", 2)
    monkeypatch.setattr(layouts, "_ENOUGH", 4)
    packed = Layouts()
    for size in range(3, 12):
        weight, _ = packed.fit(image(size), conv)
        assert weight[1] == size % 3
        assert len(packed) <= 2
        assert len(layouts._wanted) <= 4


def test_a_block_at_several_sizes():
    """A program for each size, and weights that are changed between them."""
    block = frb.models.randomize_norms(frb.reference.Bottleneck(128, 32)).eval()
    fused = frb.fuse(block)
    with torch.no_grad():
        for _ in range(2):
            for size in SIZES:
                x = image(size)
                torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-4)
            for module in (block, fused):
                module.conv3.weight.mul_(0.5)
        used = [entry.value for entry in onednn._packed._entries.values() if isinstance(entry.value, Layouts)]
        assert all(1 <= len(found) <= layouts.MOST for found in used)
