"""Blocks of people's own: what is recognised, what is kept, and that either way nobody can see the difference."""

from __future__ import annotations

import copy
import re
from typing import Any

import effects
import odd_blocks
import pytest
import torch
import zoo
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms

RECOGNISED = [pytest.param(cls, id=name) for name, cls in zoo.ALL.items()]
ODD = [pytest.param(cls, id=name) for name, cls in (odd_blocks.ALL | effects.ALL).items()]
CPU_BACKENDS = [pytest.param(name, id=name) for name in ("auto", "triton", "eager")]


def tensors(result: Any) -> list[Tensor]:
    """The tensors of whatever a block returned."""
    if isinstance(result, Tensor):
        return [result]
    return list(result.values() if isinstance(result, dict) else result)


def observe(block: nn.Module, x: Tensor, grad: bool) -> dict[str, Any]:
    """Everything a caller can see of one call: results, what became of x, gradients, and the block's own attributes."""
    leaf = x.clone().requires_grad_(grad)
    given = leaf * 1  # not a leaf: blocks may write to it
    torch.manual_seed(3)
    results = tensors(block(given))
    seen: dict[str, Any] = {
        "results": [r.detach().clone() for r in results],
        "input afterwards": given.detach().clone(),
    }
    seen["attributes"] = {k: v for k, v in vars(block).items() if k in ("features", "calls")}
    if grad:
        sum(r.square().sum() for r in results).backward()
        seen["gradients"] = [leaf.grad, *(p.grad for p in block.parameters())]
    seen["buffers"] = [b.clone() for b in block.buffers()]
    return seen


def assert_same(block: nn.Module, fused: nn.Module, x: Tensor, grad: bool) -> None:
    """Neither a call's results nor its effects tell the fused block from the other."""
    ours, expected = observe(fused, x, grad), observe(block, x, grad)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def made(cls: type[nn.Module]) -> nn.Module:
    """A block with random norms and biases."""
    return randomize_norms(cls()).eval()


def put_in_mode(mode: str, *modules: nn.Module) -> None:
    """eval, train, or train with the norms in eval mode ("frozen")."""
    for module in modules:
        module.train(mode != "eval")
        for norm in module.modules() if mode == "frozen" else ():
            norm.train(norm.training and not isinstance(norm, nn.BatchNorm2d))


@pytest.mark.parametrize("cls", RECOGNISED)
def test_recognised(cls):
    frb.fuse(made(cls), strict=True)
    report = frb.explain(frb.fuse(made(cls)))
    assert [r.fused for r in report] == [True], str(report)


@pytest.mark.parametrize("cls", RECOGNISED + ODD)
@pytest.mark.parametrize("mode", ["eval", "frozen", "train"])
def test_same_results_and_effects(cls, mode):
    block = made(cls)
    fused = frb.fuse(block)
    put_in_mode(mode, block, fused)
    assert_same(block, fused, torch.randn(2, 8, 7, 6), grad=True)


@pytest.mark.parametrize("cls", RECOGNISED + ODD)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_same_on_every_backend(cls, backend):
    block = made(cls)
    with torch.no_grad():
        assert_same(block, frb.fuse(block, backend=backend), torch.randn(1, 8, 7, 6), grad=False)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        pytest.param(odd_blocks.AddsTwice, "several adds", id="adds twice"),
        pytest.param(odd_blocks.ReturnsTuple, "one tensor", id="tuple"),
        pytest.param(odd_blocks.ReturnsDict, "one tensor", id="dict"),
        pytest.param(odd_blocks.SqueezeExcite, "AdaptiveAvgPool2d|mul|Sigmoid", id="SE"),
        pytest.param(odd_blocks.ScaledResidual, "mul", id="scaled"),
        pytest.param(odd_blocks.AlphaAdd, "add", id="alpha"),
        pytest.param(effects.InPlaceOnSharedTensor, "in-place", id="in-place on a shared tensor"),
        pytest.param(effects.InPlaceOnInput, "in-place", id="in-place on the input"),
        pytest.param(effects.PositionalInPlaceOnInput, "in-place", id="positional in-place"),
        pytest.param(effects.InPlaceThroughAlias, "in-place", id="in-place through an alias"),
        pytest.param(odd_blocks.Asserts, "tanh", id="asserts"),
        pytest.param(odd_blocks.BranchOnValue, "branches on a tensor", id="control flow"),
        pytest.param(odd_blocks.ScaledByTensor, "uses a tensor outside", id="scaled by a tensor"),
        pytest.param(odd_blocks.OffsetSlice, "slice", id="offset slice"),
        pytest.param(odd_blocks.StridedSliceWithAStart, "slice", id="strided slice with a start"),
    ],
)
def test_kept_with_its_reason(cls, reason):
    fused = frb.fuse(made(cls))
    assert type(fused) is cls
    (report,) = frb.explain(fused)
    assert not report.fused
    assert report.cls == cls.__name__
    assert re.search(reason, report.reason), report.reason
    with pytest.raises(ValueError, match="^model must hold only blocks that can be fused when strict, got "):
        frb.fuse(made(cls), strict=True)


def test_block_that_forgets_its_skip_is_not_given_the_textbook_meaning():
    block = made(odd_blocks.ForgetsItsSkip)
    fused = frb.fuse(block)
    x = torch.randn(2, 8, 7, 6)
    textbook = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + x)
    assert torch.equal(fused(x), block(x))
    assert not torch.allclose(fused(x), textbook)


@pytest.mark.parametrize("cls", RECOGNISED + ODD)
def test_recognition_leaves_no_trace(cls):
    block = made(cls)
    before = copy.deepcopy(vars(block))
    frb.explain(block)
    frb.fuse(block)
    assert vars(block).keys() == before.keys()
    assert {k: v for k, v in vars(block).items() if k in ("features", "calls")} == {
        k: v for k, v in before.items() if k in ("features", "calls")
    }
    assert all(not m.training for m in block.modules())
