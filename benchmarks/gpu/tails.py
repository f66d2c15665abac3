"""The kernels of tails and of whole blocks: checked with every tile, and timed against conv by conv."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_resblock import backends
from fused_resblock.backends import triton, whole
from fused_resblock.backends.asked import Asked
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.stage import bind_stage
from fused_resblock.kernels.tail_ring import channels_refusal, is_wide
from fused_resblock.kernels.tiles import StageTile
from fused_resblock.tuning import MARGIN

from . import block_shapes, tail_shapes
from .block_shapes import BlockShape
from .context import Context
from .device import error_line, is_out_of_memory
from .judging import judge
from .operations import DTYPES, own, precision
from .records import Records
from .tail_shapes import TailShape
from .timing import timed_row

Shape = TailShape | BlockShape


def shapes(quick: bool) -> list[Shape]:
    """What is measured: tails, and blocks."""
    return [*tail_shapes.shapes(quick), *block_shapes.shapes(quick)]


def odd_shapes(quick: bool) -> list[Shape]:
    """What fills no tile."""
    return [*tail_shapes.odd_shapes(quick), *block_shapes.odd_shapes(quick)]


def tiles(shape: Shape, dtype: str, gpu: Gpu) -> list[StageTile]:
    """The tiles that ship and their neighbours; those that ship come first."""
    item = DTYPES[dtype][0].itemsize
    found = shape.shipped(item, gpu)
    if not found or isinstance(shape, BlockShape):
        return found
    rings = [tile for tile in found if tile.ring]
    depths = {False: ((6, 5), (4, 7)), True: ((4, 2), (2, 4))}  # of both rings, in as much memory
    for ring in rings:
        for tap_stages, chunk_stages in depths[is_wide(ring)]:
            tile = replace(ring, tap_stages=tap_stages, chunk_stages=chunk_stages)
            if channels_refusal(shape.width, 4 * shape.width, shape.outputs, shape.second, tile) is None:
                found.append(tile)
    block_k = found[0].block_k
    for block_m, block_n, warps in ((64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8), (64, 64, 8)):
        for tap_stages, chunk_stages in ((3, 2), (4, 2), (2, 1)) if item == 2 else ((2, 2), (2, 1)):
            for tma in (True, False) if gpu.tail_tma else (False,):
                tile = StageTile(block_m, block_n, block_k, warps, tap_stages, chunk_stages, tma)
                accumulators = block_m * max(shape.width, shape.outputs, 64) // (32 * warps)
                if accumulators <= 128 and tile not in found:
                    found.append(tile)
    return found


def joined(pair: tuple[Tensor, Tensor | None] | Sequence[Tensor]) -> Tensor:
    """Both outputs as one, along their channels."""
    return torch.cat([t for t in pair if t is not None], 1)


def bound(asked: Asked, tile: StageTile) -> Callable[[Tensor, Any], tuple[Tensor, Tensor | None]]:
    """The kernel that a tile is for, of a block with one output."""
    if asked.whole:
        x = torch.empty(asked.size, dtype=asked.dtype, device=asked.device)
        block = whole.bind_tile(x, whole.Layers.of(asked), tile)
        return lambda x, other: (block(x, None), None)
    sizes = asked.size, asked.other_size or ()
    h, other = (torch.empty(size, dtype=asked.dtype, device=asked.device) for size in sizes)
    layers = (*asked.layers[:2], asked.epilogue.shortcut, asked.reduce)
    conv, expand, shortcut, reduce = (None if layer is None else triton.prepare(layer, asked.dtype) for layer in layers)
    run = bind_stage(h, conv, expand, other, shortcut, reduce, tile)
    return run  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TailJob:
    """A tile of a tail, or of a block, to compile."""

    shape: Shape
    batch: int
    dtype: str
    tile: StageTile

    def key(self) -> tuple[str, str, str, str]:
        """As the verdicts name it."""
        return self.shape.kernel, self.dtype, self.shape.key(), str(self.tile)

    def launch(self, dtype: torch.dtype) -> None:
        """Launch the kernel on tensors without values."""
        asked = self.shape.build(self.batch, dtype, "meta")
        bound(asked, self.tile)(*(_empty(size, dtype) for size in (asked.size, asked.other_size)))


def _empty(size: Sequence[int] | None, dtype: torch.dtype) -> Tensor | None:
    if size is None:
        return None
    return torch.empty(tuple(size), dtype=dtype, device="meta").to(memory_format=torch.channels_last)


@lru_cache(maxsize=4)
@torch.no_grad()
def _subject(shape: Shape, batch: int, dtype: str, device: str) -> tuple[Any, ...]:
    """A tail, its two inputs, torch's result in its dtype as `own` gives it, and the exact one."""
    asked = shape.build(batch, DTYPES[dtype][0], device)
    x, other = asked.inputs()
    same = own(dtype, lambda: joined(asked.plain(x, other)))
    exact = joined(asked.plain(x.double(), None if other is None else other.double()))
    return asked, x, other, same, exact


