"""Jobs done on all cores, in order. A job holds functions that cannot be sent to a worker; its number can."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

_todo: list[Any] = []  # of a worker
_work: list[Callable[[Any], Any]] = []


def _prepare(listing: Callable[[], Iterable[Any]], work: Callable[[Any], Any]) -> None:
    torch.set_num_threads(1)
    _todo[:], _work[:] = listing(), [work]


def _do(number: int) -> Any:
    return _work[0](_todo[number])


def in_order(
    listing: Callable[[], Iterable[Any]], work: Callable[[Any], Any], numbers: Sequence[int], unit: str
) -> Iterator[Any]:
    """What the work gives for some jobs, with a progress bar.

    Args:
        listing: makes the jobs, in every worker anew.
        work: is done with each.
        numbers: of the jobs in the list.
        unit: what the progress bar counts.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), _prepare, (listing, work)) as pool:
        yield from tqdm(pool.imap(_do, numbers), total=len(numbers), unit=unit, disable=None)
