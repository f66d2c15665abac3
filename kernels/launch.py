"""Launching kernels: what every launcher asks first, and a launch that is prepared once and repeated cheaply."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from .gpu import tf32_allowed

#: the first CUDA driver, 12.3, that captures a launch which starts early in a CUDA graph
CAPTURES_EARLY = 12030


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1` before Triton was imported)."""
    return bool(knobs.runtime.interpret)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """fp64 for fp64 inputs, fp32 for all others."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """How an fp32 dot multiplies: TF32 where torch would let cuDNN do so for a convolution, else IEEE."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def current(device: torch.device):
    """A context in which the device is the current one; Triton launches on the current device."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def starts_early() -> bool:
    """Whether kernels start before the last one has ended: from Hopper on, unless `FUSED_RESBLOCK_PDL` is 0.

    See `dependent`; not in the interpreter, and not with a driver that could not capture it.
    """
    if interpreted() or os.environ.get("FUSED_RESBLOCK_PDL") == "0":
        return False
    target = driver.active.get_current_target()
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()  # 0: no driver, and nothing is launched
    return bool(target.backend == "cuda" and target.arch >= 90 and (version == 0 or version >= CAPTURES_EARLY))


class Launch:
    """A kernel with its grid and all of its arguments but the activations, which come first.

    The first call goes through Triton's JIT, which looks at every argument (about 17 us) and compiles if it has to. The
    compiled kernel depends on shapes and settings, which are fixed here, and on whether pointers are multiples of 16:
    so as long as the activations' are, later calls hand the arguments straight to it (about 6 us; 13 us where Triton
    encodes three tensor descriptors, 27 by the JIT). Measured with `tests/driver_stub.c`, on an AMD EPYC, Triton 3.7.1:
    without the driver's own share.

    Args:
        kernel: a `@triton.jit` function.
        grid: programs along up to three axes.
        fixed: the arguments behind the activations, constexprs included, in order, but for the last one, `PDL`.
        device: of the tensors.
        options: `num_warps`, `num_stages` and the like.
    """

    def __init__(
        self, kernel: Any, grid: Sequence[int], fixed: Sequence[Any], device: torch.device, **options: int
    ) -> None:
        self._kernel, self._fixed, self._device, self._options = kernel, tuple(fixed), device, options
        self._grid = (*grid, 1, 1)[:3]
        self._compiled: Any = None
        self._early = False  # whether that starts before the kernel before it has ended

    @property
    def kernel_name(self) -> str:
        """As profilers show it."""
        return str(self._kernel.fn.__name__)

    def __call__(self, *activations: Any) -> None:
        """Launch on the current stream of the device; activations are tensors, tensor descriptors or None."""
        aligned = not any(isinstance(t, torch.Tensor) and t.data_ptr() % 16 for t in activations)
        with current(self._device):
            if aligned and self._compiled is not None:
                self._compiled(*activations, *self._fixed, self._early)
                return
            early = starts_early()
            arguments = *activations, *self._fixed, early
            compiled = self._kernel[self._grid](*arguments, launch_pdl=early, **self._options)
        if aligned and compiled is not None and self._device.type == "cuda":
            self._compiled, self._early = compiled[self._grid], early
