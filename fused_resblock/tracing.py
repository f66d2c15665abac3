"""The `torch.fx` graph of a block's forward, or the reason why a graph would not tell all that the forward does.

A forward gets proxies in place of tensors. One that asks a proxy what a tensor would answer otherwise (`isinstance`,
`hasattr`, a branch on a value) is refused, also where it catches what the proxy raises.
"""

from __future__ import annotations

import inspect
import operator
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Collection
from types import FunctionType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from . import leaves
from .per_module import is_kept
from .plan import Unsupported
from .table import first_line

#: two traces at once would each put back, in the end, what the other had put in place of every module's call
_one_at_a_time = threading.RLock()


#: modules whose functions may ask what a proxy is
_KNOWING = ("torch.fx", __name__.partition(".")[0])


class _Proxy(fx.Proxy):
    """Refuses the questions that it would answer otherwise than a tensor does.

    It records `x += y` as what it is, too; a plain proxy has no `__iadd__` and Python falls back to `x + y`.
    """

    tracer: _Tracer

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What `isinstance` asks after `type`; with another answer its caller might go another way."""
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_KNOWING):
            return type(self)
        self.tracer.refuse("its forward asks for the type of a value")

    def __getattr__(self, name: str) -> _Attribute:
        if not hasattr(Tensor, name):
            if name.startswith("__"):
                raise AttributeError(name)
            self.tracer.refuse(f"its forward asks a tensor for {name}")
        if name.startswith("is_") or name == "requires_grad":
            self.tracer.refuse(_KIND)
        return _Attribute(self, name)

    def _number(self, *_: Any) -> NoReturn:
        self.tracer.refuse("its forward makes a number of a tensor or of a size")

    __int__ = __index__ = __float__ = __complex__ = __len__ = __round__ = __array__ = _number


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute of a proxy, a tensor or not."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)


class _Switches(TorchFunctionMode):
    """Refuses a forward that sets the grad mode, whether or not it is another one then."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            self._tracer.refuse(_MODES)
        return func(*args, **(kwargs or {}))


_KIND = "its forward asks what kind of tensor it has"
_MODES = "its forward switches the grad mode or autocast"


class _Tracer(fx.Tracer):
    """Stops at the layers that a plan may hold, and refuses what a graph does not show: grad mode, autocast, types."""

    def __init__(self, stops: Collection[nn.Module]) -> None:
        super().__init__()
        self._stops = stops
        self._modes = self._current_modes()
        self._thread = threading.get_ident()
        self.refused: str | None = None

    @staticmethod
    def _current_modes() -> tuple[int, ...]:
        autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        depth = torch.autocast_increment_nesting()  # there is no way to read it alone
        torch.autocast_decrement_nesting()
        return torch.is_inference_mode_enabled(), depth, *autocast

    def refuse(self, reason: str) -> NoReturn:
        """Give the trace up, also if the forward catches what is raised here.

        Raises:
            Unsupported: always.
        """
        self.refused = self.refused or reason
        raise Unsupported(reason)

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """The graph.

        Raises:
            Unsupported: if a proxy was asked something that it could not answer as a tensor does.
        """
        with _Switches(self):
            graph = super().trace(*args, **kwargs)
        if self.refused is not None:
            raise Unsupported(self.refused)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._stops or leaves.is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """The forward's arguments: a proxy for the first, and the defaults of the others, as plans are called.

        A proxy in the place of a default would answer `last is None` with no.
        """
        _, *parameters = inspect.signature(root_fn).parameters.values()
        named = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)
        if not parameters or not named or any(p.default is p.empty for p in parameters[1:]):
            return super().create_args_for_root(root_fn, *args, **kwargs)
        default = () if parameters[0].default is parameters[0].empty else (parameters[0].default,)
        return root_fn, [self.root, self.create_proxy("placeholder", parameters[0].name, default, {})]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record a call. While it traces, `torch.fx` has those of all threads come here: others' simply run."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """An attribute of a module, as `call_module`."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if self._current_modes() != self._modes:
            self.refuse(_MODES)
        if kind == "call_function" and getattr(target, "__name__", "").startswith("is_"):
            self.refuse(_KIND)
        return super().create_node(kind, target, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """An argument of a node."""
        if isinstance(a, fx.Proxy):
            return a.node
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            self.refuse(f"its forward cannot be traced: {first_line(error)}")

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("its forward branches on a tensor or on a size")

    def iter(self, obj: fx.Proxy) -> Any:
        self.refuse("its forward loops over a tensor or over a size")

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse("its forward takes a tensor for a dictionary")


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
                items[:] = kept
        for buffer, version, kept_buffer in self._buffers:
            if buffer._version != version:
                changed = True
                with torch.no_grad():
                    buffer.copy_(kept_buffer)
        return changed


class _Shared:
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


def graph_of(block: nn.Module, training: bool, stops: Collection[nn.Module] = ()) -> fx.Graph:
    """The graph of the block's forward; hooks do not run, and what they do is not in it.

    A twin of the block is traced: the block itself may be serving in another thread.

    Args:
        block: a residual block, or any module.
        training: the mode of all its modules in which it is traced.
        stops: modules whose calls are recorded as they are, besides the layers that a plan may hold.

    Raises:
        Unsupported: if the forward cannot be traced, or leaves something behind on the block.
    """
    paths = [path for path, module in block.named_modules() if module in stops]
    traced = _twin(block, training)
    before, shared = _Snapshot(traced), _Shared(block)
    try:
        with _one_at_a_time:
            return _Tracer({traced.get_submodule(path) for path in paths}).trace(traced)
    except Unsupported:
        raise
    except Exception as error:  # whatever a forward does with a proxy
        raise Unsupported(f"its forward cannot be traced: {first_line(error)}") from None
    finally:
        shared.clean()
        if before.restore():
            raise Unsupported("its forward changes the block's own attributes or buffers")


def _twin(block: nn.Module, training: bool) -> nn.Module:
    """A copy of the modules alone, in this mode, and of the lists and the like they are in; anything else is shared."""
    twins = {m: m if isinstance(m, torch.jit.ScriptModule) else object.__new__(type(m)) for m in block.modules()}

    def of(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return twins.get(value, value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, of(value.__self__))
        if type(value) in (dict, OrderedDict):
            return type(value)((key, of(item)) for key, item in value.items())
        return type(value)(map(of, value)) if type(value) in (list, tuple, set, deque) else value

    for module, twin in twins.items():
        if twin is not module:
            kept = [(name, value) for name, value in module.__dict__.items() if not is_kept(value)]
            twin.__dict__.update((name, of(value)) for name, value in kept)
            twin.__dict__.update((name, OrderedDict()) for name in leaves.HOOKS if name in twin.__dict__)
            twin.__dict__["training"] = training
    return twins[block]
