"""A fused convolution with the kernel and the tile that suit it: measured ones where there are, else predicted ones."""

from __future__ import annotations

from typing import Any

import torch

from . import ring
from .choice import choose_tile, ranked
from .conv_bn_act import bind_conv_bn_act
from .conv_tma import bind_conv_tma
from .conv_tma import refusal as tma_refusal
from .cost import Gemm
from .gpu import Gpu, gpu_of, right_on, tf32_allowed
from .halo import boxes_of, by_boxes, conv_refusal
from .tables import Entry
from .tiles import Tile


def gemms_of(x, conv, epilogue) -> tuple[Gemm, Gemm | None]:
    """The convolution as a GEMM, and that of its shortcut or None; see `cost.Gemm`."""
    n, c, h, w = x.shape
    k, _, r, s = conv.weight.shape
    p, q = conv.output_size(h, w)
    m = n * p * q
    gemm = Gemm(m, k, c, r * s, m if r * s == 1 else n * h * w, conv.groups, boxes_of(n, p, q)[0])
    branch = epilogue.shortcut
    return gemm, None if branch is None else Gemm(m, k, branch.weight.shape[1], 1, m)


def _options(x, conv, other, epilogue, gpu: Gpu) -> dict[str, Any]:
    """What `choice.ranked` asks of a convolution."""
    gemm, second = gemms_of(x, conv, epilogue)
    probe = Tile(64, min(64, gemm.n // gemm.groups), 64, 4, 2, persistent=1)
    tma = gpu.tma and tma_refusal(x, conv, other, epilogue, probe) is None
    residual = other is not None and second is None
    options = {
        "gemm": gemm,
        "itemsize": x.element_size(),
        "residual": residual,
        "second": second,
        "tma": tma,
        "gpu": gpu,
    }
    return {**options, "ieee": x.dtype == torch.float32 and not tf32_allowed()}


def _refused(x, conv, other, epilogue, tile: Tile) -> bool:
    """Whether the kernel that a tile is for cannot run the convolution."""
    boxes = tile.persistent > 0 and not tile.halo and not tile.ring
    if boxes and not right_on(x.device, lambda gpu: gpu.conv_tma_right(tile.block_n)):
        return True
    if tile.halo:
        if conv_refusal(x, conv, other, epilogue, tile) is not None:
            return True
        tile = by_boxes(conv, tile)
    if tile.ring:
        if ring.refusal(x, conv, other, epilogue, tile) is not None:
            return True
        tile = ring.by_boxes(tile)
    return tile.persistent > 0 and tma_refusal(x, conv, other, epilogue, tile) is not None


def likely_tiles(x, conv, other, epilogue, gpu: Gpu) -> list[Tile]:
    """The tiles that the kernels take, the one with the least predicted time first."""
    tiles = ranked(**_options(x, conv, other, epilogue, gpu))
    return [tile for tile in tiles if not _refused(x, conv, other, epilogue, tile)]


def choose(x, conv, other, epilogue, gpu: Gpu) -> Tile:
    """The tile with the least predicted time."""
    tile = choose_tile(**_options(x, conv, other, epilogue, gpu))
    if _refused(x, conv, other, epilogue, tile):  # a piece over a group's edge, another padding
        tile = likely_tiles(x, conv, other, epilogue, gpu)[0]
    return tile


def bind_convolution(x, conv, other, epilogue, tile: Tile | None = None, *, overwrite: bool = False):
    """Prepare a convolution on the kernel that the tile is for; arguments and result are those of `bind_conv_bn_act`.

    Args:
        tile: None for the one that `choose` picks.
        overwrite: the result may be written over a residual; only the kernels with TMA, which read each piece of it
            once and before they write that piece, do so.
    """
    tile = tile or choose(x, conv, other, epilogue, gpu_of(x.device))
    if tile.split_k > 1 and epilogue.shortcut is not None:
        return _bind_apart(x, conv, other, epilogue, tile)
    if tile.halo:
        from .conv_halo import bind_conv_halo

        return bind_conv_halo(x, conv, other, epilogue, tile, overwrite=overwrite)
    if tile.ring:
        if epilogue.shortcut is None:
            from .conv_ring import bind_conv_ring

            return bind_conv_ring(x, conv, other, epilogue, tile, overwrite=overwrite)
        from .conv_pair import bind_conv_pair

        return bind_conv_pair(x, conv, other, epilogue, tile)
    if tile.persistent:
        return bind_conv_tma(x, conv, other, epilogue, tile, overwrite=overwrite)
    return bind_conv_bn_act(x, conv, other, epilogue, tile)


def _bind_apart(x, conv, other, epilogue, tile: Tile):
    """A split loop has one set of sums: the downsample branch is a convolution of its own, its result a residual."""
    branch = bind_convolution(other, epilogue.shortcut, None, epilogue._replace(shortcut=None, relu=False))
    residual = torch.empty(conv.output_shape(x), dtype=x.dtype, device="meta")
    main = bind_conv_bn_act(x, conv, residual, epilogue._replace(shortcut=None, residual_stride=1), tile)
    return lambda x, other: main(x, branch(other, None))


def usable(entry: Entry | None, x, conv, other, epilogue) -> Tile | None:
    """The tile of a table's entry, None where it has none or the kernel refuses this convolution."""
    if entry is None or entry.tile is None:
        return None
    return None if _refused(x, conv, other, epilogue, entry.tile) else entry.tile
