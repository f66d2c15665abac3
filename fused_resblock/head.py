"""What stands behind the blocks, on a CPU: a global average pool, and a classifier whose weight is packed once.

Each stays the module that it is and is called as ever. In fp16 and bf16 alone: in fp32 oneDNN's product and the plain
sum of a window lose more digits than what torch runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from . import backends, dispatch, flat
from .backends import onednn
from .frozen import Freezable
from .swap import intact, own_class, swapped_class, undone


@cache
def _applies(device: str, dtype: torch.dtype, backend: str) -> bool:
    """Whether heads are fast on tensors of this device type and dtype."""
    if device != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return backends.resolve(backend, backends.Problem(device, dtype)).backend == "onednn"


class Head(Freezable):
    """Mixin of a module behind the blocks: computes as ever under autograd and autocast, and while it is traced."""

    WHY: ClassVar[str]  # what makes it fast, in words

    def forward(self, input: Tensor) -> Tensor:
        if undone(Head, self):
            return type(self).forward(self, input)
        y = self._fast(input)
        return super().forward(input) if y is None else y

    def _fast(self, x: Any) -> Tensor | None:
        if (
            "_fused_backend" not in self.__dict__  # somebody made another one by its class
            or not isinstance(x, Tensor)
            or not dispatch.plain((x,))
            or torch.is_grad_enabled()
            or dispatch.autocast_dtype(x) is not None
        ):
            return None
        fits = x.numel() > 0 and intact(_MIXINS[own_class(self)], self) and self.applies(x)
        bound = self._bind(x) if fits else None
        if bound is None:
            return None
        made_of, call = bound
        flat.note((self,), made_of, lambda x: call(x[0]))
        return call(x)

    def applies(self, example: Tensor) -> bool:
        """Whether the module may be fast on tensors of this device and dtype."""
        return _applies(example.device.type, example.dtype, backends.check_name(self.__dict__["_fused_backend"]))

    def _bind(self, x: Tensor) -> tuple[object, Callable[[Tensor], Tensor]] | None:
        """What computes the result for such an x, behind what that is made of (see `flat.Ran`).

        None if such an x, or the module as it is now, is for the module's own forward.
        """
        raise NotImplementedError


class GlobalPool(Head):
    """Mixin of an average pool to a single pixel: a window of the whole image, which torch runs faster."""

    WHY = "a window of the whole image"

    def _bind(self, x: Tensor) -> tuple[object, Callable[[Tensor], Tensor]] | None:
        size: Any = self.output_size
        if size not in (1, (1, 1)) or x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            return None
        return self, partial(F.avg_pool2d, kernel_size=x.shape[2:])


class Classifier(Head):
    """Mixin of a Linear: its weight packed as oneDNN wants it, until it changes."""

    WHY = "oneDNN on a prepacked weight"

    def _bind(self, x: Tensor) -> tuple[object, Callable[[Tensor], Tensor]] | None:
        parameters = self._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if weight is None or "bias" not in parameters:  # computed by somebody, as pruning does
            return None
        if not dispatch.plain((weight, bias)) or x.dtype != weight.dtype or x.device != weight.device:
            return None
        if x.dim() != 2 or x.shape[1] != weight.shape[1]:
            return None
        packed = onednn.packed_linear(weight, bias)
        return packed, partial(onednn.linear, packed=packed, bias=bias)


_MIXINS: dict[type[nn.Module], type[Head]] = {nn.AdaptiveAvgPool2d: GlobalPool, nn.Linear: Classifier}


def find_heads(module: nn.Module, graph: fx.Graph) -> list[str]:
    """The names, within a network, of the pools and classifiers in the graph of its forward."""
    called = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module")
    return [path for path in called if own_class(module.get_submodule(path)) in _MIXINS]


def fuse_head(module: nn.Module, backend: str) -> None:
    """Give a module that `find_heads` found its fast class."""
    if not isinstance(module, Head):
        module.__class__ = swapped_class(_MIXINS[type(module)], type(module))
    module.__dict__["_fused_backend"] = backend


def is_fast(module: Head, example: Tensor) -> bool:
    """Whether a head would be fast now in a network with parameters such as `example`."""
    if "_fused_backend" not in module.__dict__:
        return False
    weight = module._parameters.get("weight") if isinstance(module, Classifier) else example
    usable = weight is not None and weight.dtype == example.dtype  # else computed by somebody, as pruning does
    return usable and "forward" not in module.__dict__ and module.applies(example)
