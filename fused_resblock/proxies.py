"""What a forward gets in place of tensors while its graph is recorded.

A proxy cannot answer as a tensor does: what it is an instance of, which attributes it has, whether it is true. Such a
question goes to the tracer, which gives the trace up or notes that the graph may not be all that the forward does.
"""

from __future__ import annotations

import dis
import functools
import operator
import sys
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, fx

KIND = "its forward asks what kind of value it has"
MODES = "its forward switches the grad mode or autocast"
RANDOM = "its forward draws random numbers"

#: modules whose functions may ask what a proxy is
_KNOWING = ("torch.fx", __name__.partition(".")[0])
#: functions to which a proxy is no tensor
_UNSEEN_BUILTINS = {"type", "callable", "id", "vars"}
#: functions that tell a trace, or the call that it is made in, from others
_UNSEEN_NAMES = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_fx_tracing"}
_UNSEEN_NAMES |= {"is_fx_symbolic_tracing"}
_MATCHES = {dis.opmap["MATCH_SEQUENCE"], dis.opmap["MATCH_MAPPING"], dis.opmap["MATCH_CLASS"]}
#: properties that are the same for all inputs of one signature
_SAME = ("shape", "dtype", "device", "ndim", "layout")


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _names_tensor(frame: FrameType) -> bool:
    """Whether the code that a frame runs has a name for torch's Tensor."""
    names = frame.f_code.co_names
    return "Tensor" in names or any(frame.f_globals.get(name) is Tensor for name in names)


def _knowing() -> bool:
    """Whether the caller's caller knows that it has a proxy."""
    return _is_within(_module_of(sys._getframe(2)), _KNOWING)


class Proxy(fx.Proxy):
    """Hands the questions on that it would answer otherwise than a tensor does.

    In-place operators are recorded as what they are; a plain proxy has none, and Python falls back to the others.
    """

    tracer: Any  # `tracing._Tracer`, whose `doubt` and `refuse` questions go to

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What `isinstance` asks after `type`; never Tensor, which torch's C++ would take for one and crash.

        Of a tensor it is the right answer, unless the caller may have asked for Tensor.
        """
        caller = sys._getframe(1)
        if not _is_within(_module_of(caller), _KNOWING):
            known = type(self) is Proxy and self.tracer.knows_tensor(self.node)
            if not known or _names_tensor(caller):
                self.tracer.doubt("its forward asks for the type of a value")
        return type(self)

    def __getattr__(self, name: str) -> Attribute:
        if name.startswith("__"):
            self.tracer.doubt(f"its forward asks a value for {name}")
            raise AttributeError(name)
        self._check(name)
        return Attribute(self, name)

    def _check(self, name: str) -> None:
        """Pass a question for an attribute on, but for methods, whose calls the graph shows."""
        known = getattr(Tensor, name, None)
        if known is None:
            self.tracer.doubt(f"its forward asks a tensor for {name}")
        elif name.startswith("is_") or not (callable(known) or name == "shape"):
            self.tracer.doubt(f"its forward asks a tensor for its {name}", same=name in _SAME)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            self.tracer.doubt(f"its forward sets {name} of a tensor")
        super().__setattr__(name, value)

    @property
    def keys(self) -> Any:
        """A tensor has none; Python asks for it where a value is taken for a dictionary."""
        return self.tracer.refuse("its forward takes a tensor for a dictionary")

    def __hash__(self) -> int:
        if not _knowing():
            self.tracer.doubt("its forward looks a value up")
        return id(self)

    def _text(self, *_: Any) -> str:
        if not _knowing():
            self.tracer.doubt("its forward makes a text of a value")
        return object.__repr__(self)

    __str__ = __repr__ = __format__ = _text

    def _number(self, *_: Any) -> Any:
        return self.tracer.refuse("its forward makes a number of a tensor or of a size")

    __int__ = __index__ = __float__ = __complex__ = __len__ = __round__ = __array__ = _number

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(function: Any) -> Any:
    def record(self: Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


#: the operators that change their first operand
IN_PLACE = tuple(
    getattr(operator, f"i{name}")
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
)
for _function in IN_PLACE:
    setattr(Proxy, f"__{_function.__name__}__", _in_place(_function))


class Attribute(Proxy, fx.proxy.Attribute):
    """An attribute of a proxy, a tensor or not."""

    def _check(self, name: str) -> None:
        self.tracer.doubt(f"its forward asks for {name} of a tensor's {self.attr}", same=self.attr in _SAME)


#: what calls a function: in Python 3.10, in 3.11, and since
_CALLS = ("CALL_FUNCTION", "PRECALL", "CALL")


@functools.lru_cache(maxsize=4096)
def _unseen(code: CodeType) -> str | None:
    """A function that code calls, of a local variable if it is a builtin, and that no proxy can answer; or None."""
    found = _UNSEEN_NAMES & set(code.co_names)
    if _UNSEEN_BUILTINS & set(code.co_names):
        steps = [i for i in dis.get_instructions(code) if i.opname not in ("PUSH_NULL", "CACHE")]
        for called, given, call in zip(steps, steps[1:], steps[2:], strict=False):
            local = given.opname.startswith("LOAD_FAST") and given.argval != "self"
            if called.opname in ("LOAD_GLOBAL", "LOAD_NAME") and local and call.opname in _CALLS:
                found |= _UNSEEN_BUILTINS & {called.argval}
    if _MATCHES & set(code.co_code[::2]):
        found |= {"match"}
    return min(found, default=None)


def unseen_call(frame: FrameType | None, last: CodeType) -> str | None:
    """A function that somebody's code on the stack may call and that no proxy can answer; None without one.

    Args:
        frame: to look at, and at those that called it; torch's own are passed over.
        last: the code at which to stop.
    """
    while frame is not None and frame.f_code is not last:
        if not _is_within(_module_of(frame), ("torch", *_KNOWING)):
            found = _unseen(frame.f_code)
            if found is not None:
                return found
        frame = frame.f_back
    return None
