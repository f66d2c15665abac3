"""Batch norm folded into weights, and a cache that notices every change of what went in."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..params import BatchNorm, Conv
from ..recorder import Recorder
from ..sampling import read, words
from ..touched import listen, when

Parts = tuple[Tensor | None, ...]

_bypass: ContextVar[bool] = ContextVar("bypass", default=False)


@contextmanager
def uncached() -> Iterator[None]:
    """Within this context nothing is cached: for weights that are being trained, or perturbed one by one."""
    token = _bypass.set(True)
    try:
        yield
    finally:
        _bypass.reset(token)


def bypassed() -> bool:
    """Whether this is within `uncached`."""
    return _bypass.get()


_kept: Recorder[object] = Recorder("kept")
#: a context: within it all that kernels are given besides activations is put into a list, to stay in memory
keeping = _kept.recording
#: put a value into that list, if this is within such a context
keep = _kept.note
#: the list, None if this is not within such a context
kept = _kept.current


def _stamp(parts: Parts, places: Sequence[int]) -> tuple[Any, ...]:
    """Identity, version and place of each tensor: an in-place edit, `.data =`, `.to()` or a new tensor changes it."""
    stamp = (
        None if t is None else (id(t), t._version, when(t), t.storage_offset(), t.shape, t.stride()) for t in parts
    )
    return *places, *stamp


class _Entry(NamedTuple):
    stamp: tuple[Any, ...]
    words: list[ctypes.c_uint64]
    seen: list[int]
    value: Any
    storages: list[weakref.ref[torch.UntypedStorage]]


class TensorCache:
    """Values computed from tensors, kept until one of the tensors is edited, moved, replaced or freed.

    An edit through `tensor.data` is the one that PyTorch does not record. On the CPU sampled words are compared as
    well, so one that changes whole tensors (a moving average, say) is seen; after others, and on a GPU, call `clear`.
    An entry goes when the storage of one of its tensors does, since another tensor may then come to the same address (a
    weak reference to the tensor itself would forbid `swap_tensors`), or as the oldest of more than `LIMIT`.
    """

    LIMIT = 8192

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def get(self, parts: Parts, settings: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """The value for `parts`, whose first is not None, and for `settings`, from the cache or from `compute`."""
        value = self._get(parts, settings, compute)
        keep(value)
        return value

    def _get(self, parts: Parts, settings: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        if _bypass.get():
            return compute()
        head = parts[0]
        assert head is not None
        held = [t.untyped_storage() for t in parts if t is not None]  # until words of it are read: others may let it go
        try:
            stamp = (settings, *_stamp(parts, [storage.data_ptr() for storage in held]))
        except RuntimeError:  # inference tensors carry no version: nothing tells when they change
            return compute()
        key = id(head)
        entry = self._entries.get(key)
        if entry is not None and entry.stamp == stamp and read(entry.words) == entry.seen:
            return entry.value
        listen()
        sampled, sources = words(parts)
        seen = read(sampled)  # before what is computed: another thread may be editing
        del sources
        value = compute()
        entries = self._entries
        storages = [weakref.ref(storage, lambda _: entries.pop(key, None)) for storage in held]
        entries[key] = _Entry(stamp, sampled, seen, value, storages)
        if len(entries) > self.LIMIT:
            entries.pop(next(iter(entries)))
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


def scale_shift(norm: BatchNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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
        folded = weight.clone()  # an alias would keep the storage alive that the cache waits for
        bias = torch.zeros(channels, dtype=wide, device=weight.device) if conv.bias is None else conv.bias
    else:
        scale, bias = scale_shift(conv.norm, wide)
        folded = weight.to(wide) * scale[:, None, None, None]
        if conv.bias is not None:
            bias = bias + conv.bias.to(wide) * scale
    return folded.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype)
