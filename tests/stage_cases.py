"""Problems for the stage kernel: a bottleneck's tail and the next one's head, and the same in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from cases import FP32, image, make_norm, normalize
from torch import Tensor, dtype

from fused_resblock.params import Conv


class Stage(NamedTuple):
    """What `bind_expand_shift` takes, but the tile."""

    h: Tensor
    conv: Conv
    expand: Conv
    other: Tensor
    shortcut: Conv | None
    reduce: Conv | None

    def plain(self) -> tuple[Tensor, Tensor | None]:
        """The block's output and the next reduce's in plain torch."""
        inner = F.relu(convolve(self.conv, self.h))
        shortcut = self.other if self.shortcut is None else convolve(self.shortcut, self.other)
        y = F.relu(convolve(self.expand, inner) + shortcut)
        return y, None if self.reduce is None else F.relu(convolve(self.reduce, y))


def convolve(conv: Conv, x: Tensor) -> Tensor:
    """norm(conv(x)) in plain torch."""
    return normalize(F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding), conv.norm)


@dataclass(frozen=True)
class StageCase:
    """Sizes and options of one problem; `second` are the input channels of a downsample branch, or None for a residual.

    `outputs` are the channels of the next reduce, or None.
    """

    batch: int = 2
    width: int = 16
    expanded: int = 40
    size: tuple[int, int] = (7, 5)
    stride: int = 1
    second: int | None = None
    outputs: int | None = 16
    bias: bool = False
    norm: str | None = "affine"
    padding: int = 1

    def build(self, kind: dtype) -> Stage:
        """The tensors; norms are fp32 under a narrower dtype."""

        def conv(k: int, c: int, size: int, stride: int) -> Conv:
            weight = image(k, c, size, size, dtype=kind) / (c * size * size) ** 0.5
            bias = image(1, k, 1, 1, dtype=kind).flatten() if self.bias else None
            wide = FP32 if kind.itemsize < 4 else kind
            norm = None if self.norm is None else make_norm(k, self.norm, wide)
            return Conv(weight, bias, norm, (stride, stride), (self.padding * (size > 1),) * 2)

        n, c, k = self.batch, self.width, self.expanded
        h = image(n, c, *self.size, dtype=kind)
        first = conv(c, c, 3, self.stride)
        p, q = first.output_size(*self.size)
        channels2, step = (k, 1) if self.second is None else (self.second, self.stride)
        other = image(n, channels2, p * step, q * step, dtype=kind)
        shortcut = None if self.second is None else conv(k, self.second, 1, step)
        reduce = None if self.outputs is None else conv(self.outputs, k, 1, 1)
        return Stage(h, first, conv(k, c, 1, 1), other, shortcut, reduce)
