"""Bytes and floating-point operations of the kernels, and the time that a chip's ceilings allow them.

Three ceilings bind a convolution: device memory, the path from L2 to the multiprocessors, and the matrix units. Every
tensor counts once in device memory; in L2 every tile loads its rows and its filters for each tap and channel block.
Source of the method: Williams, Waterman and Patterson, "Roofline" (CACM 2009), with L2 as a third roof.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ring import shared_of
from .tiles import StageTile, StemTile, Tile

#: seconds that a launch takes besides its loop: start, first loads, last stores
LAUNCH = 2.5e-6
#: seconds that a load from L2 takes, and from there to the matrix units
LATENCY = 0.36e-6
#: memory, L2, products and steps of a program that does all of it hinder each other: their times add up by this power,
#: `(sum t**4) ** (1/4)`, which is what tails took on an H100 (`tests/test_predictions.py`), and 3x3s with a halo nearly
HINDRANCE = 4


@dataclass(frozen=True)
class Ceilings:
    """Rates of a chip: bytes a second of device memory and of L2, matrix operations a second, multiprocessors.

    `shared` is the shared memory of a multiprocessor in bytes.
    """

    name: str
    dram: float
    l2: float
    matrix: float
    multiprocessors: int
    shared: int = 228 << 10


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

    `in_pixels` counts the input pixels that are read at all: those of a strided 1x1 are M, not N*H*W. `boxes` are those
    of 8x8 pixels that cover the images; 0 is for as many as M pixels need.
    """

    m: int
    n: int
    k: int
    taps: int
    in_pixels: int
    groups: int = 1
    boxes: int = 0

    @property
    def flops(self) -> int:
        """Operations of the convolution."""
        return 2 * self.m * self.n * (self.k // self.groups) * self.taps

    @property
    def filters(self) -> int:
        """Elements of the filters."""
        return self.n * (self.k // self.groups) * self.taps

    def dram(self, itemsize: int) -> int:
        """Bytes of input and filters."""
        return itemsize * (self.in_pixels * self.k + self.filters)

    def pieces(self, tile: Tile) -> int:
        """Pieces of the output that the tile cuts it into."""
        return -(-self.m // tile.block_m) * -(-(self.n // self.groups) // tile.block_n) * self.groups

    def steps(self, tile: Tile) -> int:
        """Steps of the loop over taps and channels for a piece."""
        return self.taps * -(-(self.k // self.groups) // tile.block_k)

    def l2(self, itemsize: int, tile: Tile) -> int:
        """Bytes that the tiles load: `(BLOCK_M + BLOCK_N) * BLOCK_K` for each tap and channel block."""
        return self.pieces(tile) * self.steps(tile) * (tile.block_m + tile.block_n) * tile.block_k * itemsize

    def tile_flops(self, tile: Tile) -> int:
        """Operations that the matrix units do: those of whole tiles."""
        return 2 * self.pieces(tile) * self.steps(tile) * tile.block_m * tile.block_n * tile.block_k


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


def halo_l2(pixels: int, filters: int, programs: int) -> int:
    """Bytes that `halo` loads: boxes of 8 rows three times, each with a row above and below, filters a program."""
    return pixels * 3 * (8 + 2) // 8 + programs * filters


def conv_halo_cost(gemm: Gemm, itemsize: int, programs: int, *, residual: bool = False) -> Cost:
    """Cost of one `conv_bn_act` by so many programs that read their taps from shared memory."""
    pixels, output = (itemsize * size for size in (gemm.in_pixels * gemm.k, gemm.m * gemm.n))
    epilogue = output * (2 if residual else 1)
    filters = itemsize * gemm.filters // gemm.groups  # a program has those of its group
    loaded = halo_l2(pixels, filters, programs)
    return Cost(gemm.dram(itemsize) + epilogue, loaded + epilogue, gemm.flops)


def elementwise_cost(elements: int, itemsize: int, reads: int) -> Cost:
    """Cost of a pass that reads some tensors of `elements` each and writes one."""
    moved = elements * itemsize * (reads + 1)
    return Cost(moved, moved, 0)


def expand_shift_cost(
    conv: Gemm, expand: Gemm, itemsize: int, tile: StageTile, *, second: Gemm | None = None, reduce: Gemm | None = None
) -> Cost:
    """Cost of one `expand_shift`: the 3x3's input, the residual (or shortcut's input), y and g move once.

    In L2 each program loads its taps, all filters once, and its pieces of residual and outputs.
    """
    programs = -(-conv.m // tile.block_m)
    y = conv.m * expand.n * itemsize
    filters = itemsize * (conv.k * conv.n * conv.taps + expand.k * expand.n)
    dram = conv.in_pixels * conv.k * itemsize + 2 * y + filters
    l2 = programs * (tile.block_m * conv.k * conv.taps * itemsize + filters) + 2 * y
    flops = conv.flops + expand.flops
    if second is not None:
        dram += second.dram(itemsize) - y  # in the place of the residual
        chunks = 1 if tile.held else -(-second.n // tile.block_n)
        l2 += programs * itemsize * second.k * (chunks * tile.block_m + second.n) - y
        flops += second.flops
    if reduce is not None:
        g = reduce.m * reduce.n * itemsize
        dram += g + reduce.n * reduce.k * itemsize
        l2 += g + programs * reduce.n * reduce.k * itemsize
        flops += reduce.flops
    return Cost(dram, l2, flops)


def expand_shift_halo_cost(
    conv: Gemm, expand: Gemm, itemsize: int, programs: int, *, second: Gemm | None = None, reduce: Gemm | None = None
) -> Cost:
    """Cost of one `expand_shift` by so many programs that read their taps from shared memory and keep all filters."""
    whole = StageTile(conv.m, expand.n, conv.k, 0, 0, 0)
    cost = expand_shift_cost(conv, expand, itemsize, whole, second=second, reduce=reduce)
    pixels = conv.in_pixels * conv.k * itemsize
    filters = itemsize * sum(gemm.filters for gemm in (conv, expand, second, reduce) if gemm is not None)
    return Cost(cost.dram, cost.dram - pixels - filters + halo_l2(pixels, filters, programs), cost.flops)


def stem_cost(conv: Gemm, pooled: int, itemsize: int, tile: StemTile) -> Cost:
    """Cost of a stem: the image read, its copy of 4 channels written and read, the pooled output written.

    The matrix units see windows of a power of two columns by 4 channels, and a program computes a row and two columns
    of the convolution that its neighbours compute as well. L1 holds what the windows share and the filters, so from L2
    each program loads its part of the copy and the filters once.

    Args:
        conv: the convolution; of its `taps` the root is the filter's side.
        pooled: pixels of the pooled output.
        itemsize: bytes of an element.
        tile: the tile that it runs with.
    """
    side = round(conv.taps**0.5)
    window = 4 << (side - 1).bit_length()  # elements of a row of a window
    rows = (2 * tile.pooled_rows + 1) / (2 * tile.pooled_rows)
    columns = tile.pooled_columns / (tile.pooled_columns - 1)
    pixels = round(conv.m * rows * columns)
    output, copy = pooled * conv.n * itemsize, 4 * conv.in_pixels * itemsize
    dram = conv.dram(itemsize) + 2 * copy + output
    programs = -(-pooled // (tile.pooled_rows * (tile.pooled_columns - 1)))
    filters = conv.n * side * window * itemsize
    l2 = dram - copy + round(copy * rows * columns) + programs * filters
    return Cost(dram, l2, 2 * pixels * conv.n * side * window)


def shared_bytes(tile: Tile, itemsize: int, *, residual: bool = False, second: bool = False) -> int:
    """Shared memory of a program: the operands of every stage, and with TMA the pieces that come and go.

    With TMA a second GEMM's operands may be under way together with the first's; in a ring they take turns.
    """
    if tile.ring:
        return shared_of(tile, residual=residual, second=second)
    operands = tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * itemsize
    operands *= 2 if second and tile.persistent else 1
    return operands + (tile.persistent > 0) * (1 + residual) * tile.block_m * tile.block_n * itemsize


def register_count(tile: Tile, *, residual: bool = False, second: bool = False) -> int:
    """Registers of a thread: an estimate that lies within 20 % of what compiles for sm_90 (`make codegen`).

    A piece's accumulators, twice with a residual (it is held beside them) or a second GEMM; the rest is addresses, of
    which a second GEMM without TMA has twice as many. `conv_pair` has one accumulator for both GEMMs, and half as many
    registers for the columns' scales; `conv_ring` as many.
    """
    accumulators = tile.block_m * tile.block_n // (32 * tile.num_warps)
    if tile.ring:
        return 7 * accumulators // 4 + 16
    if second:
        return 2 * accumulators + (84 if tile.persistent else 124)
    return (2 if residual else 1) * accumulators + 36


def resident_programs(tile: Tile, itemsize: int, shared: int, *, residual: bool = False, second: bool = False) -> int:
    """Programs that a multiprocessor with so much shared memory holds at once; 0 if not one fits without spilling."""
    registers = register_count(tile, residual=residual, second=second)
    if registers > 250:
        return 0
    threads = 32 * tile.num_warps
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(
        shared // (shared_bytes(tile, itemsize, residual=residual, second=second) + 1024), by_registers, 2048 // threads
    )


def predicted(
    cost: Cost, programs: int, resident: int, chip: Ceilings, *, step_seconds: float = 0.0, hindered: bool = False
) -> float:
    """Seconds that a launch should take: its slowest ceiling, with the multiprocessors idle in the last wave.

    Args:
        cost: of the launch.
        programs: how many are launched, or pieces that persistent ones take.
        resident: how many a multiprocessor holds at once.
        chip: its ceilings. Device memory is shared by all, so it is not slowed by an uneven last wave as long as half
            the multiprocessors are busy; L2 path and matrix units belong to each one.
        step_seconds: what one program takes on its own for all of its steps, below which no wave ends.
        hindered: whether what takes nearly as long as the slowest ceiling counts as well; see `HINDRANCE`.
    """
    waves = -(-programs // (resident * chip.multiprocessors))
    share = programs / (-(-programs // chip.multiprocessors) * chip.multiprocessors)
    dram = cost.dram / chip.dram / min(1.0, 2 * min(1.0, programs / chip.multiprocessors))
    times = dram, cost.l2 / chip.l2 / share, cost.flops / chip.matrix / share, waves * step_seconds
    seconds = sum(time**HINDRANCE for time in times) ** (1 / HINDRANCE) if hindered else max(times)
    return seconds + LAUNCH
