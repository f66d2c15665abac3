"""Instructions that move, choose, compare and convert."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .grid import Array, Grid
from .operands import KINDS, Step, bf16, floats, number, result, source
from .parse import Instruction, Vector

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _setp(i: Instruction) -> Step:
    _, how, kind = i.parts
    compare = _COMPARE[how[:2]]
    floating = kind in ("f16", "bf16", "f32")

    def function(a: Array, b: Array) -> Array:
        if kind == "bf16":
            a, b = floats(np.asarray(a), kind), floats(np.asarray(b), kind)
        if not floating:
            return compare(a, b)
        nan = np.isnan(a) | np.isnan(b)
        return (compare(a, b) | nan) if how.endswith("u") else (compare(a, b) & ~nan)

    return result(function, [kind, kind], i)


def _cvt(i: Instruction) -> Step:
    to, *origin = [part for part in i.parts[1:] if part not in ("rn", "rna", "rz", "rzi", "rni", "satfinite", "relu")]
    kind = origin[0]
    if to in ("f16x2", "bf16x2"):

        def pair(high: Array, low: Array) -> Array:
            halves = [bf16(v) if to == "bf16x2" else v.astype(np.float16).view(np.uint16) for v in (low, high)]
            return halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << 16)

        return result(pair, [kind, kind], i)
    if to == "tf32":
        return result(lambda a: (a.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000), [kind], i)
    if to == "bf16":
        return result(bf16, [kind], i)
    if kind == "bf16":
        return result(lambda a: floats(a, "bf16").astype(KINDS[to]), [kind], i)
    width = {"u8": 32, "s8": 32}.get(to)
    return result(lambda a: a.astype(KINDS[to]).astype(f"int{width}" if width else KINDS[to]), [kind], i)


def _mov(i: Instruction) -> Step:
    kind = {"f32": "b32", "f64": "b64", "u16": "b16", "u32": "b32", "u64": "b64"}.get(i.parts[1], i.parts[1])
    to, origin = i.operands
    if isinstance(to, Vector):
        read = source(origin, kind)
        part = int(kind[1:]) // len(to.items)

        def unpack(g: Grid, active: Array | None) -> None:
            value = read(g)
            for place, item in enumerate(to.items):
                if item is not None:
                    piece = (value >> value.dtype.type(place * part)).astype(f"uint{part}")
                    g.write(number(item), np.broadcast_to(piece, g.size), active)

        return unpack
    if isinstance(origin, Vector):
        part = int(kind[1:]) // len(origin.items)
        reads = [source(item, f"b{part}") for item in origin.items]
        dtype = KINDS[kind]

        def pack(g: Grid, active: Array | None) -> None:
            values = [np.asarray(read(g)).astype(dtype) << dtype.type(n * part) for n, read in enumerate(reads)]
            g.write(number(to), sum(values[1:], values[0]), active)

        return pack
    return result(lambda a: a, [kind], i)


def _prmt(a: Array, b: Array, how: Array) -> Array:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << 32)
    result = np.zeros_like(both)
    for place in range(4):
        pick = (how >> np.uint32(4 * place)) & np.uint32(15)
        piece = (both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        piece = np.where(pick & 8, np.where(piece & np.uint64(128), np.uint64(255), np.uint64(0)), piece)
        result |= piece << np.uint64(8 * place)
    return result.astype(np.uint32)


def _selp(i: Instruction) -> Step:
    kind = {"f32": "b32", "u32": "b32", "s32": "b32", "f16": "b16"}.get(i.parts[1], i.parts[1])
    return result(lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"], i)


BUILDERS: dict[str, Callable[[Instruction], Step]] = {
    "selp": _selp,
    "setp": _setp,
    "cvt": _cvt,
    "mov": _mov,
    "cvta": lambda i: result(lambda a: a, ["b64"], i),
    "prmt": lambda i: result(_prmt, ["u32"] * 3, i),
}
