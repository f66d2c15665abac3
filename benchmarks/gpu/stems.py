"""The stem's kernel against float64 on images of several sizes, and against convolution and pool apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_resblock import backends
from fused_resblock.kernels.pool import POOL
from fused_resblock.kernels.tables import STEM, case_name
from fused_resblock.params import PLAIN, Epilogue

from ..shapes import ConvShape
from .context import Context
from .device import Broken, error_line, is_out_of_memory
from .operations import DTYPES, Operation, build, own, precision
from .records import Records
from .timing import timed_row

RELU = Epilogue(relu=True)
Call = Callable[[Tensor, Any], Tensor]


def _shape(size: int) -> ConvShape:
    return ConvShape("stem", 3, 64, size, 7, 2)


def operation(size: int, batch: int, dtype: torch.dtype, device: str) -> Operation:
    """The stem's convolution of an image of `size` rows and columns."""
    return build(_shape(size), batch, dtype, device)


def fused(op: Operation) -> Call:
    """Convolution, norm, ReLU and max-pool in one kernel, behind one that copies the image."""
    run = backends.bind_stem(op.x, op.conv, True, POOL, backend="triton")
    assert run is not None
    return run


def apart(op: Operation, backend: str) -> Call:
    """The convolution with its norm and ReLU on a backend, then torch's max-pool."""
    run = backends.BACKENDS[backend].bind_conv_bn_act(op.x, op.conv, None, RELU, False)
    return lambda x, other: torch.max_pool2d(run(x, other), *POOL)


def results(op: Operation, dtype: str) -> tuple[Tensor, Tensor]:
    """Torch's own result, see `own`, and the exact one."""
    wide = op.to(torch.float64)
    return own(dtype, lambda: apart(op, "eager")(op.x, None)), apart(wide, "eager")(wide.x, None)


def sizes(quick: bool) -> tuple[int, ...]:
    """Rows and columns of the checked images; odd ones fill no tile."""
    return (20,) if quick else (224, 65, 288)


def check(context: Context, table: Records, verdict: Callable[..., dict[str, object]]) -> None:
    """Check the kernel at every size and in every dtype that is not on record."""
    for dtype in DTYPES:
        for size in sizes(context.quick):
            key = {"kernel": "stem", "dtype": dtype, "case": f"7x7.{size}px", "tile": ""}
            if table.done(*key.values()):
                continue
            if not context.deadline.allows():
                return
            with precision(dtype) as kind, torch.no_grad():
                try:
                    op = operation(size, 2, kind, context.device.torch_name)
                    same, exact = results(op, dtype)
                    row = verdict(lambda op=op: fused(op)(op.x, None), same, exact, context.device.synchronize)  # type: ignore[misc]
                except RuntimeError as error:
                    row = {"status": "error", "note": error_line(error)}
                    context.device.free()
            table.add(**key, **row)
            if row["status"] == "crash":
                raise Broken(f"stem {dtype} {size}px: {row['note']}")


def plan(quick: bool) -> Iterator[tuple[str, int, int]]:
    """What is timed: dtype, batch, size."""
    if quick:
        yield "ieee", 2, 20
        return
    yield from (("fp16", batch, 224) for batch in (128, 32, 1))
    yield "bf16", 128, 224
    yield "tf32", 32, 224


def _case(size: int) -> str:
    op = operation(size, 1, torch.float16, "meta")
    return case_name(op.conv, None, PLAIN) + STEM


def tune(context: Context, table: Records, dtype: str, batch: int) -> int:
    """Time what is not timed yet of a dtype at a batch; how many stems are left."""
    left = 0
    for size in (size for kind, images, size in plan(context.quick) if (kind, images) == (dtype, batch)):
        key = {"dtype": dtype, "case": f"{_case(size)}.{size}px", "batch": batch}
        if table.done(dtype, key["case"], batch, "stem", ""):
            continue
        if not context.deadline.allows(5):
            left += 1
            continue
        told = {}
        with precision(dtype) as kind, torch.no_grad():
            try:
                op = operation(size, batch, kind, context.device.torch_name)
                ways: dict[str, Callable[[], Call]] = {"triton": lambda op=op: fused(op)}  # type: ignore[misc]
                for name in ("cudnn", "eager"):
                    ways[name] = lambda op=op, name=name: apart(op, name)  # type: ignore[misc]
                lost = {row["backend"] for row in table.rows(**key, status="crash")}
                for backend, bind in ways.items():
                    if backend in lost:
                        continue
                    row = timed_row(context, table, {**key, "backend": backend, "tile": ""}, bind, op.x, None)
                    if row["status"] == "ok":
                        told[backend] = row["median_us"]
                table.add(**key, backend="stem", tile="", status="tuned")
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                table.add(**key, backend="stem", tile="", status="oom", note=error_line(error))
                context.device.free()
        context.log(f"tune: stem {dtype} batch {batch}: {', '.join(f'{n} {us:.1f}' for n, us in told.items())} us")
    return left


def winners(context: Context, table: Records) -> list[dict[str, Any]]:
    """The fastest way of each stem that was timed: rows of a table."""
    found = []
    for dtype, batch, size in plan(context.quick):
        rows = table.rows(dtype=dtype, case=f"{_case(size)}.{size}px", batch=batch, status="ok")
        times = {row["backend"]: float(row["median_us"]) for row in rows if row["median_us"]}
        if times:
            backend = min(times, key=times.__getitem__)
            pixels = batch * _shape(size).out_size ** 2
            found.append(
                {"dtype": dtype, "case": _case(size), "pixels": pixels, "backend": backend, "tile": None, "us": times}
            )
    return found
