"""What `expand_shift_ring` and `expand_shift_wide` take: a bottleneck's tail of 128 channels, by rings, on Hopper."""

from __future__ import annotations

from dataclasses import replace

import torch

from .gpu import gpu_of, triton_release
from .ring import SHARED, WIDTH
from .tiles import StageTile

#: pixels, channels of a step and warps of a program, and how many boxes of pixels and blocks of filters then fit; with
#: steps of 128 channels it is one of `expand_shift_wide`; of 256 pixels the registers hold no more than 128 sums each
RINGS = {(128, 64, 8): (5, 6), (256, 64, 8): (3, 3), (256, 64, 16): (3, 3), (128, 128, 8): (3, 3)}


def is_wide(tile: StageTile) -> bool:
    """Whether a tile is one of `expand_shift_wide`, whose steps take all 128 channels."""
    return tile.ring and tile.block_k == 2 * WIDTH


def is_timed(tile: StageTile) -> bool:
    """Whether a GPU has timed such tiles: neither those of `expand_shift_wide` yet, nor any of 16 warps."""
    return not tile.ring or (tile.block_k == WIDTH and tile.num_warps == 8)


def shared_of(tile: StageTile, outputs: int, reduced: int) -> int:
    """Bytes of shared memory of a program of `expand_shift_ring` or `expand_shift_wide`.

    Args:
        tile: its `tap_stages` boxes of pixels and `chunk_stages` blocks of filters are in the rings.
        outputs: channels of the expand.
        reduced: of the next reduce, 0 without one.
    """
    pixels, filters = 2 * tile.block_m * tile.block_k, 4 * WIDTH * tile.block_k
    rings = tile.tap_stages * (pixels + 8) + tile.chunk_stages * (filters + 8)
    vectors = 8 * (2 * WIDTH + outputs + reduced)
    h2 = 0 if is_wide(tile) else 4 * tile.block_m * WIDTH
    return rings + h2 + vectors + 64  # barriers begin at multiples of 16 bytes


def tiles_for(width: int, outputs: int, reduced: int, second: int) -> list[StageTile]:
    """The tiles of both kernels for these channels, with as deep rings as fit; see `channels_refusal`."""
    sizes = ((m, step, step, warps, *stages) for (m, step, warps), stages in RINGS.items())
    found = [StageTile(*size, tma=True, ring=True) for size in sizes]
    return [tile for tile in found if channels_refusal(width, outputs, reduced, second, tile) is None]


def channels_refusal(width: int, outputs: int, reduced: int, second: int, tile: StageTile) -> str | None:
    """Why the kernel of the tile does not take these channels; None when it does.

    `second` are the channels of a downsample branch's input: its kernel was slower on an H100 than layer by layer, 214
    against 192 us at batch 128. See `shared_of` for the others. The filters of a chunk are needed together, so that
    their ring has to hold them.
    """
    if width != 2 * WIDTH or outputs % WIDTH or outputs & (outputs - 1):
        return f"channels that are not {2 * WIDTH}, or not expanded to a power of two"
    if second:
        return "a downsample branch"
    if reduced not in (0, 2 * WIDTH, 4 * WIDTH):
        return f"a next reduce whose channels do not make blocks of {2 * WIDTH}"
    known = (tile.block_m, tile.block_k, tile.num_warps) in RINGS and tile.block_n == tile.block_k
    if not known or outputs % tile.block_n:
        return f"a tile {tile}"
    if reduced > 2 * WIDTH and (is_wide(tile) or tile.block_m > 128):
        return f"a tile {tile} with more sums than the registers hold"
    if reduced and tile.num_warps > 8 and triton_release() >= (3, 9):
        return f"a tile {tile} that spills in this release of Triton"
    if tile.tap_stages < 2 or tile.chunk_stages < max(2, 1 + reduced // (2 * WIDTH)):
        return f"a tile {tile} with too short rings"
    if shared_of(tile, outputs, reduced) > SHARED - 1024:
        return f"a tile {tile} that does not fit shared memory"
    return None


def conv_refusal(conv) -> str | None:
    """Why a convolution is not the 3x3 that kernels with rings compute; None when it is."""
    k, c, r, s = conv.weight.shape
    if k != c or (r, s, *conv[3:]) != (3, 3, (1, 1), (1, 1), (1, 1), 1):
        return "no 3x3 to as many channels with a padding, dilation and stride of 1"
    return None


def refusal(h, conv, expand, shortcut, reduce, tile: StageTile) -> str | None:
    """Why the kernel of the tile cannot run a tail that `expand_shift_tma` can; None when it can."""
    if h.dtype not in (torch.float16, torch.bfloat16):
        return f"{h.dtype}: only 16 bits"
    if not gpu_of(h.device).gluon:
        return "another chip than Hopper, or a Triton whose Gluon is not known"
    if (reason := conv_refusal(conv)) is not None:
        return reason
    second = 0 if shortcut is None else shortcut.weight.shape[1]
    reduced = 0 if reduce is None else reduce.weight.shape[0]
    return channels_refusal(conv.weight.shape[0], expand.weight.shape[0], reduced, second, tile)


def by_boxes(tile: StageTile) -> StageTile:
    """The tile of `expand_shift_tma` that stands in."""
    return replace(tile, block_m=64, block_n=32, num_warps=4, tap_stages=3, chunk_stages=2, ring=False)
