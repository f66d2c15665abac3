"""What `bottleneck_rows` takes, a whole bottleneck as one kernel on Hopper, and how its images are cut into bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import tail_ring
from .boxes import Box
from .cost import LATENCY, Ceilings, Cost, predicted
from .gpu import gpu_of
from .ring import SHARED, WIDTH
from .tiles import StageTile

#: warps by the pixels of a step: each four of them compute 64
WARPS = {64: 4, 128: 8}
#: tiles by the channels of the 3x3 and whether there is a downsample branch: the pixels of a step, how many pieces of
#: pixels and blocks of filters are in the rings, and whether these are all of them and stay. Where they do not, two
#: programs of 64 pixels a step fit a multiprocessor
TILES = {
    (64, False): ((128, 2, 17, True), (128, 6, 8, False), (64, 6, 17, True), (64, 5, 5, False)),
    (64, True): ((128, 4, 8, False), (64, 3, 18, True), (64, 3, 5, False)),
    (128, False): ((128, 3, 4, False),),
    (128, True): ((128, 2, 3, False),),
}
#: what a row above or below a band costs, of which the reduce alone is computed, beside one of the band
HEAD = 0.5


class Bands(NamedTuple):
    """How images are cut: images side by side in a step, bands of each, rows of a band, programs that take them all."""

    groups: int
    bands: int
    rows: int
    programs: int


def shared_of(tile: StageTile, width: int, outputs: int, second: bool) -> int:
    """Bytes of shared memory of a program.

    Args:
        tile: its `tap_stages` pieces of pixels and `chunk_stages` blocks of filters are in the rings.
        width: channels of the 3x3.
        outputs: of the expand.
        second: whether there is a downsample branch: y then leaves from memory of its own.
    """
    line = 2 * WIDTH  # bytes of 64 channels
    rings = tile.tap_stages * (tile.block_m * line + 8) + tile.chunk_stages * (width * line + 8)
    kept = (3 * width // WIDTH * tile.block_m + 8) * line
    vectors = 8 * (2 * width + outputs * (1 + second))
    return rings + kept + 2 * tile.block_m * line * second + vectors + 64  # barriers begin at multiples of 16 bytes


def resident(tile: StageTile, width: int, outputs: int, second: bool) -> int:
    """Programs that a multiprocessor holds at once: of those of four warps two, if they fit; 0 if not one does."""
    fit = SHARED // (shared_of(tile, width, outputs, second) + 1024)
    return min(fit, 8 // tile.num_warps)


def tiles_for(width: int, outputs: int, second: bool) -> list[StageTile]:
    """The tiles for these channels; see `shared_of`."""
    found = [
        StageTile(block_m, WIDTH, WIDTH, WARPS[block_m], pixels, filters, tma=True, held=held, ring=True)
        for block_m, pixels, filters, held in TILES.get((width, second), ())
    ]
    return [tile for tile in found if _tile_refusal(tile, width, outputs, second) is None]


def _blocks(width: int, outputs: int, second: bool) -> int:
    """Blocks of filters of a row: of the reduce, the 3x3, and the expand or both that are added."""
    reduce = 1 if second else outputs // WIDTH
    return reduce + 9 * width // WIDTH + outputs // WIDTH * (1 + second)


def _tile_refusal(tile: StageTile, width: int, outputs: int, second: bool) -> str | None:
    """Why a tile is none for these channels."""
    known = WARPS.get(tile.block_m) == tile.num_warps and tile.ring and (tile.block_n, tile.block_k) == (WIDTH, WIDTH)
    if not known or width not in (WIDTH, 2 * WIDTH):
        return f"a tile {tile}"
    if min(tile.tap_stages, tile.chunk_stages) < 2:
        return f"a tile {tile} with too short rings"
    if tile.held and tile.chunk_stages != _blocks(width, outputs, second):
        return f"a tile {tile} that does not hold all filters"
    return None if resident(tile, width, outputs, second) else f"a tile {tile} that does not fit shared memory"


def refusal(x, reduce, conv, expand, shortcut, tile: StageTile | None = None) -> str | None:
    """Why the kernel cannot run a block of these convolutions, or not with this tile; None when it can.

    Args:
        x: an example of the block's input.
        reduce, conv, expand, shortcut: its convolutions as `fused_resblock.params.Conv`; no shortcut is a residual.
        tile: how to run it; None for any.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"{x.dtype}: only 16 bits"
    if not gpu_of(x.device).rows:
        return "another chip than Hopper, or a Triton in which no matrix begins within another"
    for name, pointwise in (("first", reduce), ("last", expand), ("downsample", shortcut)):
        plain = (1, 1), (0, 0), (1, 1), 1
        if pointwise is not None and (tuple(pointwise.weight.shape[2:]), pointwise[3:]) != ((1, 1), plain):
            return f"the block's {name} convolution is no plain 1x1"
    width, outputs, channels = conv.weight.shape[0], expand.weight.shape[0], reduce.weight.shape[1]
    if (reason := tail_ring.conv_refusal(conv)) is not None:
        return reason
    if (x.shape[1], reduce.weight.shape[0], expand.weight.shape[1]) != (channels, width, width):
        return "channels that do not fit each other"
    if outputs < 2 * WIDTH or outputs & (outputs - 1):
        return f"{outputs} channels are no power of two from {2 * WIDTH} up"
    if shortcut is not None and (channels, *shortcut.weight.shape[:2]) != (WIDTH, outputs, WIDTH):
        return f"a downsample branch of more than {WIDTH} channels"
    if shortcut is None and channels != outputs:
        return "a residual of another channel count"
    second = shortcut is not None
    tiles = tiles_for(width, outputs, second) if tile is None else [tile]
    if not tiles:
        return f"no tile has room for {width} channels" + " and a downsample branch" * second
    if tile is not None and (reason := _tile_refusal(tile, width, outputs, second)) is not None:
        return reason
    widest = max(tile.block_m for tile in tiles) - 2
    return None if x.shape[3] <= widest else f"rows of more than {widest} pixels"


