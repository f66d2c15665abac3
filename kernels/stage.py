"""A bottleneck's tail and the next one's head with the kernel and the tile that suit them."""

from __future__ import annotations

from .choice import chip_of
from .expand_shift import bind_expand_shift, refusal
from .expand_shift_tma import bind_expand_shift_tma
from .gpu import Gpu
from .tiles import StageTile

__all__ = ["bind_stage", "choose_stage_tile", "refusal"]

#: the largest tiles that compile without a spill (`make codegen`), by (TMA, width of the 3x3, downsample branch):
#: block_m, block_n, warps
TILES = {
    (True, 64, False): (128, 64, 8),
    (True, 64, True): (64, 64, 4),
    (True, 128, False): (128, 32, 8),
    (True, 128, True): (64, 32, 4),
    (True, 256, False): (128, 32, 8),
    (True, 256, True): (64, 32, 8),
    (False, 64, False): (128, 32, 8),
    (False, 64, True): (64, 32, 4),
    (False, 128, False): (64, 32, 4),
    (False, 128, True): (64, 32, 8),
    (False, 256, False): (64, 64, 8),
    (False, 256, True): (64, 32, 8),
}
SMALL_SHARED = 100 << 10  # shared memory of GeForce and workstation chips, where the widest tiles are too large


def choose_stage_tile(width: int, outputs: int, itemsize: int, second: bool, gpu: Gpu) -> StageTile | None:
    """The tile for a width of the 3x3, or None where no kernel is right for it.

    Args:
        width: channels of the 3x3.
        outputs: channels of the next reduce, 0 without one.
        itemsize: bytes of an element.
        second: whether there is a downsample branch.
        gpu: where it runs.
    """
    known = max(64, 1 << (max(width, outputs) - 1).bit_length())
    widest = {2: 256, 4: 128}.get(itemsize, 0)  # more TF32 operands than that do not fit the registers
    if known > widest:
        return None
    block_m, block_n, warps = TILES[gpu.tma, known, second]
    stages, chunk_stages = (3 if itemsize == 2 else 2), 2
    if gpu.capability // 10 == 10:  # all accumulators pass through registers
        if known == 256:
            block_m, block_n, warps = 64, 64, 8
        elif second and itemsize == 4:
            block_m, block_n, warps = 64, 32, 4
    elif chip_of(gpu).shared <= SMALL_SHARED and (known == 256 or itemsize == 4):
        block_m, block_n, warps = 64, 32, 4 if known == 64 else 8
        stages, chunk_stages = 2, 1 if itemsize == 4 and known == 128 else 2
    return StageTile(block_m, block_n, min(width, 128 // itemsize), warps, stages, chunk_stages, gpu.tma)


def bind_stage(h, conv, expand, other, shortcut, reduce, tile: StageTile):
    """Prepare the kernel that the tile is for; arguments and result are those of `bind_expand_shift`."""
    odd = conv.stride[0] == 2 and (h.shape[2] % 2 or h.shape[3] % 2)
    odd = odd or (shortcut is not None and shortcut.stride[0] == 2 and (other.shape[2] % 2 or other.shape[3] % 2))
    bind = bind_expand_shift_tma if tile.tma and not odd else bind_expand_shift
    return bind(h, conv, expand, other, shortcut, reduce, tile)
