"""Counts of what a launch issues and moves, as a GPU's profiler gives them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any  # of numpy, one element a thread
SECTOR = 32  # bytes that move together between the memories


def _distinct(rows: Array) -> tuple[Array, Array]:
    """Each row in order, and which of its numbers are there for the first time; -1 counts as nothing."""
    rows = np.sort(rows, 1)
    first = rows >= 0
    first[:, 1:] &= rows[:, 1:] != rows[:, :-1]
    return rows, first


@dataclass
class Profile:
    """Sums over a launch.

    `instructions` counts warps; `products` multiply-adds of the matrix units, those of padding included; `l2` bytes
    between L2 and the multiprocessors, in whole sectors; `wavefronts` cycles of a multiprocessor's shared memory, and
    `ideal` what they would be without bank conflicts. `device` is the bytes of device memory behind a perfect L2.
    """

    instructions: int = 0
    products: int = 0
    l2: int = 0
    wavefronts: int = 0
    ideal: int = 0
    _read: set[int] = field(default_factory=set)
    _written: set[int] = field(default_factory=set)

    @property
    def device(self) -> int:
        """Bytes of distinct sectors read, plus those of distinct sectors written."""
        return SECTOR * (len(self._read) + len(self._written))

    def warps(self, active: Array | None, size: int) -> None:
        """An instruction of the active threads' warps."""
        self.instructions += size // 32 if active is None else int(active.reshape(-1, 32).any(1).sum())

    def moved(self, offsets: Array, size: int, active: Array, storing: bool, together: int) -> None:
        """Threads' vectors of `size` bytes in global memory; L1 holds what `together` threads load at once."""
        sectors = offsets // SECTOR
        if size > SECTOR:
            raise NotImplementedError(f"vectors of {size} bytes")
        rows, distinct = _distinct(np.where(active, sectors, -1).reshape(-1, together))
        self.l2 += SECTOR * int(distinct.sum())
        (self._written if storing else self._read).update(np.unique(rows[distinct]).tolist())

    def box(self, sectors: Array, storing: bool) -> None:
        """The sectors of a tensor copy."""
        distinct = np.unique(sectors)
        self.l2 += SECTOR * len(distinct)
        (self._written if storing else self._read).update(distinct.tolist())

    def banks(self, offsets: Array, size: int, active: Array) -> None:
        """Threads' vectors of `size` bytes in shared memory; (threads,) offsets."""
        words = offsets[:, None] // 4 + np.arange(max(1, size // 4))
        self.lines(np.where(active[:, None], words, -1).reshape(len(offsets) // 32, -1))

    def lines(self, words: Array) -> None:
        """Words of shared memory that each warp touches at once, -1 for none: (warps, words)."""
        words, distinct = _distinct(words)
        warp = np.broadcast_to(np.arange(len(words))[:, None], words.shape)
        counts = np.bincount((warp * 32 + words % 32)[distinct], minlength=32 * len(words)).reshape(-1, 32)
        self.wavefronts += int(counts.max(1).sum())
        self.ideal += int((-(-counts.sum(1) // 32)).sum())
