"""A few words of a tensor's memory: edits through `tensor.data` are the ones that PyTorch does not record."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_VALUE = attrgetter("value")
_WORDS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


def words(tensors: Iterable[Tensor | None]) -> tuple[list[Any], list[torch.UntypedStorage]]:
    """Two words of each CPU filter and one of each vector, and the storages that they are in.

    They may be read as long as the storages are held: another thread may give its tensor another one. A word has 8
    bytes, or is an element, where the tensor has fewer or does not lie in one piece.

    Each is a miss of every cache: a ResNet-50 has 260 tensors, and is asked at every call.
    """
    found, storages = [], []
    for tensor in tensors:
        if tensor is None or tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.layout is not torch.strided:
            continue
        itemsize, storage = tensor.element_size(), tensor.untyped_storage()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = int(tensor.storage_offset()) * itemsize
        if start + extent * itemsize > storage.nbytes():  # its own by now
            continue
        dense = extent == tensor.numel() and extent * itemsize >= 8
        word = ctypes.c_uint64 if dense else _WORDS[min(itemsize, 8)]
        count = extent * itemsize // 8 if dense else tensor.numel()
        address = storage.data_ptr() + start
        for place in sorted({count // 2} if tensor.dim() < 2 else {count // 3, 2 * count // 3}):
            found.append(word.from_address(address + (8 * place if dense else itemsize * _offset(tensor, place))))
        storages.append(storage)
    return found, storages


def _offset(tensor: Tensor, index: int) -> int:
    """How many elements behind its first one that of an index lies in memory, as if the tensor were flat."""
    offset = 0
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        index, place = divmod(index, size)
        offset += place * stride
    return offset


def read(sampled: Iterable[Any]) -> list[int]:
    """What the words hold now."""
    return list(map(_VALUE, sampled))
