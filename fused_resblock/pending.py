"""Work that was asked for and is not done yet, so that what comes next can be done in the same pass.

`Pending` stands for the output of a convolution, and of the norm and the ReLU behind it. Whatever touches it, but for
the modules that join it (`stem`), gets the values: no use of it can be wrong, only slower. It lives within the forward
of one network (`scope`), so neither its input nor a weight can change before it is computed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import dispatch
from .program import Program
from .recorder import Recorder
from .swap import own_class

_made: Recorder[weakref.ref[Pending]] = Recorder("made")
#: whether this is within a `scope`
allowed = _made.active
_every: ContextVar[bool] = ContextVar("every", default=False)


@contextmanager
def scope(every: bool = False) -> Iterator[None]:
    """Work may be left pending in here; what is still pending at the end is done then.

    Args:
        every: leave also that pending which takes no more time apart.
    """
    made: list[weakref.ref[Pending]] = []
    token = _every.set(every)
    failed = True
    try:
        with _made.recording(made):
            yield
        failed = False
    finally:
        _every.reset(token)
        errors = contextlib.suppress(RuntimeError) if failed else contextlib.nullcontext()  # the first is to be seen
        for reference in made:
            pending = reference()
            if pending is not None:
                with errors:
                    pending.value()


def every() -> bool:
    """Whether this is within a `scope` in which work is left pending also where that takes more time."""
    return _every.get()


class Expected(NamedTuple):
    """The modules that are to join the first of a chain, and what computes them all; known to hold at the first."""

    followers: tuple[nn.Module, ...]
    program: Program


class Pending(Tensor):
    """What a chain of modules gives for x, `[N, C, H, W]` channels_last, before anybody has asked for the values."""

    @staticmethod
    def __new__(
        cls, x: Tensor, chain: tuple[nn.Module, ...], size: tuple[int, ...], expected: Expected | None = None
    ) -> Pending:
        _, c, h, w = size
        return torch.Tensor._make_wrapper_subclass(
            cls, size, (c * h * w, 1, c * w, c), dtype=dispatch.autocast_dtype(x) or x.dtype, device=x.device
        )

    def __init__(
        self, x: Tensor, chain: tuple[nn.Module, ...], size: tuple[int, ...], expected: Expected | None = None
    ) -> None:
        self._x, self.chain, self.extent, self._expected = x, chain, size, expected
        self._seen = None if x.is_inference() else x._version
        self._inference = torch.is_inference_mode_enabled()
        self.computed: Tensor | None = None
        assert allowed()
        _made.note(weakref.ref(self))

    def program(self, module: nn.Module) -> Program | None:
        """What computes the whole chain, if that is known and the module is the one that is expected next."""
        if self._expected is None:
            return None
        followers, program = self._expected
        joined = len(self.chain) - 1
        return program if joined < len(followers) and followers[joined] is module else None

    def behind(self, module: nn.Module) -> Pending:
        """What is pending once a module that changes neither shape nor dtype has joined: this, if it works in place."""
        expected = None if self.program(module) is None else self._expected
        if getattr(module, "inplace", False):
            self.chain, self._expected = (*self.chain, module), expected
            return self
        return Pending(self.source(), (*self.chain, module), self.extent, expected)

    def source(self) -> Tensor:
        """The x that the chain begins with.

        Raises:
            RuntimeError: if it has been changed in place since.
        """
        if self._seen is not None and self._x._version != self._seen:
            raise RuntimeError(
                f"the input of {type(self.chain[0]).__name__} must stay as it is until its output has been used, got a "
                "change in place: fuse with stems=False"
            )
        return self._x

    def value(self) -> Tensor:
        """The values, computed module by module, in the inference mode of the call."""
        if self.computed is None:
            with torch.inference_mode(self._inference), torch.no_grad():
                y = self.source()
                for module in self.chain:
                    y = own_class(module).forward(module, y)
            self.computed = y
        return self.computed

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = func in _METADATA and args[0].computed is None  # later an edit in place may have changed the shape
        if not known:
            args, kwargs = pytree.tree_map_only(Pending, Pending.value, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # some may be in a container that is not looked into
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = pytree.tree_map_only(Pending, Pending.value, (args, kwargs or {}))
        return func(*args, **kwargs)


#: what may be read without the values
_PROPERTIES: Any = (Tensor.shape, Tensor.dtype, Tensor.device)
_METADATA = {Tensor.size, Tensor.dim, Tensor.stride, *(p.__get__ for p in _PROPERTIES)}
