"""How blocks are called: by keyword, with arguments that they do not use, wrongly; fusing changes none of it."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms


class Keyword(zoo.Base):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv1(inputs)) + inputs)


class UnusedArgument(zoo.Base):
    """A U-Net block that may be given an embedding."""

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)) + x)


class SecondArgument(zoo.Base):
    def forward(self, unused: object, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)) + x)


class AnyArguments(zoo.Base):
    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)) + x)


class KeywordOnly(zoo.Base):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)) + x)


class Flag(zoo.Base):
    def forward(self, x: Tensor, final_relu: bool = True) -> Tensor:
        out = self.bn1(self.conv1(x)) + x
        return torch.relu(out) if final_relu else out


class DefaultInput(zoo.Base):
    def forward(self, x: Tensor | None = None) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)) + x)


X = torch.linspace(-1, 1, 2 * 8 * 5 * 5).view(2, 8, 5, 5)
E = torch.ones(2, 8)
CALLS = [
    pytest.param(Keyword, lambda b: b(X), id="positional"),
    pytest.param(Keyword, lambda b: b(inputs=X), id="keyword"),
    pytest.param(UnusedArgument, lambda b: b(X), id="without the argument"),
    pytest.param(UnusedArgument, lambda b: b(X, None), id="None"),
    pytest.param(UnusedArgument, lambda b: b(X, E), id="with the argument"),
    pytest.param(UnusedArgument, lambda b: b(X, embedding=E), id="with the argument by keyword"),
    pytest.param(UnusedArgument, lambda b: b(embedding=E, x=X), id="all by keyword"),
    pytest.param(SecondArgument, lambda b: b(E, X), id="input comes second"),
    pytest.param(SecondArgument, lambda b: b(x=X, unused=None), id="input comes second by keyword"),
    pytest.param(AnyArguments, lambda b: b(X, 1, two=2), id="any arguments"),
    pytest.param(KeywordOnly, lambda b: b(X, scale=2.0), id="keyword only"),
    pytest.param(Flag, lambda b: b(X), id="flag as it is"),
    pytest.param(Flag, lambda b: b(X, False), id="flag changed"),
    pytest.param(Flag, lambda b: b(X, final_relu=False), id="flag changed by keyword"),
    pytest.param(DefaultInput, lambda b: b(X), id="input with a default"),
    pytest.param(DefaultInput, lambda b: b(x=X), id="input with a default by keyword"),
]


@pytest.mark.parametrize(("cls", "call"), CALLS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_call(cls, call, training):
    block = randomize_norms(cls())
    fused = frb.fuse(block).train(training)
    torch.testing.assert_close(call(fused), call(block.train(training)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [Keyword, zoo.FunctionalRelu, frb.reference.BasicBlock])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda b: b(), id="nothing"),
        pytest.param(lambda b: b(X, X), id="too much"),
        pytest.param(lambda b: b(X, other=X), id="unknown keyword"),
    ],
)
def test_wrong_call(cls, call):
    block = cls(*(8, 8) if cls is frb.reference.BasicBlock else ()).eval()
    for either in (block, frb.fuse(block)):
        with pytest.raises(TypeError, match="argument"):
            call(either)


def test_hooks_see_the_arguments_as_they_were_given():
    seen = []
    fused = frb.fuse(UnusedArgument().eval())
    fused.register_forward_pre_hook(lambda m, args, kwargs: seen.append((len(args), sorted(kwargs))), with_kwargs=True)
    fused(X, embedding=E)
    fused(x=X)
    assert seen == [(1, ["embedding"]), (0, ["x"])]


def test_keyword_call_in_a_parent():
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = randomize_norms(Keyword())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(inputs=x)

    parent = Parent().eval()
    torch.testing.assert_close(frb.fuse(parent)(X), parent(X), rtol=1e-4, atol=1e-5)


def test_keyword_call_in_a_compiled_graph():
    block = randomize_norms(Keyword()).eval()
    with torch.no_grad():
        y = torch.compile(frb.fuse(block), backend="eager", fullgraph=True)(inputs=X)
    torch.testing.assert_close(y, block(X), rtol=1e-4, atol=1e-5)
