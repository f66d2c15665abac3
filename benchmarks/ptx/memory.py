"""Loads, stores and asynchronous copies of threads, and the matrix loads and stores of warps."""

from __future__ import annotations

import numpy as np

from .grid import COPIED, STORED, Array, Fault, Grid
from .operands import KINDS, Builder, Step, source
from .parse import Address, Instruction, Number, Register, Vector


def addresses(operand: object) -> Step:
    """How to read `[base + offset]`: its address in each thread."""
    assert isinstance(operand, Address), operand
    read = source(operand.base, "b64")
    return lambda g, _=None: read(g) + np.uint64(operand.offset % 2**64)  # it may be negative


def _items(operand: object) -> list[Register | Number | None]:
    return list(operand.items) if isinstance(operand, Vector) else [operand]


def active_of(g: Grid, active: Array | None) -> Array:
    """The threads that run an instruction, of which None says all."""
    return g.everybody if active is None else active


def _width(i: Instruction) -> int:
    """Bytes of an element: of `b32` 4."""
    return int(i.parts[-1][1:]) // 8


def _place(g: Grid, space: str, at: Array, size: int, threads: Array, storing: bool = False) -> tuple[Array, Array]:
    """A memory, and where in it the threads' vectors of `size` bytes are."""
    if space == "shared":
        start = g.shared_offsets(at, size, threads)
        if g.profile is not None:
            g.profile.banks(start, size, threads)
        return g.shared, start
    start = g.memory.offsets(at, size, threads)
    g.check_early(start, threads, storing)
    if g.profile is not None:
        g.profile.moved(start, size, threads, storing, 32 if storing else g.threads)
    return g.memory.bytes, start


