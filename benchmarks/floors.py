"""Floors of blocks and networks on a chip, and what our kernels should take, in seconds: what `roofline` tabulates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fused_resblock.backends.triton import joined_groups
from fused_resblock.kernels import bottleneck
from fused_resblock.kernels.choice import choose_tile, predicted_seconds
from fused_resblock.kernels.cost import (
    LAUNCH,
    Ceilings,
    Cost,
    Gemm,
    conv_bn_act_cost,
    elementwise_cost,
    expand_shift_cost,
    predicted,
    stem_cost,
)
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.halo import boxes_of
from fused_resblock.kernels.stage import TailGemms, choose_stage_tile
from fused_resblock.kernels.stage import predicted_seconds as stage_seconds
from fused_resblock.kernels.tiles import StemTile, Tile

from .shapes import ConvShape, basic_shapes, bottleneck_shapes, wide_shapes

DEPTHS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
    "resnext50_32x4d": ("grouped", (3, 4, 6, 3)),
    "wide_resnet50_2": ("wide", (3, 4, 6, 3)),
}
SHAPES = {
    "basic": basic_shapes,
    "bottleneck": bottleneck_shapes,
    "grouped": partial(bottleneck_shapes, 32, 4),
    "wide": wide_shapes,
}
ANY = Tile(64, 64, 32, 4, 1)  # floors are the same with every tile
STAGES = (1, 2, 3, 4)
STEM_PROGRAMS = 2  # that a multiprocessor holds at once: `make codegen`


@dataclass(frozen=True)
class Floors:
    """Seconds: floors, and what our kernels should take.

    Floors of eager, of fusion conv by conv, of blocks whose tails and next heads are one kernel (`stage`; other blocks
    hold the next one's head, also across stages), and of whole blocks as one kernel. Predictions for conv by conv
    (`ours`), with the stage kernel where it wins (`ours_stage`), and with `bottleneck_rows` wherever that runs
    (`ours_whole`). Where there is no such kernel, what is next best stands in its place.
    """

    eager: float
    per_conv: float
    stage: float
    whole: float
    ours: float
    ours_stage: float
    ours_whole: float

    def __add__(self, other: Floors) -> Floors:
        return Floors(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def gemm_of(shape: ConvShape, batch: int) -> Gemm:
    """The convolution as a GEMM; a strided 1x1 reads only the pixels that it keeps."""
    m = batch * shape.out_size**2
    pixels = m if shape.kernel == 1 else batch * shape.size**2
    boxes, *_ = boxes_of(batch, shape.out_size, shape.out_size)
    return Gemm(m, shape.out_channels, shape.channels, shape.kernel**2, pixels, shape.groups, boxes)


def second_of(shape: ConvShape, batch: int) -> Gemm | None:
    """The downsample branch as a GEMM, or None."""
    m = batch * shape.out_size**2
    return Gemm(m, shape.out_channels, shape.shortcut, 1, m) if shape.shortcut else None


def predicted_of(shape: ConvShape, batch: int, itemsize: int, chip: Ceilings) -> float:
    """What a convolution should take in our kernels, which join small groups, with the tile that is chosen for it."""
    gemm, second = gemm_of(shape, batch), second_of(shape, batch)
    gemm = replace(gemm, groups=gemm.groups // joined_groups(gemm.n, gemm.k, gemm.groups))
    tile = choose_tile(gemm, itemsize, residual=shape.residual, second=second, tma=True, gpu=Gpu(chip.multiprocessors))
    return predicted_seconds(gemm, itemsize, tile, chip, residual=shape.residual, second=second)


def floors_of(
    shapes: Sequence[ConvShape],
    batch: int,
    itemsize: int,
    chip: Ceilings,
    following: ConvShape | None = None,
    headless: bool = False,
) -> Floors:
    """The floors of one block, given its convolutions in order.

    Args:
        shapes: of its convolutions.
        batch: images.
        itemsize: bytes of an element.
        chip: its ceilings.
        following: the next block's reduce; None for the last block, and where no kernel takes both.
        headless: whether the block before has computed this one's reduce.
    """
    eager = per_conv = ours = 0.0
    of_convs: list[tuple[float, float]] = []  # the floor and the prediction of each
    first, last = shapes[0], shapes[-1]
    flops = 0
    for shape in shapes:
        gemm, second = gemm_of(shape, batch), second_of(shape, batch)
        fused = conv_bn_act_cost(gemm, itemsize, ANY, residual=shape.residual, second=second)
        mine = predicted_of(shape, batch, itemsize, chip)
        ours += mine
        flops += fused.flops
        elements = gemm.m * gemm.n
        plain = conv_bn_act_cost(gemm, itemsize, ANY)
        norm = elementwise_cost(elements, itemsize, 1)
        before = per_conv
        if second is None:
            per_conv += fused.floor(chip)
        else:  # conv by conv, the branch is written by one kernel and read by the other as its residual
            branch = conv_bn_act_cost(second, itemsize, ANY)
            per_conv += branch.floor(chip) + conv_bn_act_cost(gemm, itemsize, ANY, residual=True).floor(chip)
            eager += branch.floor(chip) + norm.floor(chip)
        of_convs.append((per_conv - before, mine))
        eager += plain.floor(chip) + norm.floor(chip) * 2  # batch norm, ReLU
        if shape is last:
            eager += elementwise_cost(elements, itemsize, 2).floor(chip)  # add
    x = batch * first.channels * first.size**2 * itemsize
    y = batch * last.out_channels * last.out_size**2 * itemsize
    weights = sum(s.weights() for s in shapes) * itemsize
    whole = Cost(x + y + weights, 0, flops).floor(chip)
    tail = tail_of(shapes, batch, itemsize, chip, following)
    if tail is None:
        return Floors(eager, per_conv, per_conv, whole, ours, ours, ours)
    head = (0.0, 0.0) if headless else of_convs[0]
    next_head = 0.0 if following is None else predicted_of(following, batch, itemsize, chip)
    alone = tail_of(shapes, batch, itemsize, chip, None) or tail
    best = min(tail[1], alone[1] + next_head, of_convs[1][1] + of_convs[2][1] + next_head)
    ours_stage = head[1] + best
    ours_whole = whole_of(shapes, batch, itemsize, chip) or ours_stage
    return Floors(eager, per_conv, head[0] + tail[0], whole, ours, ours_stage, ours_whole)


def whole_of(shapes: Sequence[ConvShape], batch: int, itemsize: int, chip: Ceilings) -> float | None:
    """What a bottleneck should take as one kernel, with the tile that is predicted to be fastest; None without one."""
    if len(shapes) != 3 or itemsize != 2:
        return None
    reduce, conv, expand = shapes
    if conv.groups > 1 or conv.stride > 1 or (expand.shortcut or expand.out_channels) != reduce.channels:
        return None
    if expand.shortcut not in (0, bottleneck.WIDTH):
        return None
    second = expand.shortcut > 0
    size = batch, reduce.channels, conv.size, conv.size
    tiles = bottleneck.tiles_for(conv.channels, expand.out_channels, second)
    times = [
        bottleneck.predicted_seconds(size, tile, conv.channels, expand.out_channels, second, chip)
        for tile in tiles
        if conv.size + 2 <= tile.block_m
    ]
    return min(times, default=None)


def tail_of(
    shapes: Sequence[ConvShape], batch: int, itemsize: int, chip: Ceilings, following: ConvShape | None
) -> tuple[float, float] | None:
    """Floor and prediction of a bottleneck's 3x3 and expand, with the next block's reduce, as one kernel.

    None where there is no such kernel: for BasicBlocks, and where a tile would not fit the registers. No prediction
    (infinity) for kernels that keep neither pixels nor loads in shared memory from tile to tile: on an H100 they took
    about twice what their bytes and products ask for, and longer than conv by conv.
    """
    if len(shapes) != 3 or shapes[1].groups > 1:
        return None
    conv, expand = (gemm_of(shape, batch) for shape in shapes[1:])
    second = second_of(shapes[2], batch)
    reduce = None if following is None else gemm_of(following, batch)
    gemms = TailGemms(conv, expand, second, reduce)
    tile = choose_stage_tile(gemms, itemsize, Gpu(chip.multiprocessors))
    if tile is None:
        return None
    cost = expand_shift_cost(conv, expand, itemsize, tile, second=second, reduce=reduce)
    lasting = tile.halo or tile.ring
    return cost.floor(chip), stage_seconds(gemms, itemsize, tile, chip) if lasting else float("inf")


def stem_floors(batch: int, itemsize: int, chip: Ceilings) -> Floors:
    """The floors of the 7x7 convolution and the max-pool: with one kernel for both nothing lies between them."""
    conv = Gemm(batch * 112**2, 64, 3, 49, batch * 224**2)
    pixels, elements, tile = batch * 56**2, conv.m * conv.n, StemTile()
    plain = conv_bn_act_cost(conv, itemsize, ANY)
    pool = Cost((elements + pixels * conv.n) * itemsize, 0, 0).floor(chip)
    eager = plain.floor(chip) + 2 * elementwise_cost(elements, itemsize, 1).floor(chip) + pool
    whole = Cost(conv.dram(itemsize) + pixels * conv.n * itemsize, 0, conv.flops).floor(chip)
    cost = stem_cost(conv, pixels, itemsize, tile)
    programs = batch * -(-56 // tile.pooled_rows) * -(-56 // (tile.pooled_columns - 1))
    ours = predicted(cost, programs, STEM_PROGRAMS, chip) + LAUNCH  # the copy is a launch of its own
    return Floors(eager, plain.floor(chip) + pool, whole, whole, ours, ours, ours)


def blocks_of(kind: str) -> dict[str, list[ConvShape]]:
    """The convolutions of each distinct block: "l1.first", "l1", "l2.first", ..."""
    blocks: dict[str, list[ConvShape]] = {}
    for shape in SHAPES[kind]():
        blocks.setdefault(shape.name.split(".", 1)[1].rpartition(".")[0], []).append(shape)
    return blocks


def network_floors(
    name: str, batch: int, itemsize: int, chip: Ceilings, stages: Sequence[int] = STAGES
) -> tuple[Floors, list[tuple[str, int, Floors]]]:
    """A network's body, or some stages of it without those around: the sum, and (block, how many, floors of one)."""
    kind, depths = DEPTHS[name]
    blocks = blocks_of(kind)
    order = [
        f"l{stage}.first" if place == 0 and f"l{stage}.first" in blocks else f"l{stage}"
        for stage in stages
        for place in range(depths[stage - 1])
    ]
    counted: Counter[tuple[Any, ...]] = Counter()  # in order, each distinct block once
    headless = headless2 = False  # whether a tail has computed the head; and where blocks are one kernel that can be
    for block, behind in zip(order, [*order[1:], None], strict=True):
        following = None if behind is None else blocks[behind][0]
        if following is not None and tail_of(blocks[block], batch, itemsize, chip, following) is None:
            following = None
        alone, behind_alone = (b is not None and whole_of(blocks[b], batch, itemsize, chip) for b in (block, behind))
        following2 = None if alone or behind_alone else following
        ends = behind is None or behind.endswith("first")
        named = block + ".last" * (ends and not block.endswith("first"))
        counted[block, named, following, headless, following2, headless2] += 1
        headless, headless2 = following is not None, following2 is not None
    total, rows = Floors(*[0.0] * 7), []
    for (block, named, following, headless, following2, headless2), count in counted.items():
        floors = floors_of(blocks[block], batch, itemsize, chip, following, headless)
        other = floors_of(blocks[block], batch, itemsize, chip, following2, headless2)
        floors = replace(floors, ours_whole=other.ours_whole)
        rows.append((named, count, floors))
        for _ in range(count):
            total += floors
    return total, rows
