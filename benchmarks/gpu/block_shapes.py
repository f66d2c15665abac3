"""The bottlenecks of ResNet-50, and of Wide ResNet-50's first stage, that may be one kernel: with a 3x3 of stride 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fused_resblock.backends.asked import Asked
from fused_resblock.backends.whole import Layers
from fused_resblock.kernels.bottleneck import bands_of, cost_of, predicted_seconds, tiles_for
from fused_resblock.kernels.cost import Ceilings
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.tiles import StageTile
from fused_resblock.params import Epilogue

from .tail_shapes import random_layers


@dataclass(frozen=True)
class BlockShape:
    """A block: channels of the 3x3, rows and columns, the downsample branch's channels (or 0), and the output's."""

    name: str
    width: int
    size: int
    second: int = 0
    outputs: int = 256

    #: as the verdicts, and as the times name what runs it
    kernel = "bottleneck_rows"
    backend = "block"
    stride = 1

    def build(self, batch: int, dtype: torch.dtype, device: str) -> Asked:
        """The block with random weights as large as keep activations standard normal."""
        conv = random_layers(dtype, device)
        channels = self.second or self.outputs
        layers = conv(self.width, channels, 1), conv(self.width, self.width, 3), conv(self.outputs, self.width, 1)
        shortcut = conv(self.outputs, self.second, 1) if self.second else None
        return Asked(
            self._size(batch), None, dtype, torch.device(device), layers, Epilogue(1, None, shortcut), whole=True
        )

    def _size(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.second or self.outputs, self.size, self.size

    def shipped(self, itemsize: int, gpu: Gpu) -> list[StageTile]:
        """The tiles that there are for it."""
        return tiles_for(self.width, self.outputs, bool(self.second)) if gpu.rows and itemsize == 2 else []

    def dram_bytes(self, batch: int, itemsize: int) -> int:
        """What it moves: its input, with the rows that two bands read, its output and its filters."""
        tile = tiles_for(self.width, self.outputs, bool(self.second))[0]
        block = self._size(batch), tile, self.width, self.outputs
        bands = bands_of(*block, bool(self.second), Gpu().multiprocessors)
        return cost_of(*block, bool(self.second), bands).dram * itemsize // 2

    def seconds(self, batch: int, tile: StageTile) -> Callable[[Ceilings], float]:
        """What it should take with a tile, by a chip's ceilings."""
        return partial(predicted_seconds, self._size(batch), tile, self.width, self.outputs, bool(self.second))

    def case(self) -> str:
        """As tables name it."""
        return Layers.of(self.build(1, torch.float16, "meta")).case

    def key(self) -> str:
        """As tables name it, and its image size."""
        return f"{self.case()}.{self.size}px"


def shapes(quick: bool) -> list[BlockShape]:
    """The blocks that are measured; none where there is no Hopper."""
    if quick:
        return []
    return [
        BlockShape("l1.first", 64, 56, 64),
        BlockShape("l1", 64, 56),
        BlockShape("l2", 128, 28, outputs=512),
        BlockShape("wide.l1.first", 128, 56, 64),
        BlockShape("wide.l1", 128, 56),
    ]


def odd_shapes(quick: bool) -> list[BlockShape]:
    """Blocks whose images fill neither the steps' columns nor the last step, and of several bands."""
    if quick:
        return []
    return [
        BlockShape("l1.odd", 64, 9),
        BlockShape("l1.odd.first", 64, 13, 64),
        BlockShape("l2.odd", 128, 9, outputs=512),
        BlockShape("wide.odd.first", 128, 13, 64),
    ]
