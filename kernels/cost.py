"""Bytes and floating-point operations of the kernels, and the time that a chip's ceilings allow them.

Three ceilings bind a convolution: device memory, the path from L2 to the multiprocessors, and the matrix units. Every
tensor counts once in device memory; in L2 every tile loads its rows and its filters for each tap and channel block.
Source of the method: Williams, Waterman and Patterson, "Roofline" (CACM 2009), with L2 as a third roof.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tiles import Tile


@dataclass(frozen=True)
class Ceilings:
    """Rates of a chip: bytes a second of device memory and of L2, matrix operations a second, multiprocessors."""

    name: str
    dram: float
    l2: float
    matrix: float
    multiprocessors: int


@dataclass(frozen=True)
class Cost:
    """What a kernel moves and computes: bytes of device memory, bytes through L2, operations (a multiply-add is 2)."""

    dram: int
    l2: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.dram + other.dram, self.l2 + other.l2, self.flops + other.flops)

    def floor(self, chip: Ceilings) -> float:
        """Seconds that no implementation with these tensors can beat: device memory and matrix units."""
        return max(self.dram / chip.dram, self.flops / chip.matrix)

    def bound(self, chip: Ceilings) -> str:
        """Which ceiling takes longest: "dram", "l2" or "matrix"."""
        times = {"dram": self.dram / chip.dram, "l2": self.l2 / chip.l2, "matrix": self.flops / chip.matrix}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class Gemm:
    """A convolution as a GEMM: M output pixels, N output channels, K input channels a tap, all groups together.

    `in_pixels` counts the input pixels that are read at all: those of a strided 1x1 are M, not N*H*W.
    """

    m: int
    n: int
    k: int
    taps: int
    in_pixels: int
    groups: int = 1

    @property
    def flops(self) -> int:
        """Operations of the convolution."""
        return 2 * self.m * self.n * (self.k // self.groups) * self.taps

    def dram(self, itemsize: int) -> int:
        """Bytes of input and filters."""
        return itemsize * (self.in_pixels * self.k + self.n * (self.k // self.groups) * self.taps)

    def programs(self, tile: Tile) -> int:
        """Programs of a launch."""
        return -(-self.m // tile.block_m) * -(-(self.n // self.groups) // tile.block_n) * self.groups

    def l2(self, itemsize: int, tile: Tile) -> int:
        """Bytes that the tiles load: `(BLOCK_M + BLOCK_N) * BLOCK_K` for each tap and channel block."""
        steps = self.taps * -(-(self.k // self.groups) // tile.block_k)
        return self.programs(tile) * steps * (tile.block_m + tile.block_n) * tile.block_k * itemsize


def conv_bn_act_cost(
    gemm: Gemm, itemsize: int, tile: Tile, *, residual: bool = False, second: Gemm | None = None
) -> Cost:
    """Cost of one `conv_bn_act`: inputs, filters and residual read once, the output written once.

    Args:
        gemm: the convolution.
        itemsize: bytes of an element.
        tile: the tile that it runs with.
        residual: whether a tensor of the output's shape is added.
        second: the 1x1 convolution that is accumulated in the same tile.
    """
    output = gemm.m * gemm.n * itemsize
    epilogue = output * (2 if residual else 1)
    cost = Cost(gemm.dram(itemsize) + epilogue, gemm.l2(itemsize, tile) + epilogue, gemm.flops)
    if second is not None:
        cost += Cost(second.dram(itemsize), second.l2(itemsize, tile), second.flops)
    return cost


def elementwise_cost(elements: int, itemsize: int, reads: int, writes: int = 1) -> Cost:
    """Cost of a pass that reads and writes tensors of `elements` each."""
    moved = elements * itemsize * (reads + writes)
    return Cost(moved, moved, 0)


def predicted(cost: Cost, programs: int, resident: int, chip: Ceilings) -> float:
    """Seconds that a launch should take: its slowest ceiling, with the multiprocessors idle in the last wave.

    Args:
        cost: of the launch.
        programs: how many are launched.
        resident: how many a multiprocessor holds at once.
        chip: its ceilings. Device memory is shared by all, so it is not slowed by an uneven last wave as long as half
            the multiprocessors are busy; L2 path and matrix units belong to each one.
    """
    slots = resident * chip.multiprocessors
    waves = -(-programs // slots)
    share = programs / (waves * slots)
    per_unit = max(cost.l2 / chip.l2, cost.flops / chip.matrix) / share
    return max(cost.dram / chip.dram / min(1.0, 2 * min(1.0, programs / chip.multiprocessors)), per_unit)
