"""Progress bars, where tqdm is installed."""

from __future__ import annotations

from typing import Any

import torch

#: seconds that a first call may take before it has a bar: kernels that are in Triton's cache are loaded in less
PATIENCE = 1.0


class _NoBar:
    """What a progress bar is without tqdm."""

    n = 0

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass


def bar(total: int, **options: Any) -> Any:
    """A progress bar of so many operations, a context; `options` are tqdm's."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, unit="operation", **options)


def first_call(total: int, device: torch.device) -> Any:
    """A bar of the operations that are bound and run for the first time: on a GPU their kernels are compiled.

    It is shown on a terminal, if that takes longer than `PATIENCE`, and goes with its end.
    """
    if device.type != "cuda":
        return _NoBar()
    try:
        return bar(total, desc="compiling kernels", disable=None, delay=PATIENCE, leave=False)
    except KeyError:  # tqdm before 4.56 has no delay
        return _NoBar()
