"""The max-pool that ends a stem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: kernel size, stride, padding, dilation and ceil_mode
POOL = (3, 2, 1, 1, False)


def is_stem_pool(settings: Sequence[Any]) -> bool:
    """Whether the settings of a max-pool, each a number or a pair, are those of `POOL`."""
    return all(given in (value, (value, value), [value, value]) for given, value in zip(settings, POOL, strict=True))
