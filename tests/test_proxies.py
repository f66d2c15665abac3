"""Forwards that could tell what records their graph from a tensor: they are not fused, and so compute what they say."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms


def works(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception:  # what a proxy raises is for the forward to catch, too
        return False
    return True


#: each is True of every tensor of images that is not empty
ANSWERS: dict[str, Callable[[Tensor], bool]] = {
    "isinstance": lambda x: isinstance(x, Tensor),
    "isinstance of several": lambda x: not isinstance(x, list | tuple | fx.Proxy),
    "is_tensor": torch.is_tensor,
    "is_floating_point": lambda x: torch.is_floating_point(x) is True,
    "is_contiguous": lambda x: x.is_contiguous() in (True, False),
    "is_cuda": lambda x: x.is_cuda is False,
    "requires_grad": lambda x: x.requires_grad is False,
    "class": lambda x: x.__class__ is Tensor,
    "shape is a Size": lambda x: isinstance(x.shape, torch.Size),
    "size is an int": lambda x: isinstance(x.size(0), int),
    "hasattr": lambda x: not hasattr(x, "tensors"),
    "getattr": lambda x: getattr(x, "tensors", None) is None,
    "hasattr of a result": lambda x: not hasattr(F.relu(x), "mask"),
    "value": lambda x: works(lambda: bool(x.max() < math.inf)),
    "number": lambda x: works(lambda: float(x.mean())),
    "square root": lambda x: works(lambda: math.sqrt(x.shape[0])),
    "integer": lambda x: works(lambda: int(x.shape[0])),
    "index": lambda x: works(lambda: range(x.shape[0])),
    "length": lambda x: works(lambda: len(x)),
    "loop": lambda x: works(lambda: list(x)),
    "loop over the shape": lambda x: works(lambda: tuple(x.shape)),
    "keys": lambda x: not works(lambda: dict(**x)),
    "argument": lambda x: works(lambda: torch.eq(x, torch.tensor(1.0))),
    "numpy": lambda x: works(lambda: x.detach().numpy().shape),
}


class Block(nn.Module):
    """A ReLU in the end, for tensors."""

    def __init__(self, answer: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.answer = answer
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x
        return F.relu(y) if self.answer(y) else y


class Network(nn.Module):
    def __init__(self, answer: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.answer = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), answer
        self.block = Block(lambda x: True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.block(self.relu(y) if self.answer(y) else y)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("kind", [Block, Network])
@pytest.mark.parametrize("answer", [pytest.param(answer, id=name) for name, answer in ANSWERS.items()])
def test_what_a_tensor_answers(answer, kind, frozen):
    reference = randomize_norms(kind(answer)).eval()
    fused = frb.fuse(reference, frozen=frozen)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(2, 8 if kind is Block else 3, 9, 7, generator=generator)
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


@contextmanager
def outside() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu"):
        yield


SWITCHES = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
}


class Switching(Block):
    def __init__(self, switch: Callable) -> None:
        super().__init__(lambda x: True)
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        with self.switch():
            y = self.bn2(y)
        return F.relu(y + x)


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, outside], ids=["", "no_grad", "autocast"])
@pytest.mark.parametrize("switch", [pytest.param(switch, id=name) for name, switch in SWITCHES.items()])
def test_modes_of_the_forward_are_seen_in_whatever_modes_it_is_fused(switch, around):
    reference = randomize_norms(Switching(switch)).eval()
    with around():
        fused = frb.fuse(reference)
    (entry,) = frb.explain(fused)
    assert not entry.fused
    assert "grad mode or autocast" in entry.reason
    x = torch.randn(2, 8, 6, 5)
    for mode in (contextlib.nullcontext, outside):
        with mode():
            y, expected = fused(x), reference(x)
        assert (y.dtype, y.requires_grad) == (expected.dtype, expected.requires_grad)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
