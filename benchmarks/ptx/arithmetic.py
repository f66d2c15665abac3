"""Arithmetic and logic, a thread at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .grid import Array
from .operands import KINDS, Step, bf16, floats, result
from .parse import Instruction

_WIDER = {16: 32, 32: 64}


def _divide(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient towards zero and remainder; of zero anything."""
    b = np.where(b == 0, np.ones_like(b), b)
    quotient = np.abs(a) // np.abs(b) * (np.sign(a) * np.sign(b)).astype(a.dtype)
    return quotient.astype(a.dtype), (a - quotient * b).astype(a.dtype)


def _shift(left: bool) -> Callable[[Array, Array], Array]:
    def shift(a: Array, by: Array) -> Array:
        bits = 8 * a.dtype.itemsize
        near = np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
        value = a << near if left else a >> near
        gone = np.zeros_like(a) if left or a.dtype.kind == "u" else a >> a.dtype.type(bits - 1)
        return np.where(by >= bits, gone, value)

    return shift


def _maximum(kind: str, nan: bool, pair: bool) -> Callable[[Array, Array], Array]:
    function = np.maximum if nan else np.fmax
    if kind == "f32":
        return function

    def narrow(a: Array, b: Array) -> Array:
        a, b = (v.view(np.uint16).reshape(-1, 2) if pair else v.view(np.uint16) for v in np.broadcast_arrays(a, b))
        values = function(floats(a, kind), floats(b, kind))
        bits = bf16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)
        return np.ascontiguousarray(bits).view(np.uint32)[:, 0] if pair else bits

    return narrow


def _bfe(a: Array, start: Array, length: Array) -> Array:
    wide = a.astype(np.int64) >> start.astype(np.int64)
    mask = (np.int64(1) << np.minimum(length, 32).astype(np.int64)) - 1
    value = wide & mask
    if a.dtype.kind == "i":
        sign = np.int64(1) << np.maximum(length.astype(np.int64) - 1, 0)
        value = (value ^ sign) - sign
    return value.astype(a.dtype)


def _wide(function: Callable[..., Array]) -> Callable[[Instruction], Step]:
    def build(i: Instruction) -> Step:
        kind = i.parts[2]
        wide = f"{kind[0]}{_WIDER[int(kind[1:])]}"
        rest = [wide] * (len(i.operands) - 3)
        return result(
            lambda a, b, *c: function(a.astype(KINDS[wide]), b.astype(KINDS[wide]), *c), [kind, kind, *rest], i
        )

    return build


def _high(i: Instruction) -> Step:
    kind = i.parts[2]
    bits = int(kind[1:])
    wide, narrow = KINDS[f"{kind[0]}{_WIDER[bits]}"], KINDS[kind]
    return result(lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(narrow), [kind] * 2, i)


def _fma(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


_MODIFIERS = {"lo", "rn", "ftz", "approx", "full"}


def _same(function: Callable[..., Array], *kinds: str | None) -> Callable[[Instruction], Step]:
    """All sources of the opcode's type, or of those given where not None; the type may be a pair of fp32."""

    def build(i: Instruction) -> Step:
        *modifiers, kind = i.parts[1:]
        if not _MODIFIERS.issuperset(modifiers):
            raise NotImplementedError(i.text)
        count = len(i.operands) - 1
        if kind == "f32x2":
            return result(lambda *pairs: _of_pairs(function, pairs), ["b64"] * count, i)
        return result(function, [kind if k is None else k for k in kinds or (None,) * count], i)

    return build


def _of_pairs(function: Callable[..., Array], pairs: tuple[Array, ...]) -> Array:
    return function(*(pair.view(np.float32) for pair in pairs)).view(np.uint64)


def _add(i: Instruction) -> Step:
    """An addition; fp32 may be added to a narrow number."""
    if i.parts[-2] != "f32":
        return _same(lambda a, b: a + b)(i)
    narrow = i.parts[-1]

    def add(a: Array, c: Array) -> Array:
        return (a.astype(np.float32) if narrow == "f16" else floats(a, narrow)) + c

    return result(add, [narrow, "f32"], i)


def _max(i: Instruction) -> Step:
    kind = i.parts[-1]
    if kind[0] in "us":
        return result(np.maximum, [kind] * 2, i)
    if len(i.operands) == 4:  # of three numbers, on chips of capability 10.0 and up
        function = _maximum(kind, "NaN" in i.parts, pair=False)
        return result(lambda a, b, c: function(function(a, b), c), [kind] * 3, i)
    pair = kind.endswith("x2")
    read = {"f32": "f32", "f16x2": "b32", "bf16x2": "b32"}.get(kind, "b16")
    return result(_maximum(kind.removesuffix("x2"), "NaN" in i.parts, pair), [read] * 2, i)


BUILDERS: dict[str, Callable[[Instruction], Step]] = {
    "add": _add,
    "sub": _same(lambda a, b: a - b),
    "mul": _same(lambda a, b: a * b),
    "mul.hi": _high,
    "mul.wide": _wide(lambda a, b: a * b),
    "mad.lo": _same(lambda a, b, c: a * b + c),
    "mad.wide": _wide(lambda a, b, c: a * b + c),
    "fma": _same(_fma),
    "div": _same(lambda a, b: a / b if a.dtype.kind == "f" else _divide(a, b)[0]),
    "rem": _same(lambda a, b: _divide(a, b)[1]),
    "sqrt": _same(np.sqrt),
    "rsqrt": _same(lambda a: 1 / np.sqrt(a)),
    "rcp": _same(lambda a: 1 / a),
    "min": _same(np.minimum),
    "max": _max,
    "abs": _same(np.abs),
    "neg": _same(lambda a: -a),
    "not": _same(lambda a: ~a),
    "and": _same(lambda a, b: a & b),
    "or": _same(lambda a, b: a | b),
    "xor": _same(lambda a, b: a ^ b),
    "shl": _same(_shift(left=True), None, "u32"),
    "shr": _same(_shift(left=False), None, "u32"),
    "bfe": _same(_bfe, None, "u32", "u32"),
}
