"""From the text of a PTX kernel to a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Register(NamedTuple):
    """A register by its number among all of the kernel's."""

    number: int


class Number(NamedTuple):
    """An immediate as its bits, or a negative integer."""

    bits: int


class Symbol(NamedTuple):
    """Shared memory, a parameter or a special register, plus bytes."""

    name: str
    offset: int = 0


class Address(NamedTuple):
    """`[base + offset]`, or `[base, {coordinates}]` of a tensor."""

    base: Register | Symbol
    offset: int = 0
    coordinates: tuple[Register | Number, ...] = ()


class Vector(NamedTuple):
    """`{a, b, ...}`; None where the text has `_`."""

    items: tuple[Register | Number | None, ...]


Operand = Register | Number | Symbol | Address | Vector | str | None


@dataclass
class Instruction:
    """One instruction: its opcode's parts, its operands, and the predicate that it runs under."""

    text: str
    opcode: str
    operands: list[Operand]
    predicate: Register | None = None
    negated: bool = False

    @property
    def parts(self) -> list[str]:
        """The opcode between its dots."""
        return self.opcode.split(".")


@dataclass
class Kernel:
    """A kernel: instructions, where labels lead, parameters, and the widths of registers in bits (1: a predicate)."""

    name: str = ""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parameters: list[tuple[str, str]] = field(default_factory=list)  # name and type: "u32", "u64", "b8[128]"
    widths: list[int] = field(default_factory=list)


_WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+) (?:\.ptr \.\w+ )?(?:\.align \d+ )?(\w+)(\[\d+\])?")
_SPECIAL = re.compile(r"%(tid|ctaid|nctaid|ntid)\.[xyz]$|%laneid$|%clusterid\.x$|%cluster_ctarank$")


class _Parser:
    def __init__(self) -> None:
        self.kernel = Kernel()
        self._registers: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}
        self._local_labels: dict[str, str] = {}

    def declare(self, width: int, names: str) -> None:
        for name in (part.strip() for part in names.split(",")):
            ranged = re.fullmatch(r"(%\w+?)<\d+>", name)
            if ranged:
                self._prefixes[ranged[1]] = width
            else:
                self._registers[name] = self._new(width)

    def _new(self, width: int) -> int:
        self.kernel.widths.append(width)
        return len(self.kernel.widths) - 1

    def label(self, name: str) -> None:
        if not name.startswith("$"):  # of a scope: the next one may have the same
            self._local_labels[name] = f"{name}@{len(self.kernel.instructions)}"
            name = self._local_labels[name]
        self.kernel.labels[name] = len(self.kernel.instructions)

    def register(self, name: str) -> Register | None:
        if name not in self._registers:
            prefix = re.match(r"%[a-z]+", name)
            if prefix is None or prefix[0] not in self._prefixes:
                return None
            self._registers[name] = self._new(self._prefixes[prefix[0]])
        return Register(self._registers[name])

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return None
        if text.startswith("{"):
            return Vector(tuple(self.operand(item) for item in split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1])
        if "|" in text:
            return Vector(tuple(self.operand(item) for item in text.split("|")))
        return self.register(text) or self._constant(text)

    def _constant(self, text: str) -> Operand:
        floating = re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text)
        if floating:
            return Number(int(floating[1], 16))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return Number(int(text.rstrip("U"), 0))
        if _SPECIAL.match(text):
            return Symbol(text)
        name, _, offset = text.partition("+")
        if re.fullmatch(r"[\w$]+", name.strip()):
            return Symbol(self._local_labels.get(name, name).strip(), int(offset or 0))
        raise NotImplementedError(f"operand {text}")

    def _address(self, text: str) -> Address:
        base, *coordinates = split(text)
        base, _, offset = base.partition("+")
        found = self.operand(base)
        assert isinstance(found, Register | Symbol), text
        where = self.operand(coordinates[0]).items if coordinates else ()
        return Address(found, int(offset or 0), where)

    def instruction(self, text: str) -> None:
        predicate, negated, rest = None, False, text
        guard = re.match(r"@(!?)(\S+)\s+", text)
        if guard:
            predicate, negated, rest = self.register(guard[2]), guard[1] == "!", text[guard.end() :]
        opcode, _, operands = rest.replace("\t", " ").partition(" ")
        self.kernel.instructions.append(
            Instruction(text, opcode, [self.operand(part) for part in split(operands)], predicate, negated)
        )


def split(text: str) -> list[str]:
    """The parts between commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]] if text.strip() else []


def parse(text: str) -> Kernel:
    """The one kernel of a PTX module."""
    parser = _Parser()
    text = re.sub(r"//[^\n]*", "", text)
    _, _, rest = text.partition(".entry")
    name, _, rest = rest.partition("(")
    parser.kernel.name = name.strip()
    parameters, _, body = rest.partition(")")
    parser.kernel.parameters = [(m[2], m[1] + (m[3] or "")) for m in _PARAMETER.finditer(parameters)]
    body = re.split(r"\$L__func_end|\n\s*\.(?:file|section)\b", body[body.index("{") + 1 :], maxsplit=1)[0]
    for statement in re.split(r"[;\n]", _joined(body)):
        statement = statement.strip()
        while statement.startswith(("{", "}")) and not statement.startswith("{%"):
            statement = statement[1:].strip()
        label = re.match(r"([$\w]+):\s*", statement)
        if label:
            parser.label(label[1])
            statement = statement[label.end() :]
        declaration = re.match(r"\.reg \.(\w+)\s+(.*)", statement)
        if declaration:
            parser.declare(_WIDTHS[declaration[1]], declaration[2])
        elif statement and not statement.startswith("."):
            parser.instruction(statement)
    return parser.kernel


def _joined(body: str) -> str:
    """The body with the braces of scopes alone on their lines, so that only instructions hold braces."""
    return re.sub(r"^\s*[{}]\s*$", "", body, flags=re.MULTILINE)
