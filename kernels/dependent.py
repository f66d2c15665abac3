"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits before it needs its results.

In a CUDA graph most of the gap between two kernels goes (about 1 us of a kernel that takes 3 at batch 1), and kernels
that keep their filters load them while the last programs of the one before are still at work. Filters and norms are
read before the wait and so must not be written by a kernel that lets others start early; those of PyTorch do not.
Source: NVIDIA, CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_input(PDL: tl.constexpr):  # whether the kernel was launched so
    """Let the next kernel start as soon as all programs are here, and wait until the one before has ended.

    What was written before it, by any kernel, is visible behind it: each waits for the one before itself.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
