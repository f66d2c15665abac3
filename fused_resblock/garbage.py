"""Garbage collection where only what is new can be garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_frozen_by_others: list[bool] = []  # found out once: it takes as long as there are objects


@contextmanager
def old_set_aside() -> Iterator[None]:
    """Have a garbage collection in here look at what was made in here only: at all it takes 0.1 s and more.

    Not where somebody else has frozen objects, which are not ours to let go.
    """
    if not _frozen_by_others and gc.get_freeze_count() > 0:
        _frozen_by_others.append(True)
    if _frozen_by_others:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
