"""The state of all threads of some programs: registers, memories, and what is still under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .parse import Kernel
from .profile import Array, Profile

#: where a program's shared memory begins: the first KiB belongs to the system
SHARED_BASE = 1024
#: by the width of a register
STORAGE = {bits: np.dtype(kind) for bits, kind in ((1, bool), (16, np.uint16), (32, np.uint32), (64, np.uint64))}
#: how a byte that was not fenced came into shared memory: by threads, or by `cp.async`
STORED, COPIED = 1, 2


class Fault(Exception):
    """What a GPU would not do, or would do at random."""


class GlobalMemory:
    """Device memory: pieces of one array, with gaps between them that must not be touched."""

    BASE, GAP = 0x7F0000000000, 4096

    def __init__(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._settled: list[bool] = []

    def add(self, content: np.ndarray, misalignment: int = 0, settled: bool = False) -> int:
        """Copy bytes in; their address, a multiple of 256 plus the misalignment.

        They are `settled` if a kernel that was started early may read them at once; see `dependent`.
        """
        start = -(-(len(self.bytes) + self.GAP) // 256) * 256 + misalignment
        self.bytes = np.concatenate([self.bytes, np.zeros(start - len(self.bytes), np.uint8), content])
        self._starts.append(start)
        self._ends.append(len(self.bytes))
        self._settled.append(settled)
        return self.BASE + start

    def seal(self) -> None:
        """Nothing more is added; room behind the last piece, so that vectors can be read."""
        self.bytes = np.concatenate([self.bytes, np.zeros(self.GAP + -len(self.bytes) % 16, np.uint8)])

    def unsettled(self, offsets: Array) -> Array:
        """Whether what lies there must not be read before the kernels before have ended."""
        return ~np.take(self._settled, np.searchsorted(self._starts, offsets, side="right") - 1)

    def read_back(self, address: int, size: int) -> np.ndarray:
        """What lies there now."""
        return self.bytes[address - self.BASE : address - self.BASE + size]

    def offsets(self, addresses: Array, size: int, active: Array) -> Array:
        """Where in `bytes` the active threads' addresses are; 0 for the others.

        Raises:
            Fault: if a vector of `size` bytes there is not aligned, or not in one of the pieces.
        """
        offsets = np.where(active, addresses - np.uint64(self.BASE), np.uint64(0)).astype(np.int64)
        piece = np.searchsorted(self._starts, offsets, side="right") - 1
        inside = (piece >= 0) & (offsets + size <= np.take(self._ends, np.maximum(piece, 0)))
        wrong = active & (~inside | (addresses % np.uint64(size) != 0))
        if wrong.any():
            raise Fault(f"{size} bytes at global {int(addresses[wrong][0]):#x}: outside of every tensor or misaligned")
        return offsets


@dataclass
class Descriptor:
    """A tensor map: dimensions innermost first."""

    address: int
    shape: Sequence[int]
    strides: Sequence[int]  # in bytes
    box: Sequence[int]
    itemsize: int
    swizzle: int  # bytes of a row: 0 for none, 32, 64, 128


class Grid:
    """Some programs of a launch, run together.

    Args:
        kernel: what they run.
        programs: their coordinates in the launch, an (n, 3) array.
        launched: programs of the launch along each axis.
        threads: of a program.
        parameters: the kernel's, by name.
        memory: the device's.
        shared: bytes of a program.
        late: whether asynchronous work lands as late as it may, and not at once; of boxes that are stored the one where
            loads do the other, so that a box which is written over before it has left is seen.
        apart: whether products do the one where the rest does the other.
        serialized: whether the assembler has each wgmma waited for.
        early: whether the launch may begin before the one before has ended.
        notes: what is to be said of the launch.
        profile: where to count what is issued and moved, if anywhere.
    """

    def __init__(
        self,
        kernel: Kernel,
        programs: np.ndarray,
        launched: Sequence[int],
        threads: int,
        parameters: dict[str, Any],
        memory: GlobalMemory,
        shared: int,
        late: bool,
        apart: bool,
        serialized: bool,
        early: bool,
        notes: set[str],
        profile: Profile | None = None,
    ) -> None:
        self.kernel, self.threads, self.parameters, self.memory, self.late = kernel, threads, parameters, memory, late
        self.profile, self.late_products, self.notes = profile, late != apart and not serialized, notes
        self.programs = len(programs)
        self.size = self.programs * threads
        self.everybody = np.ones(self.size, bool)
        self.program = np.repeat(np.arange(self.programs), threads)
        self.lane = np.tile(np.arange(32), self.size // 32)
        self.registers: list[Array] = [
            np.full(self.size, 0 if width == 1 else 0xDEAD, STORAGE[width]) for width in kernel.widths
        ]
        self.specials = {"%tid.x": np.tile(np.arange(threads, dtype=np.uint32), self.programs)}
        self.specials["%laneid"] = self.lane.astype(np.uint32)
        for axis, name in enumerate("xyz"):
            self.specials[f"%ctaid.{name}"] = np.repeat(programs[:, axis].astype(np.uint32), threads)
            self.specials[f"%nctaid.{name}"] = np.full(self.size, launched[axis], np.uint32)
        self.stride = -(-(SHARED_BASE + shared) // 16) * 16
        self.shared = np.full(self.programs * self.stride, 0xFF, np.uint8)  # NaN in every floating-point format
        self.limit = SHARED_BASE + shared
        self.unfenced = np.zeros(len(self.shared), np.uint8)  # for the asynchronous proxy: STORED, or COPIED
        self.exited = np.zeros(self.size, bool)
        self.early, self.waited = early, np.zeros(self.size, bool)  # see dependent.py
        self.blocked = False  # an instruction cannot go on before others have run
        self.barriers: dict[tuple[int, int], Any] = {}  # see bulk.py
        self.copies = Flights(self.size)  # cp.async
        self.products = Flights(self.size)  # wgmma
        self.stores = Flights(self.size)  # TMA stores
        self.shadows: dict[int, tuple[Array, Array]] = {}  # see matrix.py

    def shared_offsets(self, addresses: Array, size: int, active: Array) -> Array:
        """Where in `shared` the active threads' addresses are; see `GlobalMemory.offsets`."""
        addresses = addresses.astype(np.int64)
        wrong = active & ((addresses < SHARED_BASE) | (addresses + size > self.limit) | (addresses % size != 0))
        if wrong.any():
            raise Fault(f"{size} bytes at shared {int(addresses[wrong][0]):#x}: outside of {self.limit} or misaligned")
        return np.where(active, self.program * self.stride + addresses, 0)

    def check_early(self, offsets: Array, threads: Array, storing: bool) -> None:
        """Fault if one of the threads may not touch these places of global memory yet; see `dependent`."""
        if not self.early:
            return
        early = threads & ~self.waited
        if early.any() and (storing or self.memory.unsettled(offsets[early]).any()):
            raise Fault(f"{'a write' if storing else 'an activation is read'} before griddepcontrol.wait")

    def write(self, number: int, value: Array, active: Array | None) -> None:
        """Set a register in the active threads (None: in all); arrays are never changed in place."""
        kind, value = STORAGE[self.kernel.widths[number]], np.asarray(value)
        if value.dtype is not kind:
            value = value.view(kind) if value.dtype.itemsize == kind.itemsize else value.astype(kind)
        if active is None:
            self.registers[number] = value if value.shape == (self.size,) else np.full(self.size, value)
        else:
            self.registers[number] = np.where(active, value, self.registers[number])


@dataclass
class Flight:
    """Something under way: whose it is, the group of each thread that it belongs to, and what lands."""

    threads: Array
    group: Array
    land: Any


class Flights:
    """Asynchronous work in groups, which each thread closes and waits for by itself."""

    def __init__(self, size: int) -> None:
        self.groups = np.zeros(size, np.int64)  # closed so far
        self.flying: list[Flight] = []

    def start(self, threads: Array, land: Any) -> None:
        """Add work to the open group; `land(threads)` is called for those who wait for it."""
        self.flying.append(Flight(threads.copy(), self.groups.copy(), land))

    def commit(self, threads: Array) -> None:
        """Close the open group."""
        self.groups = self.groups + threads

    def wait(self, threads: Array, left: int) -> None:
        """Land all but the newest `left` groups."""
        for flight in self.flying:
            ready = flight.threads & threads & (flight.group < self.groups - left)
            if ready.any():
                flight.land(ready)
                flight.threads = flight.threads & ~ready
        self.flying = [flight for flight in self.flying if flight.threads.any()]
