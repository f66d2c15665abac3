"""The tiles that are checked and tuned for a convolution."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from fused_resblock.kernels.tiles import Gpu, Tile, choose_tile

from ..offline import CHIPS
from ..shapes import ConvShape, all_shapes


def name_of(tile: Tile) -> str:
    """A tile as the tables name it, such as `128x64x64.w4.s3`."""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}.w{tile.num_warps}.s{tile.num_stages}"


def tile_of(name: str) -> Tile:
    """The tile that `name_of` named."""
    blocks, warps, stages = name.split(".")
    return Tile(*map(int, blocks.split("x")), int(warps[1:]), int(stages[1:]))


def key_of(shape: ConvShape) -> str:
    """A shape as the tables name it, the same for convolutions that the kernel cannot tell apart."""
    epilogue = "residual" if shape.residual else f"shortcut{shape.shortcut}" if shape.shortcut else "plain"
    stride = shape.shortcut_stride if shape.shortcut else shape.stride
    return (
        f"{shape.channels}-{shape.out_channels}.{shape.kernel}x{shape.kernel}.{shape.size}px.s{stride}"
        f".g{shape.groups}.{epilogue}"
    )


def distinct_shapes() -> list[ConvShape]:
    """The shape table without repetitions."""
    return list({key_of(shape): shape for shape in reversed(all_shapes())}.values())[::-1]


def chosen(shape: ConvShape, batch: int, itemsize: int, gpu: Gpu) -> Tile:
    """The tile that ships for a shape."""
    n, k = shape.out_channels // shape.groups, shape.channels // shape.groups
    m = batch * shape.out_size**2
    return choose_tile(m, n, k, shape.kernel**2, itemsize, second=bool(shape.shortcut), gpu=gpu)


def _power_of_two(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())


def shared_bytes(tile: Tile, itemsize: int) -> int:
    """Shared memory of a tile's operands, of which a pipelined loop keeps one copy a stage."""
    return (tile.block_m + tile.block_n) * tile.block_k * itemsize * tile.num_stages


def tiles(shape: ConvShape, itemsize: int, capability: int) -> Iterator[Tile]:
    """Every tile worth trying.

    Left out: tiles over the chip's shared memory; blocks wider than the group's channels; stages where the loop has a
    single step; fewer than 2,048 or more than 16,384 accumulators for 4 warps (spills), or under 4,096 for 8; 128
    channels a step but in 1x1 convolutions of two-byte elements with at most 3 stages.
    """
    n, k = shape.out_channels // shape.groups, shape.channels // shape.groups
    widest, deepest = _power_of_two(n), _power_of_two(k)
    limit = CHIPS[capability].shared_limit if capability in CHIPS else CHIPS[80].shared_limit
    blocks_n = sorted({min(widest, b) for b in (32, 64, 128)})
    blocks_k = sorted({min(deepest, b) for b in (32, 64, 128)})
    for block_m, block_n, block_k, warps, stages in product((128, 64), blocks_n, blocks_k, (4, 8), (3, 2, 4, 1)):
        tile = Tile(block_m, block_n, block_k, warps, stages)
        steps = shape.kernel**2 * -(-k // block_k)
        deep = block_k > 64 and (shape.kernel > 1 or itemsize > 2 or stages > 3)
        idle = steps == 1 and not shape.shortcut and stages > 1
        cramped = warps == 8 and block_m * block_n < 4096
        if not (deep or idle or cramped or shared_bytes(tile, itemsize) > limit):
            yield tile
