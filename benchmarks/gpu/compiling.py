"""Compiling tiles ahead on every core: workers fill Triton's cache on disk, the process with the GPU finds them there.

The workers run the real launcher on `meta` tensors (`benchmarks.offline`), so they need no GPU and the cache keys are
those of the later launch: same constexprs, argument types and alignment.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from fused_resblock.kernels.tiles import Tile
from fused_resblock.table import error_line

from ..shapes import ConvShape
from .deadline import Deadline

#: seconds after which a tile that does not come back is given up: the compiler crashed, or does not end
PATIENCE = 90


@dataclass(frozen=True)
class Job:
    """A tile of a convolution to compile."""

    shape: ConvShape
    batch: int
    dtype: str
    tile: Tile

    def launch(self, dtype: torch.dtype) -> None:
        """Launch the kernel on tensors without values."""
        from .operations import build

        build(self.shape, self.batch, dtype, "meta").with_tile(self.tile)


class Compilable(Protocol):
    """A kernel to compile, in a process of its own."""

    @property
    def dtype(self) -> str:
        """As `operations.DTYPES` names it."""

    @property
    def tile(self) -> Any:
        """What distinguishes it."""

    def launch(self, dtype: torch.dtype) -> None:
        """Launch the kernel on tensors without values."""


@dataclass(frozen=True)
class Compiled:
    """What became of a job: why it does not compile, or None, and its shared memory in bytes."""

    job: Any
    failure: str | None = None
    shared: int | None = None


def compile_one(job: Compilable, capability: int) -> Compiled:
    """Compile one job for a chip; leaves the code in Triton's cache."""
    from ..offline import CHIPS, compiling_for
    from .operations import precision

    try:
        with precision(job.dtype) as dtype, compiling_for(capability) as kernels:
            job.launch(dtype)
        (_, kernel), *_ = kernels
    except Exception as error:  # the compiler fails in many ways; the tile is then not used
        return Compiled(job, error_line(error))
    shared = kernel.metadata.shared
    limit = CHIPS[capability].shared_limit if capability in CHIPS else None
    if limit is not None and shared > limit:
        return Compiled(job, f"out of resources: {shared} bytes of shared memory, the chip has {limit}", shared)
    return Compiled(job, None, shared)


def workers() -> int:
    """Processes that compile: one a core, at most 16, one core left to the process with the GPU."""
    return max(1, min(16, (os.cpu_count() or 2) - 1))


def compile_all(
    jobs: Sequence[Compilable], capability: int, deadline: Deadline, worker: Any = compile_one
) -> Iterator[Compiled]:
    """Compile jobs on all cores and yield each when it is done, until the deadline.

    Where none came back for PATIENCE seconds, those that are with a worker, the first that are open, are yielded as
    failed. The others have not been begun.
    """
    if not jobs:
        return
    with multiprocessing.get_context("spawn").Pool(processes := min(workers(), len(jobs))) as pool:
        results = pool.imap_unordered(partial(worker, capability=capability), jobs)
        open_jobs = dict.fromkeys(jobs)
        while open_jobs and deadline.allows():
            wait = min(PATIENCE, deadline.left())
            try:
                result = results.next(timeout=wait)
            except multiprocessing.TimeoutError:
                if wait == PATIENCE:
                    break
                return
            with suppress(KeyError):
                del open_jobs[result.job]
            yield result
        if deadline.allows():
            begun = list(open_jobs)[:processes]
            yield from (Compiled(job, f"the compiler did not end in {PATIENCE} s") for job in begun)
