"""A few words of a tensor's memory: edits through `tensor.data` are the ones that PyTorch does not record."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor

_VALUE = attrgetter("value")


def words(tensors: Iterable[Tensor | None]) -> tuple[list[ctypes.c_uint64], list[torch.UntypedStorage]]:
    """Two 8-byte words of each dense CPU filter and one of each vector, and the storages that they are in.

    They may be read as long as the storages are held: another thread may give its tensor another one.

    Each is a miss of every cache: a ResNet-50 has 260 tensors, and is asked at every call.
    """
    found, storages = [], []
    for tensor in tensors:
        if tensor is None or tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() < 8:
            continue
        if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
            storage = tensor.untyped_storage()
            start, size = int(tensor.storage_offset()) * tensor.element_size(), tensor.numel() * tensor.element_size()
            if start + size > storage.nbytes():  # its own by now
                continue
            count = size // 8
            places = {count // 2} if tensor.dim() < 2 else {count // 3, 2 * count // 3}
            address = storage.data_ptr() + start
            found += [ctypes.c_uint64.from_address(address + 8 * place) for place in sorted(places)]
            storages.append(storage)
    return found, storages


def read(sampled: Iterable[ctypes.c_uint64]) -> list[int]:
    """What the words hold now."""
    return list(map(_VALUE, sampled))
