"""FrozenBatchNorm2d as different libraries define it: the same name, not the same class and not always the same eps."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_resblock as frb
from fused_resblock import frozen_norms
from fused_resblock.reference import BasicBlock


class Buffers(nn.Module):
    """Four buffers, as all of them have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def columns(self) -> tuple[Tensor, ...]:
        return tuple(b.reshape(1, -1, 1, 1) for b in (self.weight, self.bias, self.running_mean, self.running_var))


class Detr(Buffers):
    """DETR: eps is a number inside of forward."""

    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = self.columns()
        scale = w * (v + 1e-5).rsqrt()
        return x * scale + (b - m * scale)


class MaskRcnnBenchmark(Buffers):
    """maskrcnn-benchmark: no eps at all."""

    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = self.columns()
        scale = w * v.rsqrt()
        return x * scale + (b - m * scale)


class Detectron2(Buffers):
    """detectron2: batch_norm where no gradient is wanted, arithmetic where one is."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            w, b, m, v = self.columns()
            scale = w * (v + self.eps).rsqrt()
            return x * scale.to(x.dtype) + (b - m * scale).to(x.dtype)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class Different(Detectron2):
    """Bears the name and the buffers, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class EpsOutsideOfTheRoot(Detectron2):
    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = self.columns()
        return (x - m) / (v.sqrt() + self.eps) * w + b


class Mode(Detr):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if self.training else 2)


class Updates(Detr):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if x.requires_grad:
            self.running_mean.add_(1)
        return y


class Detached(Detr):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()) + 0 * x


class Flag(Detr):
    """A setting of its own, which other instances may lack."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.doubled = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if getattr(self, "doubled", False) else 1)


class EpsOfTheClass(Detr):
    eps = 1e-3


class EpsAsTensor(Detectron2):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.eps = torch.tensor(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = self.columns()
        scale = w * (v + self.eps).rsqrt()
        return x * scale + (b - m * scale)


class Columns(Detr):
    """Buffers that are broadcast as they are."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        for name, buffer in list(self._buffers.items()):
            self.register_buffer(name, buffer.reshape(1, -1, 1, 1))


class OneForAll(Detr):
    def __init__(self, channels: int) -> None:
        super().__init__(1)


def torchvision_norm(channels: int) -> nn.Module:
    """torchvision's own, with random buffers and eps 0."""
    norm = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(channels, eps=0.0)
    norm.load_state_dict(Buffers(channels).state_dict())
    return norm


def timm_norm(channels: int) -> nn.Module:
    """timm's, which has an activation of its own; here none."""
    norm = pytest.importorskip("timm.layers").FrozenBatchNormAct2d(channels, apply_act=False)
    norm.load_state_dict(Buffers(channels).state_dict())
    return norm


for cls in (Detr, MaskRcnnBenchmark, Detectron2, Different, EpsOutsideOfTheRoot, Mode, Updates, Detached, Flag):
    cls.__name__ = "FrozenBatchNorm2d"

NORMS = [
    pytest.param(Detr, id="DETR"),
    pytest.param(MaskRcnnBenchmark, id="maskrcnn-benchmark"),
    pytest.param(Detectron2, id="detectron2"),
    pytest.param(Different, id="something else"),
    pytest.param(EpsOutsideOfTheRoot, id="eps outside of the root"),
    pytest.param(Mode, id="mode"),
    pytest.param(Updates, id="updates"),
    pytest.param(Detached, id="detached"),
    pytest.param(Flag, id="flag"),
    pytest.param(EpsOfTheClass, id="eps of the class"),
    pytest.param(EpsAsTensor, id="eps as tensor"),
    pytest.param(Columns, id="columns"),
    pytest.param(OneForAll, id="one for all"),
    pytest.param(torchvision_norm, id="torchvision"),
    pytest.param(timm_norm, id="timm"),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["no grad", "grad", "train", "compiled"])
def test_same_as_its_own_forward(norm, mode):
    block = BasicBlock(8, 8, norm_layer=norm).train(mode == "train")
    fused = frb.fuse(block)
    x = torch.randn(2, 8, 5, 5)
    if mode in ("no grad", "compiled"):
        with torch.no_grad():
            call = torch.compile(fused, backend="eager") if mode == "compiled" else fused
            torch.testing.assert_close(call(x), block(x), rtol=1e-4, atol=1e-5)
        return
    results = []
    for module in (fused, block):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_fused_in_either_mode(norm, request):
    other = request.node.callspec.id not in ("DETR", "maskrcnn-benchmark", "detectron2", "torchvision", "timm")
    fused = frb.fuse(BasicBlock(8, 8, norm_layer=norm))
    for training in (False, True):
        assert frb.explain(fused.train(training))[0].fused != other


def test_compiled_where_no_class_has_been_tried():
    """As in a process that loads a fused model."""
    fused, x = frb.fuse(BasicBlock(8, 8, norm_layer=Detr).eval(), strict=True), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        expected = fused(x)
        frozen_norms._tried.clear()
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_classes_are_let_go():
    """Those that were tried, and what their forwards hold."""

    class Own(Detr):
        pass

    assert frozen_norms.eps_of(Own(4)) == 1e-5
    gone = weakref.ref(Own)
    del Own
    gc.collect()
    assert gone() is None


def test_tried_under_a_mode():
    class Own(Detr):
        pass

    with FakeTensorMode():
        assert frozen_norms.eps_of(Own(4)) == 1e-5


def test_eps_edited_behind_fuse():
    """torchvision's `overwrite_eps`, called on a model that was fused before."""
    block = BasicBlock(8, 8, norm_layer=torchvision_norm).eval()
    fused = frb.fuse(block)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        fused(x)
        for module in (*block.modules(), *fused.modules()):
            if hasattr(module, "eps"):
                module.eps = 0.5
        torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-5)