def jobs(context: Context) -> Iterator[TailJob]:
    """Every tile of every tail and block, one by one, and those that ship of the odd ones."""
    batch, dtypes = (2, ("ieee",)) if context.quick else (16, ("fp16", "bf16", "tf32"))
    for dtype in dtypes:
        for shape in shapes(context.quick):
            yield from (TailJob(shape, batch, dtype, tile) for tile in _tiles(context, shape, dtype))
        for shape in odd_shapes(context.quick):
            yield from (TailJob(shape, 3, dtype, tile) for tile in _shipped(context, shape, dtype))


def check(context: Context, table: Records, verdict: Callable[..., dict[str, object]]) -> None:
    """Check every tile of every tail and block that is not on record."""

    def judged(job: TailJob) -> dict[str, object]:
        with precision(job.dtype):
            asked, x, other, same, exact = _subject(job.shape, job.batch, job.dtype, context.device.torch_name)
            return verdict(lambda: joined(bound(asked, job.tile)(x, other)), same, exact, context.device.synchronize)

    judge(context, table, jobs(context), TailJob.key, judged)
    for kernel in ("expand_shift", "bottleneck_rows"):
        context.log(f"check: {kernel}: {table.count('status', table.rows(kernel=kernel))}")


def _tiles(context: Context, shape: Shape, dtype: str) -> list[StageTile]:
    if context.quick:
        return [StageTile(16, 16, 16, 4, 1, 1, tma) for tma in (True, False)]
    return tiles(shape, dtype, context.device.gpu)


def _shipped(context: Context, shape: Shape, dtype: str) -> list[StageTile]:
    if context.quick:
        return _tiles(context, shape, dtype)
    return shape.shipped(DTYPES[dtype][0].itemsize, context.device.gpu)


def shipped_faults(context: Context, table: Records) -> list[str]:
    """The tiles that ship and are not right."""
    faults = []
    for shape in (*shapes(context.quick), *odd_shapes(context.quick)):
        for row in table.rows(kernel=shape.kernel, case=shape.key()):
            if row["status"] != "ok" and StageTile.parse(row["tile"]) in _shipped(context, shape, row["dtype"]):
                said = row["dtype"], row["case"], f"{row['tile']}:", row["status"], row["note"]
                faults.append(" ".join((shape.kernel, *said)))
    return faults


#: what a tail or a block is timed against: conv by conv; and of a block, its tail with the next reduce
OTHERS = ("apart", "tail")
#: stands for a case that is done, in the place of a way
MARK = "joint"


