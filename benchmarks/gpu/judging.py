"""Jobs compiled on every core and judged one by one: what the tiles of convolutions and of tails go through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from .compiling import Compilable
from .context import Context
from .device import Broken, error_line
from .records import Records

Kind = TypeVar("Kind", bound=Compilable)
Row = dict[str, object]


def judge(
    context: Context,
    table: Records,
    jobs: Iterable[Kind],
    key: Callable[[Kind], tuple[str, ...]],
    verdict: Callable[[Kind], Row],
) -> tuple[int, int, int]:
    """Compile the jobs that are not on record, run each and put on record what becomes of it, until the deadline.

    Args:
        context: of the step.
        table: the verdicts.
        jobs: may name one twice.
        key: of a job, as the table has it.
        verdict: runs a job and judges what it gives.

    Returns:
        How many were judged, how many of those are not right, and how many are left.

    Raises:
        Broken: after a crash, which is on record.
    """
    todo = list({key(job): job for job in jobs if not table.done(*key(job))}.values())
    context.log(f"check: {len(todo)} tiles to check")
    failed = 0
    for compiled in context.device.compiled(todo, context.deadline):
        row: Row = {"status": "failed", "note": compiled.failure}
        names = dict(zip(table.key, key(compiled.job), strict=True))
        if compiled.failure is None:
            try:
                with table.running(**names):
                    row = verdict(compiled.job)
            except RuntimeError as error:
                row = {"status": "error", "note": error_line(error)}
                context.device.free()
        table.add(**names, shared=compiled.shared, **row)
        told = f"{' '.join(names.values())}: {row['status']} {row['note']}"
        if row["status"] != "ok":
            failed += 1
            context.keep(f"check: {told}")
        if row["status"] == "crash":
            raise Broken(told)
        if not context.deadline.allows():
            break
    left = sum(not table.done(*key(job)) for job in todo)
    return len(todo) - left, failed, left
