"""Triton's driver with nothing behind it but numpy: a launch on CPU tensors compiles for a chip and runs its PTX."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..offline import disassembled, one_by_one
from .dependent import SETTLED
from .grid import Descriptor, Fault, GlobalMemory
from .parse import parse
from .profile import Profile
from .run import Compiled, launch

_DESCRIPTORS = 0x5C000000  # where tensor maps are taken to lie: parameters have 32-bit addresses
_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, None, 0, 0, 1024


class _Memory:
    """The tensors of a launch in device memory."""

    def __init__(self) -> None:
        self.memory = GlobalMemory()
        self._storages: dict[int, tuple[Tensor, int]] = {}

    def address(self, t: Tensor, settled: bool) -> int:
        """Where the tensor begins; its whole storage is copied in."""
        storage = t.untyped_storage()
        key = storage.data_ptr()
        if key not in self._storages:
            content = torch.tensor([], dtype=torch.uint8).set_(storage)
            self._storages[key] = content, self.memory.add(content.numpy(), key % 16, settled)
        return self._storages[key][1] + t.data_ptr() - key

    def copy_back(self) -> None:
        """What the launch wrote."""
        for content, address in self._storages.values():
            content.copy_(torch.from_numpy(self.memory.read_back(address, content.numel()).copy()))


class Driver:
    """Stands in for Triton's CUDA driver.

    Args:
        capability: of the chip, 90 for 9.0.
        late, apart: see `Grid`.
        profiling: whether to count what launches issue and move.
    """

    def __init__(self, capability: int, late: bool, profiling: bool = False, apart: bool = False) -> None:
        self.capability, self.late, self.apart = capability, late, apart
        self.profiling, self.utils = profiling, _Utils()
        self.launched: list[tuple[str, Any]] = []  # names and compiled kernels
        self.profiles: list[Profile] = []  # of the launches, where they are wanted
        self.notes: set[str] = set()

    def get_current_target(self) -> GPUTarget:
        """The chip."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Triton keeps one set of compiled kernels a device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """What is called with a compiled kernel's grid and arguments."""
        signature = src.signature

        def run(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            self._run(self._kernel, (x, y, z), signature, rest[-len(signature) :], metadata)

        return run

    _kernel: Any = None  # that is launched: the launcher is not told

    def _run(
        self, kernel: Any, grid: Sequence[int], signature: dict[str, str], args: Sequence[Any], metadata: Any
    ) -> None:
        text = kernel.asm["ptx"]
        (compiled, serialized), memory = _compiled(text, kernel.asm["cubin"]), _Memory()
        parameters: dict[str, Any] = {"descriptors": {}}
        values = _values(signature, args, metadata, memory, parameters["descriptors"])
        for name, _ in compiled.kernel.parameters:
            parameters[name] = next(values, 0)  # the last two are scratch memory, which is not used
        memory.memory.seal()
        self.launched.append((compiled.kernel.name, kernel))
        profile = Profile() if self.profiling else None
        early = metadata.launch_pdl
        options = {"late": self.late, "apart": self.apart, "serialized": serialized, "early": early}
        options |= {"notes": self.notes, "profile": profile}
        if early and "griddepcontrol.wait" not in text:
            raise Fault(f"{compiled.kernel.name} is started early and never waits")
        launch(compiled, grid, 32 * metadata.num_warps, parameters, memory.memory, metadata.shared, **options)
        self.profiles += [] if profile is None else [profile]
        memory.copy_back()


@functools.lru_cache(maxsize=8)
def _compiled(text: str, cubin: bytes) -> tuple[Compiled, bool]:
    """A kernel's PTX as functions, which hold nothing of a launch, and whether the assembler serializes it."""
    return Compiled(parse(text)), "wgmma" in text and one_by_one(disassembled(cubin))


def _values(
    signature: dict[str, str], args: Sequence[Any], metadata: Any, memory: _Memory, descriptors: dict[int, Descriptor]
) -> Iterator[int]:
    """The values of the kernel's parameters in order, as bits."""
    metas = iter(getattr(metadata, "tensordesc_meta", None) or ())
    for (name, kind), value in zip(signature.items(), args, strict=True):
        settled = name.startswith(SETTLED)
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            yield 0 if value is None else memory.address(value, settled)
        elif kind.startswith("tensordesc"):
            key = _DESCRIPTORS + 128 * len(descriptors)
            descriptors[key] = _descriptor(value, next(metas), memory, settled)
            yield key
            yield from value.shape
            yield from value.strides
        elif kind == "fp32":
            yield int(np.float32(value).view(np.uint32))
        else:
            yield int(value)


def _descriptor(value: Any, meta: dict[str, Any], memory: _Memory, settled: bool) -> Descriptor:
    itemsize = value.base.element_size()
    if value.base.data_ptr() % 16 or any(itemsize * stride % 16 for stride in value.strides[:-1]):
        raise Fault("a tensor map whose address or strides are no multiples of 16 bytes")
    return Descriptor(
        memory.address(value.base, settled),
        list(value.shape)[::-1],
        [itemsize * stride for stride in value.strides][::-1],
        list(meta["block_size"])[::-1],
        itemsize,
        _SWIZZLES[meta["swizzle"]],
    )


@contextmanager
def emulated(capability: int, late: bool, profiling: bool = False, apart: bool = False) -> Iterator[Driver]:
    """Within this context kernels are launched on CPU tensors."""
    from triton.runtime.jit import JITFunction

    active, run = Driver(capability, late, profiling, apart), JITFunction.run

    def compile_and_run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        active._kernel = compiled
        return run(self, *args, grid=grid, warmup=warmup, **options)

    before = driver._active
    JITFunction.run = compile_and_run
    driver.set_active(active)
    try:
        yield active
    finally:
        JITFunction.run = run
        driver._active = before
