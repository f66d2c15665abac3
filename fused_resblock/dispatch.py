"""How a fused operation is called: straight on a backend, through torch's dispatcher, or as torch's own operations.

The dispatcher costs several microseconds and is needed only for autograd, tracing and function transforms.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, ops
from .backends.folding import uncached
from .params import PLAIN_TYPES, BatchNorm, Conv, Epilogue
from .transforms import composed


def plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all of these are ordinary dense tensors in an ordinary call: no gradient wanted, nothing traced.

    None counts as one: it stands for a parameter that is absent.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    grad = torch.is_grad_enabled()
    return all(
        t is None or (type(t) in PLAIN_TYPES and t.layout is torch.strided and not (grad and t.requires_grad))
        for t in tensors
    )


def trained(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient may be taken of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _folds_anyway(x: Tensor, backend: str) -> bool:
    """Whether folded weights are needed even if they serve one call only, as oneDNN does; a later call may need them.

    Not in fp64, in which `gradcheck` edits one number after the other, and no version records that.
    """
    return x.device.type == "cpu" and x.dtype != torch.float64 and backends.check_name(backend) != "triton"


def _learned(weights: Iterable[Tensor], parameters: Iterable[Tensor | None]) -> int:
    """What `ops` wants to know of the tensors that a graph is given which Dynamo makes; 0 outside of one.

    An export that traces by other means has no parameters meanwhile, and torch's own operations run its graph.

    Args:
        weights: those that have to be parameters for anything to be cached.
        parameters: all tensors but the activations.
    """
    if not torch.compiler.is_dynamo_compiling():
        return 0
    if not all(isinstance(weight, torch.nn.Parameter) for weight in weights):
        return ops.UNCACHED
    return sum(1 << i for i, tensor in enumerate(parameters) if isinstance(tensor, torch.nn.Parameter))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast wants convolutions in on x's device; None where it is off, and for fp64, which it skips."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def conv_bn_act(x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue, *, backend: str = "auto") -> Tensor:
    """`functional.conv_bn_act` on arguments that are known to fit."""
    parameters = (*conv.tensors(), *epilogue.tensors())
    tensors = (x, other, *parameters)
    if plain(tensors):
        return backends.conv_bn_act(x, conv, other, epilogue, backend=backend)
    if composed(tensors):
        return backends.eager.conv_bn_act(x, conv, other, epilogue)
    if not torch.compiler.is_compiling() and trained(parameters) and not _folds_anyway(x, backend):
        with uncached():
            return ops.conv_bn_act(x, conv, other, epilogue, backend=backend)
    weights = [conv.weight] + ([] if epilogue.shortcut is None else [epilogue.shortcut.weight])
    return ops.conv_bn_act(x, conv, other, epilogue, backend=backend, learned=_learned(weights, parameters))


def bn_act(
    x: Tensor, norm: BatchNorm | None, other: Tensor | None, epilogue: Epilogue, *, backend: str = "auto"
) -> Tensor:
    """`functional.bn_act` on arguments that are known to fit."""
    parameters = (*(norm[:4] if norm else ()), *epilogue.tensors())
    tensors = (x, other, *parameters)
    if plain(tensors):
        return backends.bn_act(x, norm, other, epilogue, backend=backend)
    if composed(tensors):
        return backends.eager.bn_act(x, norm, other, epilogue)
    if not torch.compiler.is_compiling() and trained(parameters):
        with uncached():
            return ops.bn_act(x, norm, other, epilogue, backend=backend)
    norms = [present for present in (norm, epilogue.residual_norm) if present is not None]
    weights = [present.mean if present.weight is None else present.weight for present in norms]
    return ops.bn_act(x, norm, other, epilogue, backend=backend, learned=_learned(weights, parameters))
