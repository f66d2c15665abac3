"""Networks and blocks of them, and the ways to run one: eager, folded, cuDNN's fused chain, this library, compile."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fused_resblock as frb
from fused_resblock.demo.inputs import make_model

from ..cases import part_of
from . import onnx_session
from .device import Device

Call = Callable[[Tensor], Tensor]
#: images with which the running statistics of a random network are found
CALIBRATION = 8
#: fields of a case by which `bench.csv` names it
LABEL = ("network", "part", "dtype", "batch", "group")


@dataclass(frozen=True)
class Case:
    """A network, or a part of one (`cases.part_of`), at one batch size, and the providers that take turns on it.

    `dtype` is one of `operations.DTYPES`.
    """

    network: str
    batch: int
    part: str = "whole"
    group: str = "main"
    size: int = 224
    dtype: str = "fp16"

    def __str__(self) -> str:
        return f"{self.network} {self.part} {self.dtype} batch {self.batch} {self.group}"

    def label(self) -> dict[str, object]:
        """What its rows have in common."""
        return {name: getattr(self, name) for name in LABEL}


@torch.no_grad()
def prepare(case: Case, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The model in eval mode and its input, both channels_last, in `dtype` and on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    model = make_model(case.network, None, images[:CALIBRATION].repeat(-(-2 // case.batch), 1, 1, 1))
    model = model.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return part_of(model, case.part, images.to(device, dtype))


def fold(model: nn.Module) -> nn.Module:
    """A copy with every batch norm folded into the convolution in front of it, by torch's own function."""
    folded = deepcopy(model)
    for module in list(folded.modules()):
        children = dict(module.named_children())
        for name, child in children.items():
            if isinstance(module, nn.Sequential):
                other = str(int(name) + 1) if name.isdigit() else ""
            else:
                other = name.replace("conv", "bn")
            norm = children.get(other)
            if isinstance(child, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(child, norm))
                setattr(module, other, nn.Identity())
    return folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _compiled(model: nn.Module, x: Tensor, mode: str | None) -> Call:
    """`torch.compile`, by default or with max-autotune (without its own graphs) and frozen weights."""
    torch._dynamo.reset()
    if mode is None:
        compiled = torch.compile(model)
        compiled(x)
        return compiled
    compiled = torch.compile(model, mode=mode)
    with torch._inductor.config.patch(freezing=True):
        compiled(x)
    return compiled


def _fused(model: nn.Module, x: Tensor, backend: str, stages: bool | str = True, frozen: bool = False) -> Call:
    return frb.fuse(model, backend=backend, stages=stages, frozen=frozen)


@torch.no_grad()
def in_order(model: nn.Module, x: Tensor) -> Call:
    """The fused model, with no kernel started before the one before it has ended (`kernels.dependent`)."""
    fused = frb.fuse(model)
    with patch.dict(os.environ, FUSED_RESBLOCK_PDL="0"):
        fused(x)
    return fused


#: group -> provider -> makes the callable for a model in eval mode and its input
GROUPS: dict[str, dict[str, Callable[[nn.Module, Tensor], Call]]] = {
    "main": {
        "eager": lambda model, x: model,
        "folded": lambda model, x: fold(model),
        "cudnn": partial(_fused, backend="cudnn"),
        "fused": partial(_fused, backend="auto"),
        "frozen": partial(_fused, backend="auto", frozen=True),
        "triton": partial(_fused, backend="triton"),
        "stages": partial(_fused, backend="triton", stages="kernel"),
        "in-order": in_order,
    },
    "by-stage": {
        "eager": lambda model, x: model,
        "conv-by-conv": partial(_fused, backend="auto", stages=False),
        "fused": partial(_fused, backend="auto"),
    },
    "compile": {
        "eager": lambda model, x: model,
        "fused": partial(_fused, backend="auto"),
        "compile": partial(_compiled, mode=None),
    },
    "max-autotune": {
        "eager": lambda model, x: model,
        "fused": partial(_fused, backend="auto"),
        "max-autotune": partial(_compiled, mode="max-autotune-no-cudagraphs"),
    },
    "engines": {
        "eager": lambda model, x: model,
        "fused": partial(_fused, backend="auto"),
        "onnxruntime": onnx_session.Session,
    },
}
#: as "main", with L2 emptied before each call, or filled by the same call
L2_GROUPS = ("cold", "warm")
GROUPS |= {l2: {name: GROUPS["main"][name] for name in ("eager", "folded", "cudnn", "fused")} for l2 in L2_GROUPS}
NO_GRAPH = ("onnxruntime",)  # it launches on the stream that it was made with


def _own_bytes(call: object, model: nn.Module) -> int:
    """Bytes of the parameters and buffers that a provider holds in place of the model's."""
    if not isinstance(call, nn.Module):
        return 0
    shared = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in call.state_dict().values()}
    return sum(size for place, size in own.items() if place not in shared)


class Made:
    """Makes a provider's callable, as it is or as a CUDA graph, and notes what memory it takes beside the weights.

    What is held after the first call counts (workspaces, weights in another form), and the peak of a call.
    """

    def __init__(
        self, make: Callable[[nn.Module, Tensor], Call], model: nn.Module, x: Tensor, device: Device, graph: bool
    ) -> None:
        self._make, self._model = partial(make, model, x), model
        self._x, self._device, self._graph = x, device, graph
        self.extra_bytes: int | None = None

    def __call__(self) -> Call:
        gc.collect()
        before, _ = self._device.memory()
        call = self._make()
        call(self._x)  # folds weights, chooses algorithms
        result: Call = call
        if self._graph:
            replay = self._device.capture(lambda: call(self._x))
            result = lambda _, kept=call: replay()  # noqa: E731  # the graph reads the weights that `call` holds
        else:
            self._device.memory()
            call(self._x)
        self._device.synchronize()
        self.extra_bytes = self._device.memory()[1] - before - _own_bytes(call, self._model)
        return result


def providers(case: Case, model: nn.Module, x: Tensor, device: Device) -> dict[str, Made]:
    """The group's providers, each in eager mode (`fused`) and as a CUDA graph (`fused+graph`)."""
    made = {}
    for name, make in GROUPS[case.group].items():
        if name == "onnxruntime" and not onnx_session.available():
            continue
        for graph in (False,) if name in NO_GRAPH else (False, True):
            made[name + "+graph" * graph] = Made(make, model, x, device, graph)
    return made
