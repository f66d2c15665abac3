"""Weights that a graph of `torch.compile` computes: the same tensor is written again, and no version tells so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import ops
from fused_resblock.backends import folding, triton
from fused_resblock.functional import BatchNorm, bn_act, conv_bn_act
from fused_resblock.params import Conv

OPS = {torch.ops.fused_resblock.conv_bn_act.default, torch.ops.fused_resblock.bn_act.default}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles from nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def unsampled(monkeypatch):
    """No samples of weights are compared, as on a GPU."""
    monkeypatch.setattr(folding, "words", lambda parts: ([], []))


def cached(function, *args) -> list[bool]:
    """What the operations in the graph of a function say about their weights, in order."""
    found = []

    def spy(graph, _):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function" and node.target in OPS | overloads]
        found.extend(node.args[-1] != ops.UNCACHED for node in nodes)
        return graph

    overloads = {op.overloadpacket for op in OPS}
    with torch.no_grad():
        torch.compile(function, backend=spy, fullgraph=True)(*args)
    return found


def test_weights_written_again_by_inductor(unsampled):
    weights = [torch.randn(16, 16, 3, 3) / 5 for _ in range(4)]
    masks = [torch.rand_like(weight) > 0.5 for weight in weights]
    x = torch.randn(2, 16, 9, 9)

    def eager(x: Tensor) -> Tensor:
        for weight, mask in zip(weights, masks, strict=True):
            x = F.conv2d(x, torch.where(mask, weight, 0.0), padding=1).relu()
        return x

    def fused(x: Tensor) -> Tensor:
        for weight, mask in zip(weights, masks, strict=True):
            x = conv_bn_act(x, torch.where(mask, weight, 0.0), padding=1)
        return x

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fused, fullgraph=True)(x), eager(x), rtol=1e-4, atol=1e-4)


def test_only_parameters_are_cached_in_a_graph():
    x, weight, parameter = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 1, 1), nn.Parameter(torch.randn(4, 4, 1, 1))
    mean, var, gamma = torch.zeros(4), torch.ones(4), nn.Parameter(torch.ones(4))
    assert cached(lambda x: conv_bn_act(x, parameter), x) == [True]
    assert cached(lambda x: conv_bn_act(x, weight), x) == [False]
    assert cached(lambda x: conv_bn_act(x, parameter * 2), x) == [False]
    second = frb.functional.Shortcut(x, weight)
    assert cached(lambda x: conv_bn_act(x, parameter, shortcut=second), x) == [False]
    assert cached(lambda x: bn_act(x, BatchNorm(mean, var, gamma, None)), x) == [True]
    assert cached(lambda x: bn_act(x, BatchNorm(x.mean((0, 2, 3)), var, None, None)), x) == [False]
    computed = BatchNorm(mean, var, None, None)
    learned = BatchNorm(mean, var, gamma, None)
    assert cached(lambda x: bn_act(x, learned, residual=x, residual_norm=computed), x) == [False]


@pytest.mark.parametrize(
    "make",
    [lambda: frb.reference.Bottleneck(16, 4), lambda: frb.reference.PreActBottleneck(16, 12, 4, 2)],
    ids=["Bottleneck", "PreActBottleneck"],
)
def test_weights_of_a_module_are_cached(make):
    fused = frb.fuse(frb.models.randomize_norms(make()).eval(), strict=True)
    x = torch.randn(2, 16, 5, 5)
    flags = cached(fused, x)
    assert len(flags) >= 3
    assert all(flags)
    for strict in (False, True):
        graph = torch.export.export(fused, (x,), strict=strict).graph
        exported = [node for node in graph.nodes if node.target in OPS]
        assert len(exported) == len(flags)
        assert not any(node.args[-1] == ops.UNCACHED or "learned" in node.kwargs for node in exported)


@pytest.mark.parametrize("edited", ["conv1.weight", "bn1.weight", "bn2.bias", "downsample.0.weight"])
def test_parameters_that_a_graph_edits(unsampled, edited):
    """What the op is given is no parameter then, and inductor writes it again at the next edit."""
    shortcut = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
    reference = frb.models.randomize_norms(frb.reference.BasicBlock(16, 16, downsample=shortcut)).eval()
    fused, x = frb.fuse(reference), torch.randn(2, 16, 7, 7)

    def steps(block: nn.Module, x: Tensor) -> list[Tensor]:
        results = []
        with torch.no_grad():
            for i in range(4):
                block.get_parameter(edited)[i] += 1.0
                results.append(block(x))
        return results

    compiled = torch.compile(steps, fullgraph=True)(fused, x)
    torch.testing.assert_close(compiled, steps(reference, x), rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_of_an_uncached_call():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    op = torch.ops.fused_resblock.conv_bn_act
    rest = (None, None, None, None, None, 0.0, [1, 1], [1, 1], [1, 1], 1, None, 1, None, None, None)
    rest = (*rest, None, None, None, None, 0.0, 1, True, "auto")
    before = len(frb.backends.onednn._packed)
    y = op(x, weight, *rest, ops.UNCACHED)
    assert len(frb.backends.onednn._packed) == before
    torch.testing.assert_close(op(x, weight, *rest), y)
    assert len(frb.backends.onednn._packed) == before + 1


def test_norms_of_two_convolutions_in_the_same_memory(unsampled):
    """A kernel's scale and shift are those of its own convolution, though the norm's tensors look the same."""
    norm = BatchNorm(torch.zeros(4), torch.ones(4), None, None, 0.0)
    first, second = torch.randn(4, 4, 1, 1), torch.randn(4, 4, 1, 1)
    scale, _ = triton.affine(norm, Conv(first), torch.float32)
    version = norm.var._version
    norm.var.numpy().fill(4)
    assert norm.var._version == version
    torch.testing.assert_close(triton.affine(norm, Conv(second), torch.float32)[0], scale / 2)
