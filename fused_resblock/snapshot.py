"""What a module held before its forward was traced, to be put back: tracing leaves nothing behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn


def containers(values: Iterable[Any]) -> list[Any]:
    """The dictionaries, lists, sets and deques among values, and in them, each once."""
    found: dict[int, Any] = {}
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, dict | list | set | deque) and id(value) not in found:
            found[id(value)] = value
            left.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, tuple):
            left.extend(value)
    return list(found.values())


class Snapshot:
    """Attributes, the contents of lists and dictionaries among them, and buffers of a block, to be put back."""

    def __init__(self, block: nn.Module) -> None:
        self._attributes = [(m.__dict__, dict(m.__dict__)) for m in block.modules()]
        values = containers(value for _, attributes in self._attributes for value in attributes.values())
        self._lists = [(value, list(value)) for value in values if isinstance(value, list | deque)]
        self._sets = [(value, set(value)) for value in values if isinstance(value, set)]
        self._dicts = [(value, dict(value)) for value in values if isinstance(value, dict)]
        self._buffers = [(b, b._version, b.detach().clone()) for b in block.buffers() if not b.is_inference()]

    def restore(self) -> bool:
        """Put everything back; True if anything had changed."""
        changed = False
        for now, _ in self._attributes:
            for name in [name for name in now if name.startswith("_tensor_constant")]:  # what `torch.fx` puts there
                del now[name]
        for now, before in (*self._attributes, *self._dicts):
            if now.keys() != before.keys() or any(now[key] is not before[key] for key in before):
                changed = True
                now.clear()
                now.update(before)
        for items, kept in self._lists:
            if len(items) != len(kept) or any(a is not b for a, b in zip(items, kept, strict=True)):
                changed = True
                items.clear()
                items.extend(kept)
        for members, known in self._sets:
            if members != known:
                changed = True
                members.clear()
                members.update(known)
        for buffer, version, kept_buffer in self._buffers:
            if buffer._version != version:
                changed = True
                with torch.no_grad():
                    buffer.copy_(kept_buffer)
        return changed


class Shared:
    """Dictionaries and lists of objects that modules hold, which a twin shares: no proxy may stay in them.

    Such an object collects features, say, as those of timm do. Nothing else is put back: other threads may use them.
    """

    def __init__(self, block: nn.Module) -> None:
        held = [value for m in block.modules() for value in vars(m).values() if _is_object(value)]
        found = [vars(value) for value in held]
        found += [item for attributes in found for item in attributes.values() if isinstance(item, dict | list)]
        self._before = [(items, items.copy()) for items in found]

    def clean(self) -> None:
        """Take proxies away, or put back what stood in their place."""
        for items, before in self._before:
            if isinstance(items, list):
                if any(isinstance(item, fx.Proxy) for item in items):
                    items[:] = before
                continue
            for key in [key for key, item in items.items() if isinstance(key, fx.Proxy) or isinstance(item, fx.Proxy)]:
                if key in before:
                    items[key] = before[key]
                else:
                    del items[key]


def _is_object(value: object) -> bool:
    known = nn.Module | torch.Tensor | type | FunctionType | MethodType
    return hasattr(value, "__dict__") and not isinstance(value, known)
