"""Compile a kernel launch for any NVIDIA chip on a machine that has none.

The launcher itself is run, on `meta` tensors, with Triton's driver replaced by one that only names a target: so the
constexprs, the argument types and the alignment are those of the real launch, not a copy of them that could drift.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Chip:
    """What the limits need of a chip: shared memory of a program and of a multiprocessor in bytes, threads, units.

    Source: NVIDIA's CUDA programming guide, table of technical specifications per compute capability.
    """

    capability: int
    shared_limit: int
    shared_total: int
    threads: int
    multiprocessors: int
    matrix: str  # the instruction that multiplies matrices in SASS


CHIPS = {
    chip.capability: chip
    for chip in (
        Chip(80, 163 << 10, 164 << 10, 2048, 108, "HMMA"),
        Chip(86, 99 << 10, 100 << 10, 1536, 84, "HMMA"),
        Chip(89, 99 << 10, 100 << 10, 1536, 128, "HMMA"),
        Chip(90, 227 << 10, 228 << 10, 2048, 132, "HGMMA"),
        Chip(100, 227 << 10, 228 << 10, 2048, 148, "UTC[A-Z]*MMA"),
        Chip(120, 99 << 10, 100 << 10, 1536, 170, "HMMA"),
    )
}


class _Target:
    """Stands in for Triton's CUDA driver: it has a target, and nothing can be launched on it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps one set of compiled kernels a device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Within this context a kernel launch compiles for the chip and runs nothing; yields (name, compiled kernel)."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    before = driver._active
    JITFunction.run = warm_up
    driver.set_active(_Target(capability))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = before


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _said(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_tool(tool), *options, file.name], capture_output=True, text=True)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{tool} cannot read the compiled kernel: {done.stderr}")
    return done.stdout


@functools.lru_cache(maxsize=8)
def disassembled(cubin: bytes) -> str:
    """The SASS of a compiled kernel; half a second, of which most is the tool's own start."""
    return _said(cubin, "nvdisasm", "-c", "--no-dataflow")


def one_by_one(sass: str) -> bool:
    """Whether every HGMMA is waited for before the next one.

    The assembler makes it so where accumulators or operands are touched while one is under way ("wgmma.mma_async
    instructions are serialized", it says); else several of them share a wait.
    """
    found = re.findall(r"\b(HGMMA)\S* .*?(gsb0)? ;|\b(WARPGROUP\.DEPBAR\.LE) gsb0, 0x0", sass)
    order = "".join("w" if wait else "g" if group else "m" for _, group, wait in found)
    return order.count("g") + order.count("m") > 0 and order.count("gw") == order.count("g") + order.count("m")


def inspect(kernel: Any, chip: Chip) -> dict[str, int | bool | str]:
    """Resources and instructions of a compiled kernel, from the wheel's `cuobjdump` and `nvdisasm`.

    `registers` a thread, `stack` bytes, `local` LDL and STL instructions, `shared` bytes, `resident` programs that fit
    a multiprocessor, `matrix` instructions of the chip's kind and the `instruction` that most of them are,
    `serialized` whether each waits for the one before it, `async_loads` LDGSTS and how many of them are 128-bit,
    `plain_loads` LDG, `tma_loads` UTMALDG, `max_nan` whether the ReLU keeps NaN.
    """
    cubin = kernel.asm["cubin"]
    usage, sass = _said(cubin, "cuobjdump", "--dump-resource-usage"), disassembled(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cannot read the compiled kernel: {usage}")
    registers, stack = int(found[1]), int(found[2])
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", sass, re.MULTILINE))

    def count(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))

    threads, shared = 32 * kernel.metadata.num_warps, kernel.metadata.shared
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    by_shared = chip.shared_total // (shared + 1024)
    return {
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "registers": registers,
        "stack": stack,
        "local": count(r"LDL|STL"),
        "shared": shared,
        "resident": min(by_registers, by_shared, chip.threads // threads),
        "matrix": count(chip.matrix),
        "instruction": max((o for o in opcodes if re.match(chip.matrix, o)), key=lambda o: opcodes[o], default=""),
        "serialized": one_by_one(sass),
        "async_loads": count("LDGSTS"),
        "async_128": count(r"LDGSTS\S*\.128"),
        "plain_loads": count(r"LDG\b"),
        "tma_loads": count("UTMALDG"),
        "max_nan": bool(re.search(r"max\.NaN", kernel.asm["ptx"])),
    }
