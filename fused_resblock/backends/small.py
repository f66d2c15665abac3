"""Convolutions that are too small for oneDNN, on a CPU: torch's own, a GEMM, on folded weights.

oneDNN's fused operation takes 35 to 50 us however little there is to do, torch's own convolution of one small image 7
to 60 with its add and ReLU. At the limits here they are equal (2 threads of a Xeon with AVX512). What oneDNN's fused
operation computes wrongly runs likewise, with rows for columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..params import Bound, Conv
from .eager import strided

#: elements of one image up to which torch does not take oneDNN for it either (`use_mkldnn` in ATen's Convolution.cpp)
IMAGE = 20480
#: products that take about as long as oneDNN's call
PRODUCTS = 1 << 22


def is_small(x: Tensor, conv: Conv) -> bool:
    """Whether torch's own convolution is the faster one for such an x: one fp32 image, and few products."""
    _, c, r, s = conv.weight.shape
    _, k, p, q = conv.output_shape(x)
    alone = x.dtype == torch.float32 and x.shape[0] == 1 and conv.groups == 1
    padded = p * q == 1 and r * s > 1  # most of its products are with zeros, which oneDNN leaves out
    return alone and x.numel() <= IMAGE and max(r, s) <= 3 and not padded and k * c * r * s * p * q <= PRODUCTS


def bind(
    folded: tuple[Tensor, Tensor], conv: Conv, stride: int, branch: Bound | None, relu: bool, turned: bool = False
) -> Bound:
    """`act(conv(x) [+ other[:, :, ::t, ::t] | + branch(other)])` on folded weights.

    Args:
        folded: weight and bias of `conv` with its norm in them.
        conv: the geometry.
        stride: t of the residual; 0 where there is none.
        branch: what computes the downsample branch; None where there is none.
        relu: whether act is ReLU.
        turned: whether rows are to be computed as columns and columns as rows, which takes two copies.
    """
    convolve = (_turned if turned else _convolution)(*folded, conv)

    def run(x: Tensor, other: Any) -> Tensor:
        z = convolve(x)
        if branch is not None:
            z += branch(other, None)
        elif stride:
            z += strided(other, stride)
        return z.relu_() if relu else z

    return run


def _convolution(weight: Tensor, bias: Tensor, conv: Conv) -> Callable[[Tensor], Tensor]:
    geometry = *conv[3:6], conv.groups
    return lambda x: torch.conv2d(x, weight, bias, *geometry)


def _turned(weight: Tensor, bias: Tensor, conv: Conv) -> Callable[[Tensor], Tensor]:
    turned = conv._replace(stride=conv.stride[::-1], padding=conv.padding[::-1], dilation=conv.dilation[::-1])
    convolve = _convolution(_turn(weight), bias, turned)
    return lambda x: _turn(convolve(_turn(x)))


def _turn(x: Tensor) -> Tensor:
    return x.transpose(2, 3).clone(memory_format=torch.channels_last)
