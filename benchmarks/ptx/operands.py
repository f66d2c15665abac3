"""How instructions read their operands and write their results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .grid import SHARED_BASE, Array, Grid
from .parse import Instruction, Number, Operand, Register, Symbol

Step = Callable[[Grid, Array | None], None]
Builder = Callable[[Instruction], Step]
_INTEGERS = {
    f"{kind}{bits}": np.dtype(f"{'u' if kind in 'ub' else ''}int{bits}") for kind in "ubs" for bits in (8, 16, 32, 64)
}
#: PTX's types as numpy's
KINDS = {**_INTEGERS, "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}


def bf16(values: Array) -> Array:
    """fp32 to the bits of bf16, to nearest even; NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def floats(bits: Array, kind: str) -> Array:
    """16-bit values of a kind, "f16" or "bf16", as fp32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def source(operand: Operand, kind: str) -> Callable[[Grid], Array]:
    """How to read an operand as a type of PTX; bf16 comes as its bits."""
    if kind == "pred":
        if isinstance(operand, Register):
            return lambda g: g.registers[operand.number]
        truth = bool(operand.bits)
        return lambda g: np.full(g.size, truth)
    dtype = np.dtype(np.uint16) if kind == "bf16" else KINDS[kind]
    unsigned = np.dtype(f"uint{8 * dtype.itemsize}")
    if isinstance(operand, Register):
        place = operand.number

        def register(g: Grid) -> Array:
            value = g.registers[place]
            return (value if value.dtype.itemsize == dtype.itemsize else value.astype(unsigned)).view(dtype)

        return register
    if isinstance(operand, Number):
        bits = operand.bits & ((1 << 8 * dtype.itemsize) - 1)
        value = np.array(bits, unsigned).view(dtype)[()]
        return lambda g: value
    if isinstance(operand, Symbol):
        return lambda g: symbol(g, operand).astype(unsigned).view(dtype)
    raise NotImplementedError(f"{operand} as {kind}")


def symbol(g: Grid, operand: Symbol) -> Array:
    """The value of a special register, or an address."""
    if operand.name in g.specials:
        return g.specials[operand.name]
    if operand.name == "global_smem":
        return np.full(g.size, SHARED_BASE + operand.offset, np.uint64)
    return np.full(g.size, g.parameters[operand.name] + operand.offset, np.uint64)


def number(operand: Operand) -> int:
    """The number of the register that an operand must be."""
    assert isinstance(operand, Register), operand
    return operand.number


def result(function: Callable[..., Array], kinds: list[str], i: Instruction) -> Step:
    """Sources of these kinds, the function, the first operand as destination."""
    sources = [source(operand, kind) for operand, kind in zip(i.operands[1:], kinds, strict=True)]
    to = number(i.operands[0])

    def run(g: Grid, active: Array | None) -> None:
        g.write(to, function(*(s(g) for s in sources)), active)

    return run