def others(asked: Asked, x: Tensor, other: Tensor | None) -> dict[str, Callable[[], Any]]:
    """What a tail or a block is timed against; see `OTHERS`."""
    if not asked.whole:
        layers = (x, *asked.layers[:2], other, asked.epilogue.shortcut, asked.reduce)
        return {"apart": lambda: backends.bind_apart(*layers)}  # type: ignore[arg-type]
    block = whole.Layers.of(asked)
    return {"apart": lambda: whole.apart(x, block), "tail": lambda: whole.by_tail(x, block)}


def plan(quick: bool) -> Iterator[tuple[str, int, Shape]]:
    """What is timed: dtype, batch, tail or block."""
    for dtype, batches in (("ieee", (2,)),) if quick else (("fp16", (128, 32)), ("bf16", (128,))):
        yield from ((dtype, batch, shape) for batch in batches for shape in shapes(quick))


def tune(context: Context, verdicts: Records, table: Records, dtype: str, batch: int, backend: str) -> int:
    """Time what is not timed yet of a dtype at a batch: the right tiles, and `others`; how many cases are left.

    Of tails ("stage"), or of blocks ("block"), which are held against the tails of a table in force.
    """
    left = 0
    wanted = dtype, batch, backend
    for shape in (s for kind, images, s in plan(context.quick) if (kind, images, s.backend) == wanted):
        key = {"dtype": dtype, "case": shape.key(), "batch": batch}
        rows = verdicts.rows(kernel=shape.kernel, dtype=dtype, case=shape.key(), status="ok")
        met = {row["tile"] for row in table.rows(**key) if row["backend"] == shape.backend}
        new = [row for row in rows if row["tile"] not in met]
        if table.done(dtype, shape.key(), batch, MARK, "") and not new:
            continue
        if not context.deadline.allows(5) or not rows:  # no tile of it has been checked yet
            left += 1
            continue
        told = {}
        with precision(dtype) as kind, torch.no_grad():
            try:
                asked = shape.build(batch, kind, context.device.torch_name)
                x, other = asked.inputs()
                ways: dict[tuple[str, str], Callable[[], Any]] = {}
                lost = {row["backend"] for row in table.rows(**key) if row["status"] == "crash"}
                for name, way in others(asked, x, other).items():
                    if name not in lost:
                        ways[name, ""] = way
                for row in new:
                    ways[shape.backend, row["tile"]] = lambda r=row: bound(asked, StageTile.parse(r["tile"]))  # noqa: B023
                for (name, tile), bind in ways.items():
                    row = timed_row(context, table, {**key, "backend": name, "tile": tile}, bind, x, other)
                    if row["status"] == "ok":
                        told[f"{name} {tile}".strip()] = row["median_us"]
                table.add(**key, backend=MARK, tile="", status="tuned")
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                table.add(**key, backend=MARK, tile="", status="oom", note=error_line(error))
                context.device.free()
        best = ", ".join(f"{name} {us:.1f}" for name, us in sorted(told.items(), key=lambda item: item[1])[:3])
        context.log(f"tune: {dtype} {shape.key()} batch {batch}: {best} us")
    return left


def winners(context: Context, table: Records) -> list[dict[str, Any]]:
    """For each tail and block that was timed whether one kernel is faster, and its fastest tile: rows of a table."""
    found = []
    for dtype, batch, shape in plan(context.quick):
        rows = table.rows(dtype=dtype, case=shape.key(), batch=batch, status="ok")
        times = {(row["backend"], row["tile"]): float(row["median_us"]) for row in rows if row["median_us"]}
        stage = {tile: us for (backend, tile), us in times.items() if backend == shape.backend}
        other = {name: times[name, ""] for name in OTHERS if (name, "") in times}
        if "apart" not in other or not stage:
            continue
        tile = min(stage, key=stage.__getitem__)
        found.append(
            {
                "dtype": dtype,
                "case": shape.case(),
                "pixels": batch * shape.size**2,
                "faster": stage[tile] < MARGIN * min(other.values()),
                "tile": tile,
                "us": {shape.backend: stage[tile], **other},
            }
        )
    return found
