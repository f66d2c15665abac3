"""Forwards that could tell what records their graph from a tensor: they are not fused, and so compute what they say."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torch.utils.dlpack
from torch import Tensor, fx, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms


def works(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception:  # what a proxy raises is for the forward to catch, too
        return False
    return True


def sized(y: Tensor) -> bool:
    shape = (y + y).shape
    match shape:
        case (_, _, _, _):
            return True
    return False


#: each is True of every tensor of images that is not empty, and made by a layer
ANSWERS: dict[str, Callable[[Tensor], bool]] = {
    "isinstance": lambda x: isinstance(x, Tensor),
    "isinstance of several": lambda x: not isinstance(x, list | tuple),
    "is_tensor": torch.is_tensor,
    "is_floating_point": lambda x: torch.is_floating_point(x) is True,
    "is_contiguous": lambda x: x.is_contiguous() in (True, False),
    "is_cuda": lambda x: x.is_cuda is False,
    "requires_grad": lambda x: x.requires_grad is False,
    "of its data": lambda x: x.data.requires_grad is False,
    "grad": lambda x: x.grad is None,
    "dtype": lambda x: x.dtype is torch.float32,
    "dtype in a set": lambda x: x.dtype in {torch.float32},
    "dtype of a weight": lambda x: {torch.float32: True}.get(x.dtype, False),
    "device in words": lambda x: str(x.device).startswith("cpu"),
    "format": lambda x: works(lambda: f"{x.shape[0]:d}"),
    "shape": lambda x: (x.shape == (len(x), 8, *x.shape[2:])) is True,
    "shape as a pattern": sized,
    "shape in a set": lambda x: x.shape in {x.shape},
    "shape is a Size": lambda x: isinstance(x.shape, torch.Size),
    "size is an int": lambda x: isinstance(x.size(0), int),
    "hasattr": lambda x: not hasattr(x, "tensors"),
    "getattr": lambda x: getattr(x, "tensors", None) is None,
    "hasattr of a result": lambda x: not hasattr(F.relu(x), "mask"),
    "hasattr of data": lambda x: not hasattr(x.data, "mask"),
    "keys": lambda x: not hasattr(x, "keys"),
    "special name": lambda x: not hasattr(x, "__special__"),
    "callable": lambda x: (x + x) is not None and not callable(x),
    "value": lambda x: works(lambda: bool(x.max() < math.inf)),
    "number": lambda x: works(lambda: float(x.mean())),
    "square root": lambda x: works(lambda: math.sqrt(x.shape[0])),
    "integer": lambda x: works(lambda: int(x.shape[0])),
    "index": lambda x: works(lambda: range(x.shape[0])),
    "length": lambda x: works(lambda: len(x)),
    "loop": lambda x: works(lambda: list(x)),
    "loop over the shape": lambda x: works(lambda: tuple(x.shape)),
    "dictionary": lambda x: not works(lambda: dict(**x)),
    "argument": lambda x: works(lambda: torch.eq(x, torch.tensor(1.0))),
    "numpy": lambda x: works(lambda: x.detach().numpy().shape),
    "error": lambda x: not works(lambda: x.reshape(3, 1)),
    "another layer": lambda x: works(lambda: nn.ReLU()(x)),
    "part set": lambda x: works(lambda: operator.setitem(x.clone(), 0, 0)),
    "same": lambda x: x.to(torch.float32) is x,
    "grad mode": lambda x: (x + x) is not None and not torch.is_grad_enabled(),
    "tracing": lambda x: (x + x) is not None and not fx._symbolic_trace.is_fx_symbolic_tracing(),
    "type": lambda x: (x + x) is not None and type(x) is Tensor,
    "class": lambda x: x.__class__ is Tensor,
}
#: behind a stem `x.__class__` and `type(x)` are no Tensor's
BEHIND_STEMS = [name for name in ANSWERS if name != "class"]


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
@pytest.mark.parametrize(("kind", "name"), [(Block, name) for name in ANSWERS] + [(Network, n) for n in BEHIND_STEMS])
def test_what_a_tensor_answers(name, kind, frozen):
    reference = randomize_norms(kind(ANSWERS[name])).eval()
    fused = frb.fuse(reference, frozen=frozen)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(2, 8 if kind is Block else 3, 9, 7, generator=generator)
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


@torch.jit.script
def scripted(x):
    return x * torch.sigmoid(x)


TO_CPP = {
    "Function": Double.apply,
    "script": scripted,
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=True),
    "Variable": torch.autograd.Variable,
    "dlpack": lambda x: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach().contiguous())),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", ["block", "network"])
@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in TO_CPP.items()])
def test_what_torchs_own_code_takes_for_a_tensor(call, kind):
    """It would crash if a proxy said that it is one."""

    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
            self.block = frb.reference.BasicBlock(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(call(self.bn(self.conv(call(x)))))

    class Inside(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn2(self.conv2(call(self.bn1(self.conv1(call(x)))))) + x

    reference = randomize_norms(Passing() if kind == "network" else Inside(lambda x: True)).eval()
    fused = frb.fuse(reference, frozen=True)
    frb.explain(fused)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 8, 6, 5)
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


class Plain(Block):
    """Does what real blocks do besides: logs, looks at its modules, drops images in training."""

    def __init__(self) -> None:
        super().__init__(lambda x: True)
        self.rand, self.config = 0.1, {"act": {"type": "ReLU"}}

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < self.rand:
            return x
        logging.getLogger(__name__).debug("shape %s", x.shape)
        _, _, _, _ = x.shape
        if not callable(self.answer) or type(self.bn1) is nn.Identity or next(self.parameters()).device is None:
            raise RuntimeError
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x
        return F.relu(y, inplace=True)


def test_what_is_harmless_is_fused():
    reference = randomize_norms(Plain()).eval()
    fused, x = frb.fuse(reference, strict=True), torch.randn(2, 8, 6, 5)
    (entry,) = frb.explain(fused)
    assert entry.fused
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


def test_dense_layers_are_no_residual_blocks():
    """They ask `isinstance`, and hold two convolutions."""
    densenet = pytest.importorskip("torchvision").models.densenet121()
    assert not list(frb.explain(frb.fuse(densenet.eval(), strict=True)))


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
