"""A whole bottleneck as one operation, `kernels.bottleneck_rows`, where a table says that it is faster.

Never without one: what no GPU has timed does not run on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.tables import StageEntry, whole_name
from ..kernels.tiles import StageTile
from ..params import Bound, Conv, Epilogue
from . import (
    asked,
    bind_apart,
    bind_conv_bn_act,
    bind_expand_shift,
    conv_problem,
    may_be_triton,
    refusal,
    triton,
    tuned,
)
from .guarded import guarded


class Layers(NamedTuple):
    """The convolutions of a bottleneck with their norms; without a shortcut its input is the residual."""

    reduce: Conv
    conv: Conv
    expand: Conv
    shortcut: Conv | None

    @classmethod
    def of(cls, found: asked.Asked) -> Layers:
        """Those of a block that a forward asked for."""
        reduce, conv, expand = found.layers
        return cls(reduce, conv, expand, found.epilogue.shortcut)

    def output_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        """Of the block's output for the input x, with a 3x3 that keeps the image's size."""
        return (x.shape[0], self.expand.weight.shape[0], *x.shape[2:])

    @property
    def case(self) -> str:
        """As tables name it."""
        return whole_name(*self)


def obstacle(x: Tensor, layers: Layers, backend: str) -> str | None:
    """Why the kernel cannot take a block with an input such as x; None when it can."""
    if not may_be_triton(backend, x.device):
        return f"the backend is {backend}, the device {x.device.type}"
    if x.shape[0] == 0 or x.shape[2] * x.shape[3] == 1:
        return "no images, or images of one pixel"
    n, _, h, w = x.shape
    for layer in layers[:2]:
        size = n, layer.weight.shape[1] * layer.groups, h, w
        problem = conv_problem(x.device, x.dtype, size, layer.weight.shape, *layer[3:])
        if (reason := refusal("triton", problem)) is not None:
            return reason
    from ..kernels import bottleneck  # which imports Triton, that need not be installed

    return bottleneck.refusal(x, *layers)


def note(x: Tensor, layers: Layers) -> None:
    """Note a block that the kernel can take, for `tune`."""
    asked.note(x, layers[:3], None, Epilogue(shortcut=layers.shortcut), whole=True)


def measured(x: Tensor, layers: Layers, backend: str) -> StageEntry | None:
    """What a table says of a block that it knows to be faster as one operation, if the kernel takes it so."""
    if obstacle(x, layers, backend) is not None:
        return None
    from ..kernels import bottleneck

    entry = tuned.lookup_stage(x, layers.conv, layers.case)
    if entry is None or not entry.faster or entry.tile is None:
        return None
    return entry if bottleneck.refusal(x, *layers, entry.tile) is None else None


def bind(x: Tensor, layers: Layers, entry: StageEntry, backend: str) -> Bound:
    """The block as one operation: a function of x and nothing else that gives y."""
    assert entry.tile is not None
    otherwise = partial(apart, x, layers, backend)
    return guarded(
        partial(bind_tile, x, layers, entry.tile, backend), f"tile {entry.tile} of a block", otherwise, "conv by conv"
    )


def bind_tile(x: Tensor, layers: Layers, tile: StageTile, backend: str = "auto") -> Bound:
    """The kernel with a tile; an x that is no multiple of 16 bytes into its memory runs conv by conv."""
    from ..kernels.bottleneck_rows import bind_bottleneck_rows
    from ..kernels.boxes import unaligned

    run = bind_bottleneck_rows(
        x, *(None if layer is None else triton.prepare(layer, x.dtype) for layer in layers), tile
    )
    stand_in: list[Bound] = []

    def call(x: Tensor, _: Tensor | None = None) -> Tensor:
        if not unaligned(x):
            return run(x)
        if not stand_in:
            stand_in.append(apart(x, layers, backend))
        return stand_in[0](x, None)

    return call


def apart(x: Tensor, layers: Layers, backend: str = "auto") -> Bound:
    """The block conv by conv."""
    head = bind_conv_bn_act(x, layers.reduce, backend=backend)
    tail = bind_apart(head(x, None), layers.conv, layers.expand, x, layers.shortcut, None, backend=backend)

    def run(x: Tensor, _: Tensor | None = None) -> Tensor:
        return tail(head(x, None), x)[0]

    return run


def by_tail(x: Tensor, layers: Layers, backend: str = "auto") -> Bound | None:
    """What takes a block's place in a chain of tails that a table knows to be faster: a function that gives y, too.

    That is its tail together with the reduce of the block behind it, which stands for its own; behind a downsample
    branch, whose block is the first one, its own as well. None where no table says so.
    """
    head = bind_conv_bn_act(x, layers.reduce, backend=backend)
    h, following = head(x, None), layers.reduce
    if layers.shortcut is not None:
        weight = layers.expand.weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        following = following._replace(weight=weight)
    tail = bind_expand_shift(h, layers.conv, layers.expand, x, layers.shortcut, following, backend=backend)
    if tail is None:
        return None
    first = layers.shortcut is not None

    def run(x: Tensor, _: Tensor | None = None) -> Tensor:
        return tail(head(x, None) if first else h, x)[0]

    return run


def tiles(x: Tensor, layers: Layers) -> list[StageTile]:
    """The tiles that a search has to try for a block."""
    from ..kernels.bottleneck import fitting

    return fitting(x, *layers)


def like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Something of that shape, and of x's dtype and device, without memory of that size."""
    return x.new_empty(1).expand(*shape)
