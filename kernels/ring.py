"""What `conv_ring` and `conv_pair` take: a 1x1, or both of a downsample branch, in a ring of loads, on Hopper."""

from __future__ import annotations

from dataclasses import replace

import torch

from .gpu import gpu_of
from .tiles import Tile

#: channels of a step, and of a piece of the result: 128 bytes, one row of the swizzle
WIDTH = 64
#: bytes of shared memory of a multiprocessor, of which every program takes one KiB more than it asks for
SHARED = 228 << 10
#: (block_m, block_n, warps): the accumulator takes half of the registers at most
BLOCKS = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (128, 256, 8), (256, 128, 8))


def _ring_bytes(tile: Tile, second: bool) -> int:
    """Bytes of the ring, with a barrier a step, and of fp32 vectors: `conv_pair` has one at a time, `conv_ring` two."""
    ring = tile.num_stages * (2 * (tile.block_m + tile.block_n) * WIDTH + 8)
    return ring + (4 if second else 8) * tile.block_n + 8  # barriers begin at multiples of 16 bytes


def _piece_bytes(tile: Tile) -> int:
    """Bytes of 64 channels of the result, with the barrier of those of a residual."""
    return 2 * tile.block_m * WIDTH + 8


def buffers_of(tile: Tile, *, residual: bool = False, second: bool = False) -> int:
    """How many pieces of 64 channels of the result find room beside the ring; 0 if too few do.

    One is enough without a residual. With one all of a tile have to, and those of two tiles are of use.
    """
    free = SHARED // max(1, tile.persistent) - 1024 - _ring_bytes(tile, second)
    fit, pieces = free // _piece_bytes(tile), tile.block_n // WIDTH
    if residual:
        return 0 if fit < pieces else min(fit, 2 * pieces)
    return 0 if fit < 1 else 1 << min(fit, pieces).bit_length() - 1  # a power of two divides their number


def shared_of(tile: Tile, *, residual: bool = False, second: bool = False) -> int:
    """Bytes of shared memory of a program, with as many pieces of the result as it cannot do without."""
    least = tile.block_n // WIDTH if residual else 1
    pieces = max(least, buffers_of(tile, residual=residual, second=second))
    return _ring_bytes(tile, second) + pieces * _piece_bytes(tile)


def refusal(x, conv, other, epilogue, tile: Tile) -> str | None:
    """Why `conv_ring`, with a shortcut `conv_pair`, cannot run a convolution that `conv_tma` can; None when it can."""
    branch = epilogue.shortcut
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"{x.dtype}: only 16 bits"
    if not gpu_of(x.device).gluon:
        return "another chip than Hopper, or a Triton whose Gluon is not known"
    k, c, r, s = conv.weight.shape
    if (r, s) != (1, 1) or (conv.stride, conv.padding, conv.groups) != ((1, 1), (0, 0), 1):
        return "no plain 1x1"
    if c % WIDTH or (branch is not None and branch.weight.shape[1] % WIDTH) or k % tile.block_n:
        return f"channels that are no multiple of {WIDTH} or of the tile's"
    blocks = (tile.block_m, tile.block_n, tile.num_warps)
    if blocks not in BLOCKS or tile.block_k != WIDTH or tile.num_stages < 2 or not tile.persistent:
        return f"a tile {tile}"
    second = branch is not None
    pieces = buffers_of(tile, residual=other is not None and not second, second=second)
    return None if pieces else f"a tile {tile} that does not fit shared memory"


def by_boxes(tile: Tile) -> Tile:
    """The tile of `conv_tma` that stands in: two accumulators have to fit the registers."""
    narrow = min(tile.block_n, 128)
    return replace(tile, block_m=min(tile.block_m, 128), block_n=narrow, num_stages=2, persistent=1, ring=False)
