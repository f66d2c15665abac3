"""Tiles of images for the tensor memory accelerator (TMA): descriptors, and the box of pixels that a tile covers.

A TMA load takes a box out of a tensor, `block_n` images x `block_p` rows x `block_q` columns of some channels, by the
coordinates of its first element; what lies outside of the tensor reads as 0 and is not written. So a convolution needs
neither addresses nor masks: a tap is the same box elsewhere, and padding is what lies outside.

A convolution of stride 2 reads every second row and column. An image of even height and width is therefore seen as
`[N, H/2, 2, W/2, 2*C]`: half rows, their parity, half columns, and in the last axis their parity and the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Box:
    """Images, rows and columns of a tile, each a power of two."""

    images: int
    rows: int
    columns: int


def choose_box(block_m: int, images: int, rows: int, columns: int) -> Box:
    """The box of `block_m` pixels that covers `[images, rows, columns]` with the fewest pixels outside.

    Among equals the one with the smallest halo around its taps, then the most columns.
    """

    def outside(box: Box) -> tuple[int, int, int]:
        covered = tiles_of(box, images, rows, columns) * block_m
        return covered, box.images * (box.rows + 2) * (box.columns + 2), -box.columns

    sides = [1 << i for i in range(block_m.bit_length())]
    return min((Box(block_m // (p * q), p, q) for q in sides for p in sides if p * q <= block_m), key=outside)


def tiles_of(box: Box, images: int, rows: int, columns: int) -> int:
    """How many boxes cover the images."""
    return -(-images // box.images) * -(-rows // box.rows) * -(-columns // box.columns)


def image_box(x: torch.Tensor, size: Sequence[int], stride: int, box: Box, channels: int) -> TensorDescriptor:
    """A descriptor of channels_last images of which every `stride`-th pixel is read, in boxes of `channels` channels.

    Args:
        x: the images.
        size: `(N, H, W, C)` that they are seen as: `(1, 1, N*H*W, C)` where pixels need not be told apart.
        stride: 1, or 2 with even H and W.
        box: pixels of a box.
        channels: of a box.
    """
    return TensorDescriptor(x, *strided_view(size, stride), [box.images, box.rows, 1, box.columns, channels])


def strided_view(size: Sequence[int], stride: int) -> tuple[list[int], list[int]]:
    """Shape and strides of channels_last images of `(N, H, W, C)` in five axes, of which `image_box` takes boxes."""
    n, h, w, c = size
    shape = [n, h // stride, stride, w // stride, stride * c]
    return shape, [h * w * c, stride * w * c, w * c, stride * c, 1]


class Descriptors:
    """Makes the descriptors of tensors of one shape and dtype; what they have in common is checked once.

    A tensor has to begin at a multiple of 16 bytes: see `unaligned`.

    Args:
        make: makes the descriptor of a tensor, as `image_box` does.
        arguments: the others of `make`.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._make, self._arguments = make, arguments
        self._kind: type = object
        self._fields: dict[str, Any] | None = None

    def __call__(self, x: torch.Tensor) -> Any:
        """The descriptor of x."""
        if self._fields is None:
            first = self._make(x, *self._arguments)
            self._kind, self._fields = type(first), {**vars(first), "base": None}  # keeps no tensor alive
        made = object.__new__(self._kind)
        made.__dict__.update(self._fields, base=x)
        return made


def matrix_box(weight: torch.Tensor, rows: int, columns: int, box: Sequence[int]) -> TensorDescriptor:
    """A descriptor of a weight seen as a row-major matrix."""
    return TensorDescriptor(weight, [rows, columns], [columns, 1], list(box))


def unaligned(*tensors: torch.Tensor | None) -> bool:
    """Whether a tensor begins at an address that is no multiple of 16, which no descriptor can name."""
    return any(t is not None and t.data_ptr() % 16 for t in tensors)
