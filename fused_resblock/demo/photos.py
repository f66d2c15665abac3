"""Whole networks on photographs: how far the fused outputs are from the eager ones, and how fast each block is."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .timing import interleaved

#: how many times eager PyTorch's own error (against float64, same dtype) the fused network's error may reach, and how
#: many roundings of the largest output it may have on top: chance decides which of two good results lies closer.
SLACK, ROUNDINGS = 2.0, 2.0


def capture_inputs(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """Run `model(x)` once and return the tensor that each named submodule was called with."""
    inputs: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def keep(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name] = args[0].detach().clone()

        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def errors(model: nn.Module, eager: Tensor, fused: Tensor, x: Tensor) -> dict[str, Any]:
    """Compare the outputs with each other and with the same network in float64.

    Returns:
        `max_abs_error` and `max_rel_error` (that over the largest output) of fused against eager; `eager_error` and
        `fused_error`, the largest absolute errors against float64; `parity`, whether the latter keeps to
        `SLACK` and `ROUNDINGS`; `same_top1`, how many images have the same largest output, and `top1`, which that is
        for each image in fused.
    """
    eager, fused = eager.double(), fused.double()
    with torch.no_grad():
        exact = deepcopy(model).double()(x.double())
    largest = exact.abs().max().item()
    eager_error = (eager - exact).abs().max().item()
    fused_error = (fused - exact).abs().max().item()
    max_abs_error = (fused - eager).abs().max().item()
    return {
        "max_abs_error": max_abs_error,
        "max_rel_error": max_abs_error / largest if largest else max_abs_error,
        "eager_error": eager_error,
        "fused_error": fused_error,
        "parity": fused_error <= SLACK * eager_error + ROUNDINGS * torch.finfo(x.dtype).eps * largest,
        "same_top1": int((eager.argmax(1) == fused.argmax(1)).sum()),
        "top1": fused.argmax(1).tolist(),
    }


def measure(
    model: nn.Module, x: Tensor, runs: int, progress: Callable[[int], Callable[[], object]] = lambda _: lambda: None
) -> dict[str, Any]:
    """Compare a network with its fused copy on one batch: outputs, latency, and the latency of each block.

    The blocks are timed one by one on the activations that reach them inside the network. A block that was left
    alone is timed as well: its two figures then show the noise.

    Args:
        model: in eval mode, channels_last, on the device and in the dtype of `x`.
        x: `[N, 3, H, W]`, channels_last.
        runs: timed rounds.
        progress: given the number of rounds to come, returns what to call after each.

    Returns:
        The figures of `errors`; `eager_ms`, `fused_ms` and `speedup` of the whole; the same for every block in
        `blocks`, with `name`, `class`, `fused`, `backend` and `reason`.
    """
    import fused_resblock as frb

    fused = frb.fuse(model)
    with torch.no_grad():
        result = errors(model, model(x), fused(x), x)
    records = list(frb.explain(fused))
    inputs = capture_inputs(model, [record.name for record in records], x)
    tick = progress(runs * (1 + len(records)))
    result |= _latency(model, fused, x, runs, tick)
    result["blocks"] = []
    for record in records:
        blocks = model.get_submodule(record.name), fused.get_submodule(record.name)
        row = {"name": record.name, "class": type(blocks[0]).__name__, "fused": record.fused}
        row |= {"backend": record.backend, "reason": record.reason}
        row |= _latency(*blocks, inputs.pop(record.name), runs, tick)
        result["blocks"].append(row)
    return result


def _latency(eager: nn.Module, fused: nn.Module, x: Tensor, runs: int, tick: Callable[[], object]) -> dict[str, float]:
    times = interleaved({"eager": lambda: eager(x), "fused": lambda: fused(x)}, runs, x.device, tick)
    return {
        "eager_ms": times["eager"],
        "fused_ms": times["fused"],
        "speedup": times["eager"] / times["fused"],
    }
