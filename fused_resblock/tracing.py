"""The `torch.fx` graph of a block's forward, or the reason why a graph would not tell all that the forward does.

A forward gets `proxies` in place of tensors. That of a block is refused if it asks them what a tensor would answer
otherwise (`isinstance`, `hasattr`, a branch on a value), also where it catches what a proxy raises.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection
from types import MethodType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from . import leaves
from .generators import Draws
from .per_module import is_kept
from .plan import Unsupported
from .proxies import KIND, MODES, RANDOM, Proxy, unseen_call
from .snapshot import Shared, Snapshot
from .table import first_line

#: two traces at once would each put back, in the end, what the other had put in place of every module's call
_one_at_a_time = threading.RLock()


#: layers that give one tensor
_OF_TENSORS = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.Identity,
    nn.Linear,
    nn.Flatten,
    nn.Dropout,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Upsample,
)


class _Switches(TorchFunctionMode):
    """Refuses a forward that sets the grad mode, whether or not it is another one then."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            self._tracer.refuse(MODES)
        return func(*args, **(kwargs or {}))


class _Tracer(fx.Tracer):
    """Stops at the layers that a plan may hold, and notes what a graph does not show: modes, types, values.

    Args:
        stops: modules whose calls are recorded as they are, besides those layers.
        strict: give the trace up wherever the graph may not be all that the forward does.
    """

    def __init__(self, stops: Collection[nn.Module], strict: bool) -> None:
        super().__init__()
        self._stops = stops
        self._strict = self.proxy_buffer_attributes = strict
        self._modes = self._current_modes()
        self._thread = threading.get_ident()
        self.reason: str | None = None  # why the graph may not be all
        self._proxies: list[weakref.ref[fx.Proxy]] = []

    @staticmethod
    def _current_modes() -> tuple[int, ...]:
        autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        depth = torch.autocast_increment_nesting()  # there is no way to read it alone
        torch.autocast_decrement_nesting()
        return torch.is_inference_mode_enabled(), depth, *autocast

    def doubt(self, reason: str, same: bool = False) -> None:
        """Note that the graph may not be all that the forward does.

        Args:
            reason: why.
            same: whether the answer is the same for all inputs of a signature; then it matters in strict traces alone.

        Raises:
            Unsupported: in a strict trace.
        """
        if self._strict:
            self.refuse(reason)
        if not same:
            self.reason = self.reason or reason

    def refuse(self, reason: str) -> NoReturn:
        """Note a question that a proxy cannot answer; the forward may catch what is raised here.

        Raises:
            Unsupported: always.
        """
        self.reason = self.reason or reason
        raise Unsupported(reason)

    def knows_tensor(self, node: fx.Node) -> bool:
        """Whether a node is a tensor for certain; in a strict trace, whose plan may be called with anything, never."""
        if self._strict:
            return False
        if node.op == "placeholder":  # a network's function is called with a tensor alone
            return True
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        return module in self._stops or isinstance(module, _OF_TENSORS)

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """The graph.

        Raises:
            Unsupported: if a proxy was asked something that it could not answer as a tensor does.
        """
        with Draws() as draws, _Switches(self):
            graph = super().trace(*args, **kwargs)
        if draws.seen:
            self.doubt(RANDOM)
        return graph

    def finish(self) -> None:
        """Look at what is left when the graph is made, and what the root keeps was taken from it.

        Raises:
            Unsupported: in a strict trace, for whatever was noticed.
        """
        for generation in (1, 2):  # what is left is perhaps a cycle, of objects that are young
            if self._kept():
                gc.collect(generation)
        if self._kept():
            self.doubt("its forward keeps a tensor somewhere")
        if self._strict and self.reason is not None:
            raise Unsupported(self.reason)

    def _kept(self) -> bool:
        """Whether anybody still holds a proxy."""
        return any(proxy() is not None for proxy in self._proxies)

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
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # that the forward may catch, and go another way
            self.reason = self.reason or str(error) or type(error).__name__
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """An attribute of a module, as `call_module`."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = Proxy(node, self)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if self._current_modes() != self._modes:
            self.refuse(MODES)
        if kind == "call_function" and getattr(target, "__name__", "").startswith("is_"):
            self.doubt(KIND)
        if self._strict:
            unseen = unseen_call(sys._getframe(1), _Tracer.trace.__code__)
            if unseen is not None:
                self.refuse(f"its forward calls {unseen}")
        return super().create_node(kind, target, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """An argument of a node. Of an `OrderedDict`, as networks return, `torch.fx` would make a plain dictionary."""
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is OrderedDict and not self._strict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            self.refuse(f"its forward cannot be traced: {first_line(error)}")

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("its forward branches on a tensor or on a size")

    def iter(self, obj: fx.Proxy) -> Any:
        self.refuse("its forward loops over a tensor or over a size")


class Traced(NamedTuple):
    """The graph of a forward, and why the forward may do something else with other inputs; None where it does not.

    `stops` are the names of the modules at which it had to stop.
    """

    graph: fx.Graph
    doubt: str | None
    stops: tuple[str, ...]


def graph_of(block: nn.Module, training: bool, stops: Collection[nn.Module] = ()) -> fx.Graph:
    """The graph of a block's forward, which is all that the forward does; hooks do not run, and are not in it.

    A twin of the block is traced: the block itself may be serving in another thread.

    Args:
        block: a residual block, or any module.
        training: the mode of all its modules in which it is traced.
        stops: modules whose calls are recorded as they are, besides the layers that a plan may hold.

    Raises:
        Unsupported: if the forward cannot be traced, asks for what a graph does not show, or leaves something behind on
            the block.
    """
    return _traced(block, training, stops, strict=True).graph


def traced(network: nn.Module, training: bool = False, stops: Collection[nn.Module] = ()) -> Traced:
    """The graph of a network's forward as `graph_of` has it, which may be that of some inputs alone.

    Args:
        network: any module.
        training: the mode of all its modules in which it is traced.
        stops: modules whose calls are recorded as they are, besides the layers that a plan may hold.

    Raises:
        Unsupported: if the forward cannot be traced, or leaves something behind on the network.
    """
    return _traced(network, training, stops, strict=False)


def _traced(module: nn.Module, training: bool, stops: Collection[nn.Module], strict: bool) -> Traced:
    paths = [path for path, inner in module.named_modules() if inner in stops]
    twin = _twin(module, training)
    before, shared = Snapshot(twin), Shared(module)
    try:
        with _one_at_a_time:
            tracer = _Tracer({twin.get_submodule(path) for path in paths}, strict)
            try:
                graph = tracer.trace(twin)
            finally:
                shared.clean()
                if before.restore():
                    raise Unsupported("its forward changes the block's own attributes or buffers")
            tracer.finish()
            return Traced(graph, tracer.reason, tuple(paths))
    except Unsupported:
        raise
    except Exception as error:  # whatever a forward does with a proxy
        raise Unsupported(f"its forward cannot be traced: {first_line(error)}") from None


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
            kept = [(name, value) for name, value in module.__dict__.copy().items() if not is_kept(value)]
            twin.__dict__.update((name, of(value)) for name, value in kept)
            twin.__dict__.update((name, OrderedDict()) for name in leaves.HOOKS if name in twin.__dict__)
            twin.__dict__["training"] = training
    return twins[block]
