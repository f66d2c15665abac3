"""What every launcher asks before it launches: accumulator type, dot precision, device, interpreter."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
import triton.language as tl
from triton import knobs

from .tiles import Gpu


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1` before Triton was imported)."""
    return bool(knobs.runtime.interpret)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """fp64 for fp64 inputs, fp32 for all others."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """How an fp32 dot multiplies: TF32 where torch would let cuDNN do so for a convolution, else IEEE."""
    allowed = dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return "tf32" if allowed else "ieee"


def device_of(x: torch.Tensor):
    """A context in which `x`'s device is the current one; Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that a tensor's device is; an H100 where it is none, so that the interpreter runs the same tiles."""
    if device.type != "cuda":
        return Gpu()
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, 10 * properties.major + properties.minor)
