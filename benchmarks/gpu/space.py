"""The tiles that are checked and tuned for a convolution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch

from fused_resblock.kernels import ring
from fused_resblock.kernels.choice import HALO, chip_of, power_of_two
from fused_resblock.kernels.conv_tma import refusal
from fused_resblock.kernels.convolution import choose, gemms_of
from fused_resblock.kernels.cost import resident_programs
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.halo import conv_refusal
from fused_resblock.kernels.tables import case_name
from fused_resblock.kernels.tiles import Tile

from ..shapes import ConvShape, all_shapes
from .operations import DTYPES, build, precision

#: (block_m, block_n, warps)
POINTERS = ((128, 64, 4), (128, 64, 8), (64, 64, 4), (64, 128, 4), (128, 128, 8), (256, 64, 8), (128, 128, 4))
#: (block_m, block_n, warps, stages, programs a multiprocessor)
RINGS = (
    *((128, 256, 8, 4, 1), (128, 256, 8, 3, 1), (256, 128, 8, 4, 1), (128, 128, 8, 6, 1), (128, 128, 8, 5, 1)),
    *((128, 128, 8, 3, 2), (128, 128, 8, 2, 2), (64, 128, 4, 4, 2), (64, 64, 4, 4, 3)),
)
#: likewise, where a residual takes its room
RESIDUAL_RINGS = (
    *((128, 256, 8, 3, 1), (128, 256, 8, 2, 1), (256, 128, 8, 3, 1), (128, 128, 8, 5, 1), (128, 128, 8, 4, 1)),
    *((128, 128, 8, 6, 1), (128, 128, 8, 2, 2), (128, 64, 8, 3, 2), (64, 128, 4, 3, 2), (64, 128, 4, 2, 3)),
)
BOXES = (*POINTERS, (128, 256, 8), (256, 128, 8), (64, 256, 8))
SPLIT = ((64, 64, 4), (64, 32, 4), (128, 64, 8))


@lru_cache(maxsize=512)
def key_of(shape: ConvShape) -> str:
    """A shape as the tables name it, and its image size: alike for convolutions that no kernel can tell apart."""
    operation = build(shape, 1, torch.float16, "meta")
    return f"{case_name(operation.conv, operation.other, operation.epilogue)}.{shape.size}px"


def case_of(shape: ConvShape) -> str:
    """A shape as the tables name it."""
    return key_of(shape).rpartition(".")[0]


def distinct_shapes() -> list[ConvShape]:
    """The shape table without repetitions."""
    return list({key_of(shape): shape for shape in reversed(all_shapes())}.values())[::-1]


@lru_cache(maxsize=4096)
def chosen(shape: ConvShape, batch: int, dtype: str, gpu: Gpu) -> Tile:
    """The tile that ships for a shape."""
    with precision(dtype) as kind:
        return choose(*build(shape, batch, kind, "meta").prepared(), gpu)


def tiles(shape: ConvShape, dtype: str, gpu: Gpu, batch: int = 16) -> Iterator[Tile]:
    """Every tile worth trying: taps from shared memory, TMA, where the chip has them, plain pointers, split loops.

    Left out: what does not fit the registers or the shared memory, blocks wider than the convolution, stages where the
    loop has a single step, and, where there are programs enough without, split loops and the small tiles for them.
    """
    item = DTYPES[dtype][0].itemsize
    with precision(dtype) as kind:
        arguments = build(shape, batch, kind, "meta").prepared()
    gemm, second = gemms_of(arguments[0], arguments[1], arguments[3])
    residual = shape.residual
    shared = chip_of(gpu).shared
    width = power_of_two(gemm.n // gemm.groups, 256)
    block_k = power_of_two(gemm.k // gemm.groups, 128 // item)

    def fits(tile: Tile) -> int:
        return resident_programs(tile, item, shared, residual=residual, second=second is not None)

    if gpu.gluon and conv_refusal(*arguments, HALO) is None:
        yield HALO
    rings = RESIDUAL_RINGS if residual else RINGS if second is not None else ()
    for block_m, block_n, warps, stages, programs in rings:
        tile = Tile(block_m, block_n, 64, warps, stages, persistent=programs, ring=True)
        if gpu.tma and refusal(*arguments, ring.by_boxes(tile)) is None and ring.refusal(*arguments, tile) is None:
            yield tile
    if gpu.tma:
        for block_m, block_n, warps in BOXES:
            for stages in (3, 4, 2):
                tile = Tile(block_m, min(block_n, width), block_k, warps, stages, persistent=1)
                resident = fits(tile)
                wide = block_n > max(64, width)
                if resident and not wide and refusal(*arguments, tile) is None:
                    yield replace(tile, persistent=min(4, resident))
    steps = gemm.steps(Tile(64, 64, block_k, 4, 1))
    for block_m, block_n, warps in POINTERS:
        for stages in (3, 1) if steps > 1 or second is not None else (1,):
            tile = Tile(block_m, min(block_n, width), block_k, warps, stages)
            if fits(tile) and block_n <= max(64, width):
                yield tile
    for block_m, block_n, warps in SPLIT:
        for split in (1, 2, 4, 8, 16):
            tile = Tile(block_m, min(block_n, width), block_k, warps, 4, split)  # whole, too: no sums to add up
            if steps >= 4 * split and gemm.pieces(tile) < 2 * gpu.multiprocessors and fits(tile):
                yield tile
