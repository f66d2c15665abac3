"""What is bound with a table's tile, which after all may not run on this GPU: then something else runs instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..table import error_line
from . import tuned


def guarded(bind: Any, name: str, otherwise: Any, instead: str) -> Any:
    """What `bind` gives, and if that cannot be bound, compiled or loaded on this GPU what `otherwise` does: `instead`.

    That holds the activations that it was made with, and is let go as soon as the tile has run.
    """

    def refused(error: Exception) -> Any:
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        tuned.warn_once(f"tuned {name} does not run here ({error_line(error)}); it runs {instead} instead")
        return otherwise()

    try:
        run = bind()
    except Exception as error:  # a tile that no kernel can have
        return refused(error)
    chosen: list[Any] = []
    left = [refused]

    def first(x: Tensor, other: Any) -> Any:
        if chosen:
            return chosen[0](x, other)
        try:
            y = run(x, other)
            chosen.append(run)
        except Exception as error:  # the compiler, the loader and the driver fail in ways of their own
            if not left:
                raise
            chosen.append(left[0](error))
            y = chosen[0](x, other)
        left.clear()
        return y

    return first
