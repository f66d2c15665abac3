"""What `capture` and `tune` ask of a model and an example before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_device(caller: str, device: torch.device) -> None:
    """Raise unless a device is a CUDA device.

    Args:
        caller: who asks, as the message names it.
        device: the example's.

    Raises:
        RuntimeError: if this machine has no CUDA device at all.
        ValueError: if this is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(f"{caller} must have a CUDA device, got none")
    if device.type != "cuda":
        raise ValueError(f"example must be on a CUDA device, got {device}")


def check(caller: str, model: nn.Module, example: Tensor) -> None:
    """Raise unless a model is in eval mode and on the example's CUDA device, and no CUDA graph is being captured.

    Raises:
        TypeError: if model is no `nn.Module` or example no tensor.
        ValueError: if the model is in train mode or on another device than example, or that is no CUDA device.
        RuntimeError: if there is no CUDA device, or a CUDA graph is being captured.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"example must be a tensor, got {type(example).__name__}")
    check_device(caller, example.device)
    elsewhere = {t.device for t in (*model.parameters(), *model.buffers())} - {example.device}
    if elsewhere:
        raise ValueError(f"example must be on the model's device {min(map(str, elsewhere))}, got {example.device}")
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in eval mode, got train mode: call model.eval()")
    if example.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{caller} must not be called within the capture of a CUDA graph")
