"""CUDA graphs of a model: one launch a forward where Python and the driver would need one for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import leaves, on_cuda
from .backends.folding import keeping
from .program import signature
from .watch import Guard

#: forwards before a capture: they compile kernels, choose algorithms and allocate workspaces, none of which may happen
#: in a capture
WARM_UP = 3


class _Graph(NamedTuple):
    """A recorded forward: its input's memory, the launch, its output's memory, and all that has to stay in memory."""

    x: Tensor
    replay: Callable[[], None]
    y: Any
    signature: tuple[object, ...]
    kept: list[object]


def record(call: Callable[[], Any], pool: Any, stream: Any) -> tuple[Callable[[], None], Any]:
    """Record what a call launches on a CUDA device.

    Args:
        call: has been called before, so that nothing is compiled or chosen in it.
        pool: of memory, shared with other graphs that do not run at the same time; see `torch.cuda.graph`.
        stream: where. Graphs of a pool that are recorded on one stream share what each lets go of.

    Returns:
        A function that launches all of it again, and the call's result, which that overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(stream.device), torch.cuda.graph(graph, pool=pool, stream=stream):
        y = call()
    return graph.replay, y


class Captured:
    """A model's forward as CUDA graphs, one for each kind of input; made by `capture`.

    Call it with an input of a captured shape, dtype and device. The result is that of the model at this moment: where
    weights, statistics, modules or settings have changed since the capture, the graph is captured again first (the
    model is looked over while the GPU is at work, so that costs no time where nothing has changed). Not for use by
    several threads at once.
    """

    def __init__(self, model: nn.Module, copy: bool) -> None:
        self._model, self._copy = model, copy
        self._pool: Any = None
        self._streams: dict[torch.device, Any] = {}
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._examples: dict[tuple[object, ...], Tensor] = {}  # of all that was captured, also before a change
        self._guard: Guard | None = None
        self._owner = nn.Module()  # of the guard, which asks less of its owner than of the model

    def add(self, example: Tensor) -> None:
        """Capture a forward for inputs of one more shape, dtype or device.

        Args:
            example: `[N, C, H, W]` on a CUDA device; only its shape, dtype, device and memory format count.

        Raises:
            TypeError, ValueError, RuntimeError: see `capture`.
        """
        on_cuda.check("capture", self._model, example)
        if not self._holds():
            self._graphs.clear()
            self._guard = _guard_of(self._model, self._owner)
        graph = self._record(example)
        self._graphs[_key(example)], self._examples[_key(example)] = graph, graph.x

    def _holds(self) -> bool:
        """Whether the model is what it was when its graphs were captured."""
        return self._guard is not None and self._guard.holds() and not leaves.hooked(self._model)

    @torch.inference_mode(False)  # else no call outside of that mode could write into the graph's input
    def _record(self, example: Tensor) -> _Graph:
        x = example.detach().clone(memory_format=torch.preserve_format)

        def call() -> Any:
            return self._model(x)

        # the graph has addresses, so all that lies there must stay: storages, even if `.to()` gives parameters others
        kept: list[object] = [t.detach() for t in (*self._model.parameters(), *self._model.buffers())]
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # it would be let go with the context that the capture happens in
        try:
            with torch.no_grad(), keeping(kept):
                _warm_up(call, x.device)
                replay, y = record(call, self._pool_of(x.device), self._stream_of(x.device))
        finally:
            torch.set_autocast_cache_enabled(cached)
        return _Graph(x, replay, y, signature(x), kept)

    def _pool_of(self, device: torch.device) -> Any:
        if self._pool is None and device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def _stream_of(self, device: torch.device) -> Any:
        """Where this model's graphs are recorded, and nothing else runs: a stream has workspaces of its own."""
        if device not in self._streams and device.type == "cuda":
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams.get(device)

    def __call__(self, x: Tensor) -> Any:
        """The model's output for x.

        Raises:
            TypeError: if x is not a tensor.
            ValueError: if no graph was captured for its shape, dtype and device.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        key = _key(x)
        if key in self._examples and key not in self._graphs:  # captured before the model changed
            self.add(self._examples[key])
        graph = self._graphs.get(key)
        if graph is None:
            known = ", ".join(_words(key) for key in self._examples) or "nothing"
            raise ValueError(f"x must be like one of the captured examples ({known}), got {_words(_key(x))}")
        y = self._run(graph, x)
        if graph.signature == signature(x) and self._holds():
            return y
        self.add(graph.x)
        return self._run(self._graphs[key], x)

    def _run(self, graph: _Graph, x: Tensor) -> Any:
        with torch.no_grad():
            graph.x.copy_(x)
            graph.replay()
            return pytree.tree_map_only(Tensor, torch.clone, graph.y) if self._copy else graph.y


def _key(x: Tensor) -> tuple[object, ...]:
    return tuple(x.shape), x.dtype, x.device


def _words(key: tuple[object, ...]) -> str:
    shape, dtype, device = key
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} on {device}"  # type: ignore[call-overload]


def _warm_up(call: Callable[[], Any], device: torch.device) -> None:
    """Call it on a stream of its own, as a capture will."""
    if device.type != "cuda":
        call()
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)


def _guard_of(model: nn.Module, owner: nn.Module) -> Guard:
    """What notices that the model is no more what it was; it lives no longer than `owner`.

    Raises:
        ValueError: if hooks would not run, or if changes of its tensors are not recorded.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_inference() for t in tensors):
        raise ValueError("model must record changes of its tensors, got one made in inference mode")
    guard = Guard([owner, *model.modules()], tensors, all_modes=True)
    if leaves.hooked(model) or not guard.holds():
        raise ValueError("model must be free of hooks and of overridden forwards, which a CUDA graph would skip")
    return guard


def capture(model: nn.Module, example: Tensor, *more: Tensor, copy: bool = True) -> Captured:
    """Record a model's forward as a CUDA graph, for inputs of fixed shapes.

    At small batches a forward is bound by the launches of its kernels (about 6 us each, and Python between them); a
    graph launches all of them at once.

    Args:
        model: in eval mode, on a CUDA device; fused or not. It takes one tensor and computes without autograd.
        example: an input `[N, C, H, W]`; its shape, dtype, device and memory format are those that are captured.
        more: further examples, each captured as a graph of its own; `Captured.add` adds others later.
        copy: whether results are copied out of the graph's memory. With False the next call overwrites them.

    Returns:
        A function of an input like one of the examples that gives what the model gives. Memory formats may differ from
        the example's; the input is copied.

    Raises:
        TypeError: if model is no `nn.Module` or an example no tensor.
        ValueError: if the model is in train mode, has hooks, was made in inference mode, or is on another device than
            an example.
        RuntimeError: if there is no CUDA device, or a capture is under way.
    """
    captured = Captured(model, copy)
    for x in (example, *more):
        captured.add(x)
    return captured
