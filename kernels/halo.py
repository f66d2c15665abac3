"""3x3 convolutions whose nine taps are read from shared memory: what the Gluon kernels for Hopper share.

A tile is a box of 8x8 pixels. TMA loads it three times, shifted by a column each and with the rows above and below,
so `3*10/8` boxes come from L2 instead of 9; zeros lie outside of the image. A tap is then a range of rows of a box in
shared memory, and the matrix units read it where it lies: the eight pixels of a row, of 64 channels each, are one atom
of the 128-byte swizzle. The filters are loaded once a program and stay. `conv_halo` and `expand_shift_halo` do so; here
is what they take.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .gpu import gpu_of
from .tiles import StageTile, Tile

#: channels of the 3x3, in and out: one atom of the swizzle
WIDTH = 64
#: pixels of a tile: the rows of a warpgroup's product
PIXELS = 64
#: rows and columns of a tile's box
SIDE = 8
#: bytes of shared memory that a program may have on Hopper, less those of barriers
SHARED = (227 << 10) - 256


def boxes_of(images: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Boxes that cover `[images, rows, columns]`: all of them, along the rows and along the columns of an image."""
    down, across = -(-rows // SIDE), -(-columns // SIDE)
    return images * down * across, down, across


def halo_buffers(width: int, outputs: int, reduced: int, second: bool) -> int:
    """How many chunks of 64 channels the shared memory of a multiprocessor holds beside all filters; 0 if too few.

    Args:
        width: channels of the 3x3.
        outputs: of the expand.
        reduced: of the next reduce, 0 without one.
        second: whether there is a downsample branch, of as many channels as the 3x3.
    """
    chunks = outputs // width
    if width != WIDTH or outputs % width or reduced not in (0, width, 2 * width):
        return 0
    pixels = 3 * (SIDE + 2) * SIDE + (PIXELS if second else 0)
    kept = 2 * width * (9 * width + outputs * (1 + second) + pixels) + 2 * reduced * outputs
    free = (SHARED - kept) // (2 * width * PIXELS)
    return max((n for n in range(2, free + 1) if chunks % n == 0), default=0)


def blocks_of(outputs: int, channels: int, groups: int) -> int:
    """Into how many convolutions of `WIDTH` channels to as many a grouped one falls; 0 if it does not.

    Groups of fewer channels share one.
    """
    if outputs != channels or channels % WIDTH or channels // WIDTH > groups or WIDTH % (channels // groups):
        return 0
    return channels // WIDTH


def join_groups(weight: torch.Tensor, groups: int, joined: int) -> torch.Tensor:
    """The filter `[K, joined * C, R, S]` of `groups / joined` groups: 0 for the channels of the others in a group."""
    k, c, r, s = weight.shape
    own = weight.reshape(groups // joined, joined, k // groups, c, r, s)
    wide = weight.new_zeros(groups // joined, joined, k // groups, joined, c, r, s)
    for group in range(joined):
        wide[:, group, :, group] = own[:, group]
    return wide.reshape(k, joined * c, r, s).contiguous(memory_format=torch.channels_last)


def _refused(x, conv) -> str | None:
    """What both kernels ask of a 3x3."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"{x.dtype}: only 16-bit filters fit"
    if not gpu_of(x.device).gluon:
        return "another chip than Hopper, or a Triton whose Gluon is not known"
    if tuple(conv.weight.shape[2:]) != (3, 3) or (conv.stride, conv.padding, conv.dilation) != ((1, 1), (1, 1), (1, 1)):
        return "no 3x3 with a stride, padding and dilation of 1"
    return None


def conv_refusal(x, conv, other, epilogue, tile: Tile) -> str | None:
    """Why `conv_halo` cannot run a convolution; None when it can."""
    if other is not None and (epilogue.shortcut is not None or epilogue.residual_stride != 1):
        return "a downsample branch or a strided residual"
    if (tile.block_m, tile.block_n, tile.num_warps) != (PIXELS, WIDTH, 4) or not tile.persistent:
        return f"a tile {tile}"
    if not blocks_of(conv.weight.shape[0], conv.weight.shape[1] * conv.groups, conv.groups):
        return f"channels that are not {WIDTH}, nor groups that make such blocks"
    return _refused(x, conv)


def by_boxes(conv, tile: Tile) -> Tile:
    """The tile of `conv_tma` that stands in for `conv_halo`'s: no wider than a group."""
    return replace(tile, block_n=min(tile.block_n, conv.weight.shape[0] // conv.groups), halo=False)


def tail_refusal(h, conv, expand, shortcut, reduce, tile: StageTile) -> str | None:
    """Why `expand_shift_halo` cannot run a tail that `expand_shift.refusal` lets pass; None when it can."""
    if shortcut is not None and (shortcut.stride != (1, 1) or shortcut.weight.shape[1] != WIDTH):
        return "a downsample branch of another stride or width"
    reduced = 0 if reduce is None else reduce.weight.shape[0]
    buffers = halo_buffers(conv.weight.shape[0], expand.weight.shape[0], reduced, shortcut is not None)
    if not buffers:
        return f"filters that do not fit shared memory, or are not cut into pieces of {WIDTH}"
    if (tile.block_m, tile.block_n, tile.num_warps) != (PIXELS, WIDTH, 4) or tile.chunk_stages not in (2, buffers):
        return f"a tile {tile}"
    return _refused(h, conv)
