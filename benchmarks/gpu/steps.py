"""What each step does, in which order, inside its own process."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from . import bench, ceilings, check, profile, summary, tune, verify
from .context import Context
from .device import Broken, error_line, is_broken
from .records import Row

#: exit status of a process that must be followed by a new one: the GPU's context is lost
LOST_CONTEXT = 75

Part = Callable[[Context], object]


def _graph(context: Context) -> None:
    verify.check_graph(context, check.records(context))


def _memory(context: Context) -> None:
    verify.check_memory(context, check.records(context))


def _suite(context: Context) -> None:
    verify.check_suite(context, check.records(context))


def _verdict(context: Context) -> int:
    """1 if the test suite, compute-sanitizer or the CUDA graph found something."""
    return int(any(row["status"] in ("wrong", "failed", "crash") for row in verified(context)))


def verified(context: Context) -> list[Row]:
    """The verdicts of the test suite, compute-sanitizer and the CUDA graph."""
    rows = check.records(context).rows()
    return [row for row in rows if row["kernel"] in ("pytest", "compute-sanitizer", "cuda-graph")]


PARTS: dict[str, tuple[Part, ...]] = {
    "check": (ceilings.run, _graph, check.run, _memory, _verdict),
    "suite": (_suite, _verdict),
    "tune": (tune.run,),
    "bench": (bench.run,),
    "profile": (profile.run,),
    "summary": (summary.run,),
}


def run_step(step: str, context: Context) -> int:
    """Run the parts of a step until its time is up: 0, 1 if something is not right, LOST_CONTEXT to be run again."""
    status = 0
    try:
        for part in PARTS[step]:
            told = part(context)
            status |= told if isinstance(told, int) else 0
    except Broken as error:
        context.log(f"{step}: the GPU's context is lost, going on in a new process: {error}")
        return LOST_CONTEXT
    except Exception as error:  # nobody expected it: the whole of it goes to the log, one line to the screen
        context.keep(traceback.format_exc())
        context.log(f"{step}: {error_line(error)}; what was measured is kept, details are in gpu.log")
        return LOST_CONTEXT if is_broken(error) else 1
    return status
