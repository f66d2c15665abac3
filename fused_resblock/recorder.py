"""Lists that are filled within a context, by whoever notes something there; each thread and task has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Recorder(Generic[T]):
    """Gathers what is noted while somebody asks for it.

    Args:
        name: of what is noted.
    """

    def __init__(self, name: str) -> None:
        self._noted: ContextVar[list[T] | None] = ContextVar(name, default=None)

    @contextmanager
    def recording(self, noted: list[T] | None = None) -> Iterator[list[T]]:
        """Within this context what is noted goes into the list, a new one where none is given."""
        noted = [] if noted is None else noted
        token = self._noted.set(noted)
        try:
            yield noted
        finally:
            self._noted.reset(token)

    def current(self) -> list[T] | None:
        """The list of `recording`, None if this is not within one."""
        return self._noted.get()

    def active(self) -> bool:
        """Whether this is within `recording`."""
        return self._noted.get() is not None

    def note(self, thing: T) -> None:
        """Note something, if this is within `recording`."""
        noted = self._noted.get()
        if noted is not None:
            noted.append(thing)
