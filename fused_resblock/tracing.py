"""The `torch.fx` graph of a block's forward, or the reason why a graph would not tell all that the forward does."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from . import leaves
from .plan import Unsupported


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; a plain proxy has no `__iadd__` and Python falls back to `x + y`."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Stops at the layers that a plan may hold, and refuses what a graph does not show: grad mode, autocast."""

    def __init__(self, stops: Collection[nn.Module]) -> None:
        super().__init__()
        self._stops = stops
        self._modes = self._current_modes()

    @staticmethod
    def _current_modes() -> tuple[bool, ...]:
        autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._stops or leaves.is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self._current_modes() != self._modes:
            raise Unsupported("its forward switches the grad mode or autocast")
        return super().create_node(*args, **kwargs)


class _Snapshot:
    """Attributes, the contents of lists and dictionaries among them, and buffers of a block, to be put back."""

    def __init__(self, block: nn.Module) -> None:
        self._attributes = [(m.__dict__, dict(m.__dict__)) for m in block.modules()]
        values = [value for _, attributes in self._attributes for value in attributes.values()]
        self._lists = [(value, list(value)) for value in values if isinstance(value, list)]
        self._dicts = [(value, dict(value)) for value in values if isinstance(value, dict)]
        self._buffers = [(b, b._version, b.detach().clone()) for b in block.buffers() if not b.is_inference()]

    def restore(self) -> bool:
        """Put everything back; True if anything had changed."""
        changed = False
        for now, before in (*self._attributes, *self._dicts):
            if now.keys() != before.keys() or any(now[key] is not before[key] for key in before):
                changed = True
                now.clear()
                now.update(before)
        for items, kept in self._lists:
            if len(items) != len(kept) or any(a is not b for a, b in zip(items, kept, strict=True)):
                changed = True
                items[:] = kept
        for buffer, version, kept_buffer in self._buffers:
            if buffer._version != version:
                changed = True
                with torch.no_grad():
                    buffer.copy_(kept_buffer)
        return changed


def graph_of(block: nn.Module, stops: Collection[nn.Module] = ()) -> fx.Graph:
    """The graph of the block's forward; the block is left as it was.

    Args:
        block: a residual block, or any module.
        stops: modules whose calls are recorded as they are, besides the layers that a plan may hold.

    Raises:
        Unsupported: if the forward cannot be traced, or leaves something behind on the block.
    """
    before = _Snapshot(block)
    try:
        return _Tracer(stops).trace(block)
    except Unsupported:
        raise
    except Exception as error:  # whatever a forward does with a proxy
        message = (str(error).splitlines() or [repr(error)])[0]
        raise Unsupported(f"its forward cannot be traced: {message}") from None
    finally:
        if before.restore():
            raise Unsupported("its forward changes the block's own attributes or buffers")
