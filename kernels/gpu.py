"""What the choice of a kernel needs to know of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors and compute capability (90 for 9.0); an H100 unless told."""

    multiprocessors: int = 132
    capability: int = 90

    @property
    def tma(self) -> bool:
        """Whether it has a tensor memory accelerator that Triton uses well.

        Triton before 3.7 keeps a part of each descriptor on the stack on chips of capability 12.x.
        """
        return self.capability >= 90 and (self.capability < 120 or triton_release() >= (3, 7))

    @property
    def tail_tma(self) -> bool:
        """Whether `expand_shift_tma` is right on it: where it has TMA, but not on Hopper.

        Triton multiplies there from registers that it writes anew while products that read them are under way. On an
        H100 a tile of 128 pixels and 256 channels gives wrong sums; others pass by luck.
        """
        return self.tma and self.capability != 90

    def conv_tma_right(self, block_n: int) -> bool:
        """Whether `conv_tma` is right on it with so many output channels a tile: on Hopper not with fewer than 64.

        Triton takes the pixels through registers then, as in `expand_shift_tma`, and loads the next ones into them
        while a product may still read them: the PTX waits for all products but the last. An H100 gave right results, by
        its timing alone.
        """
        return self.capability != 90 or block_n >= 64

    @property
    def gluon(self) -> bool:
        """Whether the kernels in Gluon run on it: they are for Hopper, and for Tritons whose Gluon is known."""
        return self.capability == 90 and (3, 6) <= triton_release() <= (3, 9)

    @property
    def rows(self) -> bool:
        """Whether `bottleneck_rows` runs on it: its matrices begin within others, as Triton before 3.8 lets them."""
        return self.gluon and triton_release() < (3, 8)


def right_on(device: torch.device, right: Callable[[Gpu], bool]) -> bool:
    """Whether a device computes with a kernel what it should; where no GPU computes, nothing is in the way."""
    return device.type != "cuda" or right(gpu_of(device))


@cache
def triton_release() -> tuple[int, ...]:
    """Major and minor version of the installed Triton."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def tf32_allowed() -> bool:
    """Whether torch lets cuDNN round the factors of an fp32 convolution to TF32.

    Asked of the newer setting, which knows what the older `allow_tf32` was set to; the older one raises once the newer
    has been used.
    """
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that a tensor's device is; an H100 where it is none, so that the interpreter runs the same tiles."""
    if device.type != "cuda":
        return Gpu()
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, 10 * properties.major + properties.minor)
