"""What a module held before its forward was traced, to be put back: tracing leaves nothing behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from operator import is_
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


def contents(container: Any) -> Any:
    """What a container holds, as a plain dictionary, set or list of its own."""
    plain = next((kind for kind in (dict, set) if isinstance(container, kind)), list)
    return plain(container)


def holds_the_same(container: Any, before: Any) -> bool:
    """Whether a container holds the very objects, in their order, that it held; `before` is its `contents` then."""
    if isinstance(before, dict):
        now, then = [*container, *container.values()], [*before, *before.values()]
    else:
        now, then = list(container), list(before)
    if isinstance(before, set):  # which has no order
        now, then = sorted(now, key=id), sorted(then, key=id)
    return len(now) == len(then) and all(map(is_, now, then))


#: how the names begin under which `torch.fx` puts a module's tensors of numbers on it
CONSTANT = "_tensor_constant"


class Snapshot:
    """Attributes, the contents of containers among them, and buffers of a block, to be put back."""

    def __init__(self, block: nn.Module) -> None:
        attributes = [m.__dict__ for m in block.modules()]
        held = containers(value for of_module in attributes for value in of_module.values())
        self._attributes = attributes
        self._before = [(container, contents(container)) for container in (*attributes, *held)]
        buffers = (b for b in block.buffers() if not (b.is_inference() or torch.nn.parameter.is_lazy(b)))
        self._buffers = [(b, b._version, b.detach().clone()) for b in buffers]

    def restore(self) -> bool:
        """Put everything back; True if anything had changed."""
        changed = False
        for now in self._attributes:
            for name in [name for name in now if name.startswith(CONSTANT)]:
                del now[name]
        for container, before in self._before:
            if not holds_the_same(container, before):
                changed = True
                container.clear()
                (container.extend if isinstance(before, list) else container.update)(before)
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
        held = [value for m in block.modules() for value in vars(m).copy().values() if _is_object(value)]
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
