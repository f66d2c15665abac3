"""Batch norm folded into weights, and a cache that notices every change of what went in."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..params import BatchNorm, Conv

Parts = tuple[Tensor | None, ...]


def _stamp(parts: Parts) -> tuple[Any, ...]:
    """Identity, version and address of each tensor: an in-place edit, `.data =`, `.to()` or a new tensor changes it."""
    return tuple(None if t is None else (id(t), t._version, t.data_ptr()) for t in parts)


class TensorCache:
    """Values computed from tensors, kept until one of the tensors is edited, moved, replaced or freed.

    The key is the first tensor's identity; the stamp covers all of them. An edit through `tensor.data` is the one that
    PyTorch itself does not record: call `clear` after it.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[tuple[Any, ...], Any, weakref.ref[Tensor]]] = {}

    def get(self, parts: Parts, dtype: torch.dtype, compute: Callable[[], Any]) -> Any:
        """The value for `parts`, whose first is not None, in `dtype`, from the cache or from `compute`."""
        head = parts[0]
        assert head is not None
        try:
            stamp = (dtype, *_stamp(parts))
        except RuntimeError:  # inference tensors carry no version: nothing tells when they change
            return compute()
        key = id(head)
        entry = self._entries.get(key)
        if entry is not None and entry[0] == stamp and entry[2]() is head:
            return entry[1]
        value = compute()
        entries = self._entries
        self._entries[key] = (stamp, value, weakref.ref(head, lambda _: entries.pop(key, None)))
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


def scale_shift(norm: BatchNorm, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """scale = weight / sqrt(var + eps) and shift = bias - mean * scale, each `[C]` in `dtype`."""
    scale = torch.rsqrt(norm.var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = -norm.mean.to(dtype) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.to(dtype)


@torch.no_grad()
def fold(conv: Conv, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight (channels_last) and bias with the norm folded in: computed in fp32 or wider, rounded once to `dtype`.

    `norm(conv(x, w) + b) = conv(x, scale*w) + (shift + scale*b)`.
    """
    weight = conv.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    channels = weight.shape[0]
    if conv.norm is None:
        folded = weight
        bias = torch.zeros(channels, dtype=wide, device=weight.device) if conv.bias is None else conv.bias
    else:
        scale, bias = scale_shift(conv.norm, wide)
        folded = weight.to(wide) * scale[:, None, None, None]
        if conv.bias is not None:
            bias = bias + conv.bias.to(wide) * scale
    return folded.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype)