def _load(i: Instruction) -> Step:
    space = i.parts[1]
    where, items, width = addresses(i.operands[1]), _items(i.operands[0]), _width(i)
    kind = KINDS[f"b{8 * width}"]

    def run(g: Grid, active: Array | None) -> None:
        everybody = active_of(g, active)
        at = where(g)
        memory, start = _place(g, space, at, width * len(items), everybody)
        words = memory[: len(memory) // width * width].view(kind)
        for place, item in enumerate(items):
            if item is not None:
                g.write(item.number, words[start // width + place], active)

    return run


def _store(i: Instruction) -> Step:
    space = i.parts[1]
    where, items, width = addresses(i.operands[0]), _items(i.operands[1]), _width(i)
    reads = [source(item, f"b{8 * width}") for item in items]
    kind = KINDS[f"b{8 * width}"]

    def run(g: Grid, active: Array | None) -> None:
        everybody = active_of(g, active)
        at = where(g)
        memory, start = _place(g, space, at, width * len(items), everybody, storing=True)
        words = memory[: len(memory) // width * width].view(kind)
        start = start[everybody] // width
        for place, read in enumerate(reads):
            words[start + place] = np.broadcast_to(read(g), g.size)[everybody]
            if space == "shared":
                g.unfenced.reshape(-1, width)[start + place] = STORED

    return run


def _load_parameter(i: Instruction) -> Step:
    to, origin = i.operands
    assert isinstance(origin, Address), i.text
    name = origin.base.name

    def run(g: Grid, active: Array | None) -> None:
        g.write(to.number, np.full(g.size, np.uint64(g.parameters[name] & (2**64 - 1))), active)

    return run


def _copy(i: Instruction) -> Step:
    """`cp.async`: bytes from global to shared memory, fewer of them read where a size says so, zeros for the rest."""
    size = i.operands[2].bits
    to, origin = addresses(i.operands[0]), addresses(i.operands[1])
    read = source(i.operands[3], "u32") if len(i.operands) > 3 else None

    def run(g: Grid, active: Array | None) -> None:
        everybody = active_of(g, active)
        _, start = _place(g, "shared", to(g), size, everybody)
        wanted = np.full(g.size, size) if read is None else np.broadcast_to(read(g), g.size).astype(np.int64)
        if (everybody & (wanted != 0) & (wanted != size)).any():
            raise Fault("a part of a vector is copied")
        full = everybody & (wanted == size)
        _, at = _place(g, "global", origin(g), size, full)
        content = g.memory.bytes[at[:, None] + np.arange(size)]
        content[~full] = 0

        def land(threads: Array) -> None:
            places = start[threads][:, None] + np.arange(size)
            g.shared[places] = content[threads]
            g.unfenced[places] = COPIED

        g.copies.start(everybody, land if g.late else lambda _: None)
        if not g.late:
            land(everybody)

    return run


def groups_of(flights: str) -> tuple[Builder, Builder]:
    """What closes a group of a kind of asynchronous work, and what waits for all but the newest groups."""

    def commit(i: Instruction) -> Step:
        return lambda g, active: getattr(g, flights).commit(active_of(g, active))

    def wait(i: Instruction) -> Step:
        left = i.operands[0].bits
        return lambda g, active: getattr(g, flights).wait(active_of(g, active), left)

    return commit, wait


def whole_warps(g: Grid, active: Array | None, i: Instruction) -> Array:
    """The active threads as warps.

    Raises:
        Fault: if only a part of a warp is active.
    """
    everybody = active_of(g, active).reshape(-1, 32)
    if (everybody.any(1) != everybody.all(1)).any():
        raise Fault(f"a part of a warp runs {i.opcode}")
    return everybody[:, 0]


def _rows(g: Grid, at: Array, place: int, active: Array | None) -> Array:
    """Where in shared memory the 8 rows of 16 bytes of a warp's matrix number `place` are: (warps, 8)."""
    giving = (g.lane // 8 == place) & active_of(g, active)
    return g.shared_offsets(at, 16, giving).reshape(-1, 32)[:, 8 * place : 8 * place + 8]


def _matrices(i: Instruction) -> Step:
    """`ldmatrix` and `stmatrix`: 8x8 matrices of 16-bit elements, two elements a thread."""
    storing = i.parts[0] == "stmatrix"
    memory, registers = (i.operands[0], i.operands[1]) if storing else (i.operands[1], i.operands[0])
    where, items, transposed = addresses(memory), _items(registers), "trans" in i.parts
    lanes = np.arange(32)
    # row and column of a thread's two elements
    row, column = (lanes // 4)[:, None].repeat(2, 1), 2 * (lanes % 4)[:, None] + np.arange(2)
    if transposed:
        row, column = column, row

    def run(g: Grid, active: Array | None) -> None:
        warps = whole_warps(g, active, i)
        at = where(g)
        halves = g.shared.view(np.uint16)
        for place, item in enumerate(items):
            starts = _rows(g, at, place, active)
            elements = starts[:, row] // 2 + column  # (warps, 32, 2)
            if g.profile is not None:
                g.profile.lines(np.where(warps[:, None], (starts[:, :, None] // 4 + np.arange(4)).reshape(-1, 32), -1))
            if storing:
                values = g.registers[item.number].view(np.uint16).reshape(-1, 32, 2)
                halves[elements[warps]] = values[warps]
                g.unfenced.reshape(-1, 2)[elements[warps]] = STORED
            else:
                loaded = np.ascontiguousarray(halves[elements]).view(np.uint32).reshape(-1)
                g.write(item.number, loaded, active)

    return run


def _shuffle(i: Instruction) -> Step:
    to, read, other = i.operands[0], source(i.operands[1], "b32"), source(i.operands[2], "u32")
    butterfly = i.parts[2] == "bfly"
    if i.parts[2] not in ("bfly", "idx"):
        raise NotImplementedError(i.opcode)

    def run(g: Grid, active: Array | None) -> None:
        whole_warps(g, active, i)
        by = np.broadcast_to(other(g), g.size).astype(np.int64)
        origin = g.lane ^ by if butterfly else by & 31
        value = read(g)[np.arange(g.size) // 32 * 32 + origin]
        g.write((to.items[0] if isinstance(to, Vector) else to).number, value, active)

    return run


def _elect(i: Instruction) -> Step:
    lane, chosen = i.operands[0].items

    def run(g: Grid, active: Array | None) -> None:
        whole_warps(g, active, i)
        g.write(chosen.number, g.lane == 0, active)
        if lane is not None:
            g.write(lane.number, np.zeros(g.size, np.uint32), active)

    return run


_COMMIT, _WAIT = groups_of("copies")
BUILDERS = {
    "ld.param": _load_parameter,
    "ld.global": _load,
    "ld.shared": _load,
    "st.global": _store,
    "st.shared": _store,
    "cp.async.cg.shared.global": _copy,
    "cp.async.ca.shared.global": _copy,
    "cp.async.commit_group": _COMMIT,
    "cp.async.wait_group": _WAIT,
    "ldmatrix": _matrices,
    "stmatrix": _matrices,
    "shfl.sync": _shuffle,
    "elect.sync": _elect,
}