def fitting(x, reduce, conv, expand, shortcut) -> list[StageTile]:
    """The tiles with which the kernel may run a block."""
    tiles = tiles_for(conv.weight.shape[0], expand.weight.shape[0], shortcut is not None)
    return [tile for tile in tiles if refusal(x, reduce, conv, expand, shortcut, tile) is None]


def box_of(tile: StageTile, columns: int) -> Box:
    """The pixels of a step: a row of some images, with a column to the left and at least one to the right of it."""
    padded = 1 << (columns + 1).bit_length()
    return Box(tile.block_m // padded, 1, padded)


def bands_of(size: Sequence[int], tile: StageTile, width: int, outputs: int, second: bool, units: int) -> Bands:
    """The cut that should take least: few rows are computed twice, and no multiprocessor is left with more bands.

    Args:
        size: of the block's input, `[N, C, H, W]`.
        tile, width, outputs, second: see `shared_of`.
        units: multiprocessors.
    """
    n, _, h, w = size
    groups, places = -(-n // box_of(tile, w).images), units * resident(tile, width, outputs, second)

    def rows_in_turn(rows: int) -> float:
        return -(-groups * -(-h // rows) // places) * (rows + 2 * HEAD)

    rows = min(range(1, h + 1), key=rows_in_turn)
    bands = -(-h // rows)
    return Bands(groups, bands, rows, min(groups * bands, places))


def cost_of(size: Sequence[int], tile: StageTile, width: int, outputs: int, second: bool, bands: Bands) -> Cost:
    """Cost of a block in 16 bits: the input once, and from L2 again as the residual; filters for every row.

    Products are those of whole steps, and of the rows that are computed twice.
    """
    n, channels, h, w = size
    steps, heads = (bands.groups * bands.bands * rows for rows in (bands.rows, 2))
    loads = (bands.programs, 0) if tile.held else (steps, heads)  # of the filters
    head = width * channels
    filters = head + 9 * width * width + width * outputs + channels * outputs * second
    x, y = 2 * n * h * w * channels, 2 * n * h * w * outputs
    read = x * (h + 2 * (bands.bands - 1)) // h
    l2 = read + x + y + 2 * (loads[0] * filters + loads[1] * head)
    return Cost(read + y + 2 * filters, l2, 2 * tile.block_m * (steps * filters + heads * head))


def predicted_seconds(
    size: Sequence[int], tile: StageTile, width: int, outputs: int, second: bool, chip: Ceilings
) -> float:
    """What a block should take with a tile on a chip: a program's loads run ahead, and its steps wait for each other.

    A step are its products, the way of a chunk through the registers for each of them, and that of h1 and h2.
    """
    bands = bands_of(size, tile, width, outputs, second, chip.multiprocessors)
    cost = cost_of(size, tile, width, outputs, second, bands)
    rate = 2 * tile.block_m * chip.multiprocessors / chip.matrix
    head = width * size[1]
    rest = 9 * width * width + width * outputs + size[1] * outputs * second
    row = (head + rest) * rate + (outputs // WIDTH + 2) * LATENCY / 2
    band = bands.rows * row + 2 * (head * rate + LATENCY / 2)
    places = resident(tile, width, outputs, second)
    return predicted(cost, bands.groups * bands.bands, places, chip, step_seconds=band, hindered=True)
