"""What an ideal TF32 unit makes of fp32 convolutions: the error that kernels are held against where TF32 is allowed.

Torch's own result is no measure there: cuDNN computes some shapes in full fp32 though it need not (the stem's 3
channels), which would make a bound of a thousandth of TF32's error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def to_tf32(t: Tensor) -> Tensor:
    """fp32 numbers rounded to the nearest of TF32, ties to even: 10 bits of the mantissa are kept, of 23."""
    bits = t.view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & -0x2000).view(torch.float32)


class Tf32Unit(TorchFunctionMode):
    """Convolutions of fp32 tensors are `conv(tf32(x), tf32(w))`: both factors rounded to nearest, sums in fp32.

    A GPU that rounds, or cuts, factors by itself finds them rounded already.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("conv2d", "convolution") and args[0].dtype == torch.float32:
            args = (*map(to_tf32, args[:2]), *args[2:])
        return func(*args, **(kwargs or {}))
