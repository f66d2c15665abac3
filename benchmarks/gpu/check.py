"""Every kernel and tile against float64: what is wrong is written down and never used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from ..harness import parity
from ..shapes import ConvShape, odd_shapes
from . import space, stems, tails
from .compiling import Job
from .context import Context
from .device import error_line, is_broken, is_out_of_memory
from .elementwise import check_elementwise
from .judging import judge
from .operations import DTYPES, build, own, poisoned, precision
from .records import Records

KEY = ("kernel", "dtype", "case", "tile")
COLUMNS = ("status", "max_error", "error_bound", "shared", "note")
#: a multiple of 16, so that pixel counts are multiples of 16 as at batch 32 and 128, and the same code is checked
BATCH = 16


def records(context: Context) -> Records:
    """The verdicts."""
    return context.records("check.csv", KEY, COLUMNS)


def shapes(context: Context) -> list[ConvShape]:
    """What is checked and tuned."""
    if context.quick:
        tiny = ConvShape("tiny", 16, 32, 6, 3), ConvShape("tiny.expand", 16, 32, 5, shortcut=16, shortcut_stride=2)
        return list(tiny)
    return space.distinct_shapes()


def batch(context: Context) -> int:
    """Images in a checked convolution."""
    return 2 if context.quick else BATCH


def shipped(context: Context) -> Iterator[Job]:
    """The tiles that ship, in every dtype; also for channels that fill no whole step."""
    todo, images = shapes(context), batch(context)
    for dtype in DTYPES:
        for shape in (*todo, *(() if context.quick else odd_shapes())):
            tiles = {space.chosen(shape, n, dtype, context.device.gpu): None for n in (images, 1, 32, 128)}
            yield from (Job(shape, images, dtype, tile) for tile in tiles)


def others(context: Context) -> Iterator[Job]:
    """The rest of the search space, fp16 before the others."""
    todo, images = shapes(context), batch(context)
    for dtype in DTYPES:
        for shape in todo:
            tiles = space.tiles(shape, dtype, context.device.gpu, images)
            yield from (Job(shape, images, dtype, tile) for tile in (list(tiles)[:2] if context.quick else tiles))


class Oracle:
    """The operation of a shape, its exact result and torch's own, for the shapes seen last."""

    LIMIT = 8

    def __init__(self, device: str) -> None:
        self._device = device
        self._known: dict[tuple[ConvShape, int, str], tuple] = {}

    def of(self, shape: ConvShape, images: int, dtype_name: str) -> tuple:
        """(operation, torch's result in its dtype as `own` gives it, the exact result)."""
        key = shape, images, dtype_name
        if key not in self._known:
            while len(self._known) >= self.LIMIT:
                del self._known[next(iter(self._known))]
            with precision(dtype_name) as dtype, torch.no_grad():
                operation = build(shape, images, dtype, self._device)
                same = own(dtype_name, operation.plain)
                self._known[key] = operation, same, operation.to(torch.float64).plain()
        return self._known[key]


def verdict(call: Callable[[], Tensor], same: Tensor, exact: Tensor, finish: Callable[[], None]) -> dict[str, object]:
    """Run a kernel with poisoned outputs and judge what it gives.

    Raises:
        RuntimeError: if memory ran out: that says nothing about the kernel.
    """
    try:
        with poisoned(), torch.no_grad():
            y = call()
            finish()
    except Exception as error:  # a kernel may fail to compile, to load and to run
        if is_out_of_memory(error):
            raise
        return {"status": "crash" if is_broken(error) else "failed", "note": error_line(error)}
    failure, largest, bound = parity(y, same, exact)
    return {"status": "wrong" if failure else "ok", "max_error": largest, "error_bound": bound, "note": failure or ""}


def check_tiles(context: Context, table: Records, jobs: Iterable[Job]) -> None:
    """Check every tile of the convolution that is not on record."""

    def key(job: Job) -> tuple[str, str, str, str]:
        return "conv_bn_act", job.dtype, space.key_of(job.shape), str(job.tile)

    def judged(job: Job) -> dict[str, object]:
        operation, same, exact = oracle.of(job.shape, job.batch, job.dtype)
        with precision(job.dtype):
            return verdict(lambda: operation.with_tile(job.tile), same, exact, context.device.synchronize)

    oracle = Oracle(context.device.torch_name)
    checked, failed, left = judge(context, table, jobs, key, judged)
    context.log(f"check: {checked} tiles checked, {failed} not right" + (f", {left} left" if left else ""))


def shipped_faults(context: Context, table: Records) -> list[str]:
    """The tiles that ship and are not right."""
    faults = []
    for dtype, of_dtype in groupby(shipped(context), key=lambda job: job.dtype):
        for shape in {job.shape: None for job in of_dtype}:
            for n in (1, 32, 128):
                tile = str(space.chosen(shape, n, dtype, context.device.gpu))
                rows = table.rows(kernel="conv_bn_act", dtype=dtype, case=space.key_of(shape), tile=tile)
                faults += [
                    f"{dtype} {r['case']} {tile}: {r['status']} {r['note']}" for r in rows if r["status"] != "ok"
                ]
    return list(dict.fromkeys(faults))


def run(context: Context) -> int:
    """Check what is not yet checked; 1 if something that ships is not right."""
    table = records(context)
    check_elementwise(context, table)
    stems.check(context, table, verdict)
    check_tiles(context, table, shipped(context))
    tails.check(context, table, verdict)
    check_tiles(context, table, others(context))
    faults = [
        f"{row['kernel']} {row['dtype']} {row['case']}: {row['status']} {row['note']}"
        for row in table.rows(tile="")
        if row["status"] != "ok"
    ]
    faults += shipped_faults(context, table) + tails.shipped_faults(context, table)
    for fault in faults:
        context.log(f"NOT RIGHT {fault}")
    return int(bool(faults))
