"""The tails of ResNet-50's blocks: a 3x3, the expand behind it, and the next block's reduce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_resblock.backends.asked import Asked
from fused_resblock.kernels.cost import expand_shift_cost
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.stage import candidates, gemms_of
from fused_resblock.kernels.tables import stage_name
from fused_resblock.kernels.tiles import StageTile
from fused_resblock.params import BatchNorm, Conv, Epilogue


def random_layers(dtype: torch.dtype, device: str) -> Callable[..., Conv]:
    """Makes convolutions with random weights and norms: of outputs, channels, the filter's side and a stride."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        fan_in = size[1] * size[2] * size[3]
        t = torch.randn(size, generator=generator, device=device).mul_(fan_in**-0.5).to(dtype)
        return t.to(memory_format=torch.channels_last)

    def conv(k: int, c: int, size: int, stride: int = 1) -> Conv:
        low = torch.tensor((-0.5, 0.5, 0.5, -0.5), device=device)[:, None]
        vectors = torch.rand(4, k, generator=generator, device=device) + low
        norm = BatchNorm(*vectors.to(dtype).unbind())
        return Conv(normal(k, c, size, size), None, norm, (stride, stride), (size // 2, size // 2))

    return conv


@dataclass(frozen=True)
class TailShape:
    """A tail: channels of the 3x3, output rows, its stride, the downsample branch's channels (or 0), the next reduce's.

    The block's output has four times the channels of the 3x3.
    """

    name: str
    width: int
    size: int
    stride: int = 1
    second: int = 0
    outputs: int = 0

    #: as the verdicts, and as the times name what runs it
    kernel = "expand_shift"
    backend = "stage"

    def build(self, batch: int, dtype: torch.dtype, device: str) -> Asked:
        """The tail with random weights as large as keep activations standard normal."""
        conv = random_layers(dtype, device)
        k, large = 4 * self.width, self.size * self.stride
        shortcut = conv(k, self.second, 1, self.stride) if self.second else None
        layers = [conv(self.width, self.width, 3, self.stride), conv(k, self.width, 1)]
        layers += [conv(self.outputs, k, 1)] if self.outputs else []
        other = (batch, self.second, large, large) if self.second else (batch, k, self.size, self.size)
        return Asked(
            (batch, self.width, large, large),
            other,
            dtype,
            torch.device(device),
            tuple(layers),
            Epilogue(1, None, shortcut),
        )

    def shipped(self, itemsize: int, gpu: Gpu) -> list[StageTile]:
        """The tiles of which one is chosen for it."""
        return candidates(self.width, self.outputs, itemsize, bool(self.second), gpu)

    def dram_bytes(self, batch: int, itemsize: int) -> int:
        """What one kernel has to move at least: its inputs, outputs and filters, each once."""
        asked = self.build(batch, torch.float16, "meta")
        gemms = gemms_of(asked.size, *asked.layers[:2], asked.epilogue.shortcut, asked.reduce)
        tile = StageTile(64, 64, 64, 4, 1, 1)  # of no matter for device memory
        cost = expand_shift_cost(gemms.conv, gemms.expand, itemsize, tile, second=gemms.second, reduce=gemms.reduce)
        return cost.dram

    def case(self) -> str:
        """As tables name it."""
        asked = self.build(1, torch.float16, "meta")
        return stage_name(*asked.layers[:2], asked.epilogue.shortcut, asked.reduce)

    def key(self) -> str:
        """As tables name it, and its image size."""
        return f"{self.case()}.{self.size}px"


def shapes(quick: bool) -> list[TailShape]:
    """The tails of ResNet-50's first three stages; the last one's channels do not fit a tile."""
    if quick:
        return [TailShape("tiny", 16, 5, outputs=16), TailShape("tiny.first", 16, 4, 2, 24)]
    found = []
    for stage, (width, size) in enumerate(((64, 56), (128, 28), (256, 14)), 1):
        stride, second = (1, 64) if stage == 1 else (2, 2 * width)
        found.append(TailShape(f"l{stage}.first", width, size, stride, second, width))
        if stage < 3:  # in front of blocks that are one kernel
            found.append(TailShape(f"l{stage}.first.last", width, size, stride, second))
        found.append(TailShape(f"l{stage}", width, size, outputs=width))
        found.append(TailShape(f"l{stage}.last", width, size))
        if stage < 3:  # the next stage's reduce is twice as wide
            found.append(TailShape(f"l{stage}.next", width, size, outputs=2 * width))
    return found


def odd_shapes(quick: bool) -> list[TailShape]:
    """Tails whose last tile is ragged whatever its rows: 3 images of 9x9 pixels."""
    if quick:
        return [TailShape("tiny.odd", 16, 3, outputs=16)]
    return [
        TailShape("l1.odd", 64, 9, outputs=64),
        TailShape("l1.odd.first", 64, 9, 1, 64, 64),
        TailShape("l2.odd", 128, 9, outputs=128),
        TailShape("l2.odd.first", 128, 9, 2, 256, 128),
        TailShape("l3.odd", 256, 9),
    ]
