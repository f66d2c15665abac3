"""Triton's interpreter without work that changes nothing, which is a third and more of its time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any


def quicken() -> None:
    """Take that work out of this process's interpreter; what a release has otherwise stays as it is."""
    from triton.runtime import interpreter

    _assert_no_overflow_only_in_debug_mode(interpreter)
    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang, interpreter.tl)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype, interpreter.tl.dtype)


def _assert_no_overflow_only_in_debug_mode(interpreter: Any) -> None:
    """Of 32-bit sums and products it takes 64-bit ones as well, to assert, in debug mode alone, that they agree."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def _once_a_launch(patch: Callable[[Any], Any], tl: Any) -> Callable[[Any], Any]:
    """It puts its own functions into the language for a launch, and again whenever one kernel calls another."""
    patched: set[int] = set()

    class Nothing:
        def restore(self) -> None: ...

    def once(fn: Any) -> Any:
        seen = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if seen and seen <= patched:
            return Nothing()
        scope, outermost = patch(fn), not patched
        patched.update(seen)
        if outermost:
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    return once


def _remembered(np_dtype: Callable[[Any], Any], plain: type) -> Callable[[Any], Any]:
    """It lists all dtypes whenever it looks one up."""
    known = functools.cache(np_dtype)
    return lambda dtype: known(dtype) if type(dtype) is plain else np_dtype(dtype)
