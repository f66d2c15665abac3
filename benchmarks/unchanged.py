"""Kernels that need not be compiled again, since all that goes into it is what their kept row was made from.

Triton names a compilation by a hash of the kernel's source and of what it calls, of argument types, constants, options,
the chip and the compiler itself, and asks its cache for that name before it compiles: there it can be stopped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs
from triton.runtime.cache import FileCacheManager

#: letters of a name that are kept; 60 bits
LETTERS = 12


class Unchanged(Exception):
    """Raised in place of a compilation."""


def name_of(kernel: Any) -> str:
    """What a compiled kernel was made from, as Triton's cache names it."""
    return base64.b32encode(bytes.fromhex(kernel.hash)).decode()[:LETTERS]


@contextmanager
def not_again(name: str | None) -> Iterator[None]:
    """Within this context a compilation of this name raises `Unchanged`; all others are done."""

    class Stopping(FileCacheManager):
        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            if key[:LETTERS] == name:
                raise Unchanged(key)
            super().__init__(key, override, dump)

    before = knobs.cache.manager_class
    knobs.cache.manager_class = Stopping
    try:
        yield
    finally:
        knobs.cache.manager_class = before
