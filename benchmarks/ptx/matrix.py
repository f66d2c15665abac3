"""Matrix instructions: `mma.sync` of a warp, and Hopper's `wgmma` of four warps, which reads shared memory itself."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .grid import STORED, Array, Fault, Grid
from .memory import active_of, groups_of, whole_warps
from .operands import Builder, Step, floats, source
from .parse import Instruction, Number, Register, Vector


def _decoded(words: Array, kind: str) -> Array:
    """Registers or memory words as fp32; a last axis of 2 for the elements of 16 bits in each.

    Of TF32 the last 13 bits are cut off and not rounded, as errors measured on an H100 say that its units do.
    """
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    return floats(np.ascontiguousarray(words)[..., None].view(np.uint16), kind)


def _fragment_a(registers: Array, kind: str) -> Array:
    """Four registers of each thread, (warps, 32, 4), as (warps, 16, K)."""
    warps = len(registers)
    values = _decoded(registers, kind).reshape(warps, 8, 4, 2, 2, -1)  # row, column, right, below, element
    return values.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, -1)


def _fragment_b(registers: Array, kind: str) -> Array:
    """Two registers of each thread, (warps, 32, 2), as (warps, K, 8)."""
    warps = len(registers)
    values = _decoded(registers, kind).reshape(warps, 8, 4, 2, -1)  # column, row, below, element
    return values.transpose(0, 3, 2, 4, 1).reshape(warps, -1, 8)


def _sums(registers: Array) -> Array:
    """Accumulators of each thread, (warps, 32, N / 2), as (warps, 16, N) in fp32."""
    warps = len(registers)
    values = registers.view(np.float32).reshape(warps, 8, 4, -1, 2, 2)  # row, column, block, below, element
    return values.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, -1)


def _scattered(sums: Array) -> Array:
    """The inverse of `_sums`: (warps, 32, N / 2) registers."""
    warps = len(sums)
    values = sums.astype(np.float32).reshape(warps, 2, 8, -1, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    return np.ascontiguousarray(values).reshape(warps, 32, -1).view(np.uint32)


def _gathered(g: Grid, items: list[Any]) -> Array:
    """Registers side by side: (warps, 32, how many)."""
    values = [g.registers[item.number] if isinstance(item, Register) else np.full(g.size, item.bits) for item in items]
    return np.stack(values, 1).astype(np.uint32).reshape(-1, 32, len(items))


def _kind(i: Instruction) -> str:
    kind = i.parts[-2]
    if i.parts[-1] not in ("f32", kind) or kind not in ("f16", "bf16", "tf32"):
        raise NotImplementedError(i.opcode)
    return kind


def _mma(i: Instruction) -> Step:
    to, a, b, c = (list(operand.items) for operand in i.operands)
    shape = re.search(r"m16n8k(\d+)", i.opcode)
    kind = _kind(i)
    if shape is None or int(shape[1]) != (8 if kind == "tf32" else 16) or ".row.col.f32." not in i.opcode:
        raise NotImplementedError(i.opcode)

    def run(g: Grid, active: Array | None) -> None:
        warps = whole_warps(g, active, i)
        if g.profile is not None:
            g.profile.products += int(warps.sum()) * 16 * 8 * int(shape[1])
        product = _fragment_a(_gathered(g, a), kind) @ _fragment_b(_gathered(g, b), kind)
        result = _scattered(product + _sums(_gathered(g, c))).reshape(g.size, -1)
        for place, item in enumerate(to):
            g.write(item.number, np.ascontiguousarray(result[:, place]), active)

    return run


def swizzled(at: Array, row: int) -> Array:
    """Addresses as rows of 128, 64 or 32 bytes are scattered over the banks; 0 for none."""
    return at if row == 0 else at ^ (((at >> 7) & (row // 16 - 1)) << 4)


def _operand(g: Grid, descriptor: Array, groups: Array, rows: int, depth: int, kind: str, along_rows: bool) -> Array:
    """A matrix in shared memory that a `wgmma` descriptor names: (groups of four warps, rows, depth) in fp32.

    Args:
        g: the grid.
        descriptor: of each group.
        groups: which of them run.
        rows: M or N.
        depth: K.
        kind: of the elements.
        along_rows: whether the elements of a column lie side by side, and not those of a row.
    """
    item = 4 if kind == "tf32" else 2
    start, leading, stride = (
        ((descriptor >> np.uint64(at)) & np.uint64(0x3FFF)).astype(np.int64) * 16 for at in (0, 16, 32)
    )
    layout = (descriptor[groups] >> np.uint64(62)).astype(int)
    if (layout != layout[0]).any() or ((descriptor[groups] >> np.uint64(49)) & np.uint64(7)).any():
        raise Fault("descriptors of more than one layout, or with a base offset")
    width = {0: 0, 1: 128, 2: 64, 3: 32}[int(layout[0])]
    if width == 0:
        raise NotImplementedError("operands that are not swizzled")
    r, k = np.arange(rows)[None, :, None], np.arange(depth)[None, None, :]
    start, leading, stride = (v[:, None, None] for v in (start, leading, stride))
    if along_rows:
        per = width // item
        at = start + r // per * leading + k // 8 * stride + k % 8 * width + r % per * item
    else:
        at = start + r // 8 * stride + r % 8 * width + k * item
    at = swizzled(at, width)
    if (at[groups].max() + item) > g.limit:
        raise Fault("a matrix operand outside of shared memory")
    program = g.program.reshape(-1, 128)[:, 0]
    places = np.where(groups[:, None, None], program[:, None, None] * g.stride + at, 0)
    unfenced = g.unfenced[places[groups]]
    if (unfenced == STORED).any():
        raise Fault("a matrix instruction reads shared memory that was not fenced for it")
    if unfenced.any():  # no fault that anybody has seen: Triton had no fence there before 3.7
        g.notes.add("wgmma reads cp.async copies without a fence")
    if kind == "tf32":
        return _decoded(g.shared.view(np.uint32)[places // 4], kind)
    return floats(g.shared.view(np.uint16)[places // 2], kind)


def _wgmma(i: Instruction) -> Step:
    shape = re.search(r"m64n(\d+)k(\d+)", i.opcode)
    kind = _kind(i)
    if shape is None or ".f32." not in i.opcode:
        raise NotImplementedError(i.opcode)
    n, depth = int(shape[1]), int(shape[2])
    to, a, b, keep, *flags = i.operands
    scales = [flag.bits for flag in flags]
    transposed = [bit == 1 for bit in scales[2:]] + [False, False]
    if scales[:2] != [1, 1]:
        raise NotImplementedError("negated operands")
    slots = [item.number for item in to.items]
    second = source(b, "b64")
    kept = source(keep, "pred") if not isinstance(keep, Number) else (lambda g: np.full(g.size, bool(keep.bits)))
    from_registers = isinstance(a, Vector)
    first = None if from_registers else source(a, "b64")
    b_along = transposed[0] if from_registers else transposed[1]

    def group(g: Grid, value: Array) -> Array:
        """What all threads of a group agree on."""
        return value.reshape(-1, 128)[:, 0]

    def run(g: Grid, active: Array | None) -> None:
        everybody = active_of(g, active)
        whole = everybody.reshape(-1, 128)
        if (whole.any(1) != whole.all(1)).any():
            raise Fault("a part of four warps runs wgmma")
        if g.profile is not None:
            groups = int(whole[:, 0].sum())
            g.profile.products += groups * 64 * n * depth
            lines = (n + (0 if from_registers else 64)) * depth * (4 if kind == "tf32" else 2) // 128
            g.profile.wavefronts += groups * lines
            g.profile.ideal += groups * lines
        descriptors = [None if first is None else group(g, first(g)), group(g, second(g))]
        adds = group(g, kept(g))

        def product(groups: Array) -> Array:
            left = (  # registers are read while the instruction is under way, as shared memory is
                _fragment_a(_gathered(g, list(a.items)), kind).reshape(-1, 64, depth)
                if from_registers
                else _operand(g, descriptors[0], groups, 64, depth, kind, transposed[0])
            )
            right = _operand(g, descriptors[1], groups, n, depth, kind, b_along)
            return left @ right.transpose(0, 2, 1)

        def results(threads: Array, values: list[Array]) -> Array:
            sums = _sums(np.stack(values, 1).reshape(-1, 32, len(slots))).reshape(-1, 64, n)
            sums = np.where(adds[:, None, None], sums, np.float32(0)) + product(threads.reshape(-1, 128)[:, 0])
            return _scattered(sums.reshape(-1, 16, n)).reshape(g.size, -1)

        if not g.late_products:
            new = results(everybody, [g.registers[slot] for slot in slots])
            for place, slot in enumerate(slots):
                g.write(slot, np.ascontiguousarray(new[:, place]), active)
            g.products.start(everybody, lambda _: None)
            return
        depart(g, slots, everybody)

        def land(threads: Array) -> None:
            new = results(threads, [g.shadows[slot][0] for slot in slots])
            arrive(g, slots, threads, new)

        g.products.start(everybody, land)

    return run


def depart(g: Grid, slots: list[int], threads: Array) -> None:
    """Accumulators go where nobody sees them until the instructions that add to them are waited for."""
    none = np.zeros(g.size, int)
    counted: dict[int, tuple[Array, Array]] = {}  # most accumulators of an instruction share a count
    for slot in slots:
        value, count = g.shadows.get(slot, (g.registers[slot], none))
        if id(count) not in counted:
            counted[id(count)] = threads & (count == 0), count + threads
        fresh, more = counted[id(count)]
        g.shadows[slot] = np.where(fresh, g.registers[slot], value), more
        g.write(slot, np.where(threads, np.uint32(0xFFFFFFFF), g.registers[slot]), None)


def arrive(g: Grid, slots: list[int], threads: Array, new: Array) -> None:
    """One instruction's sums are there, a column a slot; the registers are, once no other instruction adds to them."""
    counted: dict[int, tuple[Array, Array]] = {}
    for place, slot in enumerate(slots):
        value, count = g.shadows[slot]
        if id(count) not in counted:
            less = count - threads
            counted[id(count)] = less, threads & (less == 0)
        less, landed = counted[id(count)]
        value = np.where(threads, new[:, place], value)
        g.shadows[slot] = value, less
        g.write(slot, np.where(landed, value, g.registers[slot]), None)


def _nothing(i: Instruction) -> Step:
    return lambda g, active: None


_COMMIT, _WAIT = groups_of("products")
BUILDERS: dict[str, Builder] = {
    "mma.sync": _mma,
    "wgmma.mma_async": _wgmma,
    "wgmma.commit_group": _COMMIT,
    "wgmma.wait_group": _WAIT,
    "wgmma.fence": _nothing,
}
