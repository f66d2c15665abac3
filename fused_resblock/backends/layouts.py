"""Folded weights in the blocked layouts that oneDNN wants, which depend on the size of the images as well.

A weight in another layout is brought into the wanted one at every call, by oneDNN's slowest code: 4 to 32 ms for a 1x1
of ResNet-50, whose convolution takes 1 to 2. Sizes that want the same layout share one packed weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..params import Conv
from .folding import fold

Packed = tuple[Tensor, Tensor]  # the weight, in a layout that only oneDNN can read, and the bias
Layout = bytes

#: layouts of one weight that are kept; oneDNN has about three for a convolution
MOST = 4
#: bytes of a memory descriptor that hold nothing but what was in memory before: behind the dtype, in oneDNN to 3.12
_GAP = slice(108, 112)

_wanted: dict[tuple[object, ...], Layout] = {}  # by dtype, weight's shape, geometry, image's shape and threads
_ENOUGH = 8192


class Layouts(dict[Layout, Packed]):
    """The packed weights of one convolution, by layout."""

    def fit(self, x: Tensor, conv: Conv) -> Packed:
        """The weight and bias for images like x, folded and packed unless one of that layout is here.

        Args:
            x: an image in the dtype that the convolution is computed in.
            conv: the convolution with its norm, always the same one.
        """
        key = x.dtype, conv.weight.shape, *conv[3:], x.shape, torch.get_num_threads()
        layout = _wanted.get(key)
        if layout is None and self:  # any weight of this shape tells, and nothing is folded for it
            layout = _note(key, _reorder(torch.empty_like(conv.weight, dtype=x.dtype), x, conv))
        found = None if layout is None else self.get(layout)
        if found is None:
            weight, bias = fold(conv, x.dtype)
            found = _reorder(weight, x, conv), bias
            while len(self) >= MOST:
                self.pop(next(iter(self)), None)
            self[_note(key, found[0])] = found
        return found


def _reorder(weight: Tensor, x: Tensor, conv: Conv) -> Tensor:
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    return reorder(weight, conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape))


def _note(key: tuple[object, ...], packed: Tensor) -> Layout:
    if len(_wanted) >= _ENOUGH:
        _wanted.clear()
    _wanted[key] = layout_of(packed)
    return _wanted[key]


def layout_of(packed: Tensor) -> Layout:
    """What tells a packed weight's layout from others."""
    descriptor = bytearray(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes())
    del descriptor[_GAP]
    return bytes(descriptor)
