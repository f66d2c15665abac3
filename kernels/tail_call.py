"""A call of the kernel of a bottleneck's tail: memory for its two results, and what stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .boxes import unaligned


def tail_call(launch, h, conv, expand, reduce, overwrite: bool, described: Callable[..., Any], stand_in=None):
    """A function of h and other that launches a kernel and gives y and g; see `bind_expand_shift`.

    Args:
        launch: the kernel with all but its activations.
        h, conv, expand, reduce, overwrite: see `bind_expand_shift`.
        described: what the kernel takes for h, other, y and g (None without a next reduce).
        stand_in: computes the same of activations that no descriptor can name; None where the kernel takes pointers.
    """
    n, (p, q) = h.shape[0], conv.output_size(*h.shape[2:])
    of_y, of_g = (None if layer is None else (n, layer.weight.shape[0], p, q) for layer in (expand, reduce))
    empty = {"dtype": h.dtype, "device": h.device, "memory_format": torch.channels_last}

    def run(h, other):
        if stand_in is not None and unaligned(h, other):
            return stand_in(h, other)
        y = other if overwrite else torch.empty(of_y, **empty)
        g = None if of_g is None else torch.empty(of_g, **empty)
        launch(*described(h, other, y, g))
        return y, g

    return run
