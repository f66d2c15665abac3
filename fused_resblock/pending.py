"""Work that was asked for and is not done yet, so that what comes next can be done in the same pass.

`Pending` stands for what a convolution gives (`stem`), or a chain of blocks (`waiting`). Whatever touches it, but for
the modules that join it, gets the values. It lives within the forward of one network (`scope`), whose graph shows that
nothing comes between that could tell it from a tensor, or change what it is computed from.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class _Scope(NamedTuple):
    made: list[weakref.ref[Pending]]
    lines: Mapping[nn.Module, Sequence[nn.Module]]


_scope: ContextVar[_Scope | None] = ContextVar("scope", default=None)


@contextmanager
def scope(lines: Mapping[nn.Module, Sequence[nn.Module]] | None = None) -> Iterator[None]:
    """Work may be left pending in here; what is still pending at the end is done then.

    Args:
        lines: the chains that may wait, each with the modules that read the result; see `lines`.
    """
    made: list[weakref.ref[Pending]] = []
    token = _scope.set(_Scope(made, lines or {}))
    failed = True
    try:
        yield
        failed = False
    finally:
        _scope.reset(token)
        errors = contextlib.suppress(RuntimeError) if failed else contextlib.nullcontext()  # the first is to be seen
        for reference in made:
            pending = reference()
            if pending is not None:
                with errors:
                    pending.value()


def allowed() -> bool:
    """Whether this is within a `scope`."""
    return _scope.get() is not None


def readers(chain: nn.Module) -> Sequence[nn.Module] | None:
    """The modules that read what a chain gives, if it may wait in this scope."""
    scope = _scope.get()
    return None if scope is None else scope.lines.get(chain)


def settled(x: Any) -> Any:
    """The values of what is pending; anything else as it is."""
    return x.value() if isinstance(x, Pending) else x


def _stream(device: torch.device) -> Any:
    """The stream on which work is done now; None on a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class Source:
    """The tensor that pending work begins with, which must stay as it is until that is done.

    Args:
        x: the tensor.
        reader: the module that was called with it.
        option: the option of `fuse` that has work left pending there.
    """

    def __init__(self, x: Tensor, reader: object, option: str) -> None:
        self._x, self._reader, self._option = [x], type(reader).__name__, option
        self._seen = None if x.is_inference() else x._version

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: if it has been changed in place since, or if it was taken and what it was taken for failed.
        """
        if not self._x or (self._seen is not None and self._x[0]._version != self._seen):
            raise RuntimeError(
                f"the input of {self._reader} must stay as it is until its output has been used, got "
                + (f"a change in place: fuse with {self._option}=False" if self._x else "an error while it was used")
            )
        return self._x[0]

    def take(self) -> list[Tensor]:
        """The tensor alone in a list, and forgotten here."""
        taken = [self.read()]
        self._x.clear()
        return taken


class Pending(Tensor):
    """A tensor `[N, C, H, W]`, channels_last, before anybody has asked for its values."""

    @staticmethod
    def __new__(cls, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        _, c, h, w = size
        return torch.Tensor._make_wrapper_subclass(cls, size, (c * h * w, 1, c * w, c), dtype=dtype, device=device)

    def __init__(self, device: torch.device) -> None:
        self.computed: Tensor | None = None
        self._device, self._stream = device, _stream(device)
        self._inference = torch.is_inference_mode_enabled()
        scope = _scope.get()
        assert scope is not None
        scope.made.append(weakref.ref(self))

    def value(self) -> Tensor:
        """The values, computed on the stream on which they were asked for, which the present one waits for."""
        if self.computed is None:
            now = _stream(self._device)
            with torch.inference_mode(self._inference), torch.no_grad():
                if now == self._stream:
                    self.computed = self._compute()
                else:
                    with torch.cuda.stream(self._stream):
                        self.computed = self._compute()
                    now.wait_stream(self._stream)
                    self.computed.record_stream(now)
        return self.computed

    def _compute(self) -> Tensor:
        raise NotImplementedError

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
