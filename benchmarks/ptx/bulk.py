"""Hopper's tensor memory accelerator, and the barriers in shared memory that count what it brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .grid import STORAGE, Array, Descriptor, Fault, Grid
from .matrix import swizzled
from .memory import active_of, addresses, groups_of
from .operands import Builder, Step, source
from .parse import Address, Instruction
from .profile import SECTOR


@dataclass
class Barrier:
    """An mbarrier: arrivals of a phase, those still missing, bytes still missing, phases that are over, late copies."""

    count: int
    missing: int
    bytes: int = 0
    phase: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)

    def turn(self) -> None:
        """End the phase if nothing is missing."""
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.count, self.phase + 1


def _each(g: Grid, active: Array | None, at: Array) -> Iterator[tuple[int, int, int]]:
    """The active threads: number, program, address."""
    for thread in np.flatnonzero(active_of(g, active)):
        yield int(thread), int(g.program[thread]), int(at[thread])


def _barrier(g: Grid, program: int, at: int) -> Barrier:
    if (program, at) not in g.barriers:
        raise Fault(f"no barrier at shared {at:#x}")
    return g.barriers[program, at]


def _init(i: Instruction) -> Step:
    where, count = addresses(i.operands[0]), i.operands[1].bits

    def run(g: Grid, active: Array | None) -> None:
        for _, program, at in _each(g, active, where(g)):
            if (program, at) in g.barriers:
                raise Fault(f"a second barrier at shared {at:#x}")
            g.barriers[program, at] = Barrier(count, count)

    return run


def _inval(i: Instruction) -> Step:
    where = addresses(i.operands[0])

    def run(g: Grid, active: Array | None) -> None:
        for _, program, at in _each(g, active, where(g)):
            if _barrier(g, program, at).bytes:
                raise Fault(f"the barrier at shared {at:#x} ends with bytes under way")
            del g.barriers[program, at]

    return run


def _expect(i: Instruction) -> Step:
    where, count = addresses(i.operands[1]), source(i.operands[2], "u32")

    def run(g: Grid, active: Array | None) -> None:
        expected = np.broadcast_to(count(g), g.size)
        for thread, program, at in _each(g, active, where(g)):
            barrier = _barrier(g, program, at)
            barrier.bytes += int(expected[thread])
            barrier.missing -= 1
            if barrier.missing < 0:
                raise Fault(f"too many arrivals at shared {at:#x}")
            barrier.turn()

    return run


def _try_wait(i: Instruction) -> Step:
    to, where, parity = i.operands[0], addresses(i.operands[1]), source(i.operands[2], "u32")

    def run(g: Grid, active: Array | None) -> None:
        wanted = np.broadcast_to(parity(g), g.size)
        at, everybody = where(g), active_of(g, active)
        over = np.zeros(g.size, bool)
        for program in np.unique(g.program[everybody]):
            mine = everybody & (g.program == program)
            for place in np.unique(at[mine]):
                barrier = _barrier(g, int(program), int(place))
                copies, barrier.copies = barrier.copies, []
                for copy in copies:
                    copy()
                here = mine & (at == place)
                over |= here & ((barrier.phase & 1) != wanted)
        g.blocked = bool((everybody & ~over).any())
        g.write(to.number, over, active)

    return run


def _box(g: Grid, tensor: Descriptor, start: list[int], at: int) -> tuple[Array, Array, Array]:
    """The elements of a box: whether they are in the tensor, and where they are in global and in shared memory."""
    inside, far = np.True_, np.int64(tensor.address - g.memory.BASE)
    for axis, (first, size, stride, box) in enumerate(
        zip(start, tensor.shape, tensor.strides, tensor.box, strict=True)
    ):
        place = (first + np.arange(box)).reshape(-1, *[1] * axis)
        inside = inside & (place >= 0) & (place < size)
        far = far + place * stride
    row = tensor.box[0] * tensor.itemsize
    if at % 128 or (tensor.swizzle and row > tensor.swizzle):
        raise Fault(f"a box of {row} bytes a row at shared {at:#x}, swizzled by {tensor.swizzle}")
    near = swizzled(at + tensor.itemsize * np.arange(inside.size), tensor.swizzle)
    if near.max() + tensor.itemsize > g.limit:
        raise Fault(f"a box at shared {at:#x} reaches behind {g.limit}")
    return inside.reshape(-1), far.reshape(-1), near


def _tensor(i: Instruction) -> Step:
    """Both directions; see PTX's `cp.async.bulk.tensor`."""
    loading = "mbarrier::complete_tx::bytes" in i.opcode
    remote, local = (i.operands[1], i.operands[0]) if loading else (i.operands[0], i.operands[1])
    assert isinstance(remote, Address)
    descriptor, where = source(remote.base, "b64"), addresses(local)
    coordinates = [source(item, "s32") for item in remote.coordinates]
    signal = addresses(i.operands[2]) if loading else None

    def run(g: Grid, active: Array | None) -> None:
        tensors, start = descriptor(g), [np.broadcast_to(c(g), g.size) for c in coordinates]
        told = None if signal is None else signal(g)
        for thread, program, at in _each(g, active, where(g)):
            tensor: Descriptor = g.parameters["descriptors"][int(tensors[thread])]
            inside, far, near = _box(g, tensor, [int(s[thread]) for s in start], at)
            near = near + program * g.stride
            here = np.full(g.size, tensor.address - g.memory.BASE)
            g.check_early(here, np.arange(g.size) == thread, not loading)
            if g.profile is not None:
                g.profile.box(far[inside] // SECTOR, not loading)
                g.profile.wavefronts += near.size * tensor.itemsize // 128
                g.profile.ideal += near.size * tensor.itemsize // 128
            if told is not None:
                _load(g, _barrier(g, program, int(told[thread])), tensor, inside, far, near)
            else:
                mine = np.zeros(g.size, bool)
                mine[thread] = True
                _store(g, mine, tensor, inside, far, near)

    return run


def _elements(memory: Array, tensor: Descriptor) -> Array:
    """A memory of bytes in elements of a tensor, all of which are aligned."""
    return memory.view(STORAGE[8 * tensor.itemsize])


def _load(g: Grid, barrier: Barrier, tensor: Descriptor, inside: Array, far: Array, near: Array) -> None:
    content = np.where(inside, _elements(g.memory.bytes, tensor)[np.where(inside, far, 0) // tensor.itemsize], 0)

    def land() -> None:
        _elements(g.shared, tensor)[near // tensor.itemsize] = content
        barrier.bytes -= near.size * tensor.itemsize
        barrier.turn()

    if g.late:
        barrier.copies.append(land)
    else:
        land()


def _store(g: Grid, thread: Array, tensor: Descriptor, inside: Array, far: Array, near: Array) -> None:
    if _elements(g.unfenced, tensor)[near // tensor.itemsize].any():
        raise Fault("a tensor store reads shared memory that was not fenced for it")
    to, origin = far[inside] // tensor.itemsize, near[inside] // tensor.itemsize

    def land(_: Any) -> None:
        _elements(g.memory.bytes, tensor)[to] = _elements(g.shared, tensor)[origin]

    g.stores.start(thread, (lambda _: None) if g.late else land)
    if g.late:
        land(None)


def _fence(i: Instruction) -> Step:
    def run(g: Grid, active: Array | None) -> None:
        for program in np.unique(g.program[active_of(g, active)]):
            g.unfenced[program * g.stride : (program + 1) * g.stride] = 0

    return run


_COMMIT, _WAIT = groups_of("stores")
BUILDERS: dict[str, Builder] = {
    "mbarrier.init": _init,
    "mbarrier.inval": _inval,
    "mbarrier.arrive.expect_tx": _expect,
    "mbarrier.try_wait": _try_wait,
    "cp.async.bulk.tensor": _tensor,
    "cp.async.bulk.commit_group": _COMMIT,
    "cp.async.bulk.wait_group": _WAIT,
    "fence.proxy.async": _fence,
}
