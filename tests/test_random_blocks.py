"""Blocks made at random from convolutions, norms, ReLUs, adds and views, in place or not: fusing changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms

# (operation, which earlier value it reads, which other value it reads or which variant it is)
OPERATIONS = ("conv", "norm", "relu", "relu_", "relu module", "add", "add_", "identity", "view", "pool", "drop result")
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9
)


class Program(nn.Module):
    """Runs its operations in order on the values so far and returns the last one."""

    def __init__(self, operations: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.operations = operations
        self.layers = nn.ModuleList(self._layer(name, variant) for name, _, variant in operations)

    @staticmethod
    def _layer(name: str, variant: int) -> nn.Module:
        if name == "conv":
            kernel, bias = (1, 3, 3)[variant % 3], variant % 2 == 0
            return nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=1 + variant % 2, bias=bias)
        if name == "norm":
            return nn.BatchNorm2d(4, affine=variant % 4 != 0)
        if name == "relu module":
            return nn.ReLU(inplace=variant % 2 == 0)
        if name == "pool":
            return nn.AvgPool2d(3, 1, 1) if variant % 2 else nn.MaxPool2d(1)
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for (name, first, second), layer in zip(self.operations, self.layers, strict=True):
            a, b = values[-1 - first % len(values)], values[-1 - second % len(values)]
            if name == "drop result":
                torch.relu_(a) if second % 2 else a.add_(b)
                continue
            if name == "relu":
                value = torch.relu(a)
            elif name == "relu_":
                value = torch.relu_(a)
            elif name == "add":
                value = a + b
            elif name == "add_":
                value = a.add_(b)
            elif name == "view":
                value = a[:, :, ::1, ::1]
            else:
                value = layer(a)
            values.append(value)
        return values[-1]


CONV, NORM = ("conv", 0, 1), ("norm", 0, 1)


@settings(
    max_examples=250, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(PROGRAMS)
@example([CONV, NORM, ("add", 0, 2), ("drop result", 0, 1)])
@example([CONV, NORM, ("relu_", 0, 0), ("add", 0, 1)])
@example([("relu module", 0, 0), CONV, ("add", 0, 2)])
@example([CONV, ("view", 0, 0), ("relu_", 0, 0), ("add", 2, 3)])
@example([CONV, ("add", 0, 0)])
@example([CONV, NORM, ("norm", 2, 1), ("add", 0, 1)])
@example([CONV, ("add", 0, 1), NORM, ("relu", 0, 0)])
def test_fusing_changes_nothing(operations):
    torch.manual_seed(0)
    block = randomize_norms(Program(operations)).eval()
    fused = frb.fuse(block)
    x = torch.randn(1, 4, 3, 3)
    ours, theirs = x.clone(), x.clone()
    with torch.no_grad():
        expected = block(theirs)
        if not torch.isfinite(expected).all():
            pytest.skip("in-place adds grew beyond fp32")
        y = fused(ours)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg="what became of x differs")


@settings(max_examples=40, derandomize=True, deadline=None)
@given(PROGRAMS)
def test_gradients_are_the_same(operations):
    """Without in-place operations, which autograd may refuse."""
    operations = [o for o in operations if o[0] not in ("relu_", "add_", "drop result", "relu module")]
    torch.manual_seed(0)
    block = randomize_norms(Program([*operations, ("conv", 0, 1), ("norm", 0, 1), ("add", 0, 3)])).eval()
    fused = frb.fuse(copy.deepcopy(block), inplace=True).double()
    block.double()
    x = torch.randn(1, 4, 3, 3).double()
    grads = []
    for module in (fused, block):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, theirs)


def test_programs_do_get_fused():
    """The test above would be void if nothing were recognised."""
    program = Program([CONV, NORM, ("relu_", 0, 0), CONV, NORM, ("add", 0, 5), ("relu module", 0, 0)]).eval()
    assert frb.explain(frb.fuse(program, strict=True))[0].fused
