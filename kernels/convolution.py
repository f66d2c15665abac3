"""A fused convolution with the kernel and the tile that suit it: measured ones where there are, else predicted ones."""

from __future__ import annotations

from typing import Any

import torch

from .choice import choose_tile, ranked
from .conv_bn_act import bind_conv_bn_act
from .conv_tma import bind_conv_tma
from .conv_tma import refusal as tma_refusal
from .cost import Gemm
from .gpu import Gpu, gpu_of, tf32_allowed
from .tables import Entry
from .tiles import Tile


def gemms_of(x, conv, epilogue) -> tuple[Gemm, Gemm | None]:
    """The convolution as a GEMM, and that of its shortcut or None; see `cost.Gemm`."""
    n, c, h, w = x.shape
    k, _, r, s = conv.weight.shape
    p, q = conv.output_size(h, w)
    m = n * p * q
    gemm = Gemm(m, k, c, r * s, m if r * s == 1 else n * h * w, conv.groups)
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


def likely_tiles(x, conv, other, epilogue, gpu: Gpu) -> list[Tile]:
    """The tiles that the kernels take, the one with the least predicted time first."""
    tiles = ranked(**_options(x, conv, other, epilogue, gpu))
    return [t for t in tiles if not t.persistent or tma_refusal(x, conv, other, epilogue, t) is None]


def choose(x, conv, other, epilogue, gpu: Gpu) -> Tile:
    """The tile with the least predicted time."""
    options = _options(x, conv, other, epilogue, gpu)
    tile = choose_tile(**options)
    if tile.persistent and tma_refusal(x, conv, other, epilogue, tile) is not None:  # a piece over a group's edge
        tile = choose_tile(**{**options, "tma": False})
    return tile


def bind_convolution(x, conv, other, epilogue, tile: Tile | None = None, *, overwrite: bool = False):
    """Prepare a convolution on the kernel that the tile is for; arguments and result are those of `bind_conv_bn_act`.

    Args:
        tile: None for the one that `choose` picks.
        overwrite: the result may be written over a residual; only `conv_tma`, which reads each piece of it once and
            before it writes that piece, does so.
    """
    tile = tile or choose(x, conv, other, epilogue, gpu_of(x.device))
    if tile.persistent:
        return bind_conv_tma(x, conv, other, epilogue, tile, overwrite=overwrite)
    return bind_conv_bn_act(x, conv, other, epilogue, tile)


def usable(entry: Entry | None, x, conv, other, epilogue) -> Tile | None:
    """The tile of a table's entry, None where it has none or the kernel refuses this convolution."""
    if entry is None or entry.tile is None:
        return None
    fits = not entry.tile.persistent or tma_refusal(x, conv, other, epilogue, entry.tile) is None
    return entry.tile if fits else None
