"""The `doctor` command: what this machine has, which backends it can use, and which will be taken."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from dataclasses import replace
from importlib.util import find_spec

import torch

from . import backends, machine
from .backends import tuned
from .kernels.gpu import gpu_of
from .table import error_line, format_table
from .version import __version__

_PACKAGES = ("triton", "torchvision", "timm", "numpy")
#: those with code of their own for one torch, or built on such
_IMPORTED = ("torchvision", "timm")
_VARIABLES = (
    "FUSED_RESBLOCK_BACKEND",
    "FUSED_RESBLOCK_CONFIG_DIR",
    "FUSED_RESBLOCK_PDL",
    "TRITON_INTERPRET",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
)
#: allocators that keep freed memory by themselves
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


def _versions() -> str:
    rows = [["python", platform.python_version()], ["torch", torch.__version__]]
    rows += [[name, machine.version_of(name) or "not installed"] for name in _PACKAGES]
    rows.append(["CUDA of torch", torch.version.cuda or "none: a CPU build"])
    return format_table(["package", "version"], [["fused_resblock", __version__], *rows])


def _hardware() -> str:
    features = " ".join(machine.cpu_features()) or "no known vector instructions"
    rows = [["CPU", machine.cpu_name()], ["", features], ["", f"{torch.get_num_threads()} threads"]]
    if not torch.cuda.is_available():
        rows.append(["GPU", "torch sees no CUDA device"])
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
        rows.append([f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {size}"])
        if f"sm_{gpu.major}{gpu.minor}" not in torch.cuda.get_arch_list():
            rows.append(["", f"this torch has no code of its own for sm_{gpu.major}{gpu.minor}"])
    if torch.cuda.is_available():
        rows.append(["driver", machine.driver_version() or "unknown: nvidia-smi does not answer"])
    return format_table(["hardware", "what was found"], rows)


def _backends() -> str:
    rows = []
    for name, backend in backends.BACKENDS.items():
        reason = backend.unavailable()
        rows.append([name, "yes" if reason is None else "no", reason or ""])
    return format_table(["backend", "usable", "why not"], rows)


def _tuned() -> str:
    """The tables of measured winners."""
    rows = [
        [table.name, f"sm_{table.gpu.capability}", len(table.convolutions), "yes" if here else "no: not of a GPU here"]
        for table, here in tuned.known()
    ]
    return format_table(["tuned tiles of", "chip", "convolutions", "used"], rows or [["none: predicted", "", "", ""]])


def _choices(backend: str) -> str:
    """What runs a 3x3 convolution of each device and dtype, and one in groups where that is something else."""
    rows = []
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            capability = gpu_of(torch.device(device)).capability
            dense = backends.Problem(
                device, dtype, channels=128, out_channels=128, kernel=(3, 3), capability=capability
            )
            choice = backends.resolve(backend, dense)
            grouped = backends.resolve(backend, replace(dense, groups=32))
            name = str(dtype).removeprefix("torch.")
            rows.append([device, name, choice.backend, choice.reason])
            if grouped != choice:
                rows.append([device, f"{name}, in groups", grouped.backend, grouped.reason])
    if "cuda" not in devices:
        rows.append(["cuda", "any", "-", "torch sees no CUDA device"])
    return format_table(["tensors", "dtype", "backend", "why"], rows)


def hints() -> list[str]:
    """Advice that depends on this machine: settings outside of this package that change the speed.

    glibc maps every allocation of more than 32 MB anew and gives it back when it is freed, so that each activation of a
    large batch is faulted in page by page: 200,000 faults a forward of eager ResNet-50, batch 16, fp32. Without them it
    took 476 ms instead of 701 (two cores of an AMD EPYC, AVX512), in bf16 235 instead of 299.
    """
    advice = []
    allocator = os.environ.get("LD_PRELOAD", "")
    if (
        platform.libc_ver()[0] == "glibc"
        and not any(name.startswith("MALLOC_") for name in os.environ)
        and not any(name in allocator for name in _OTHER_ALLOCATORS)
    ):
        advice.append(
            "large batches on the CPU: glibc gives every activation of more than 32 MB back to the system and faults "
            "it in again. MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 in the environment keeps the memory; eager "
            "ResNet-50 at batch 16 became 1.3 to 1.5 times as fast by it"
        )
    return advice


def _problems() -> list[str]:
    """What is set or installed here and does not work."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned.known()
    found += [str(warning.message) for warning in caught]
    for package in _IMPORTED:
        try:
            if find_spec(package) is not None:
                importlib.import_module(package)
        except Exception as error:  # whatever a package raises that does not fit this torch
            found.append(f"{package} must fit torch {torch.__version__}, got {error_line(error)}")
    return found


def run() -> int:
    """Print the report.

    Returns:
        0, or 1 if anything that is set or installed does not work.
    """
    variables = [[name, os.environ.get(name, "not set")] for name in _VARIABLES]
    print(_versions(), _hardware(), _backends(), format_table(["variable", "value"], variables), sep="\n\n")
    try:
        backend = backends.check_name("auto")
    except (ValueError, RuntimeError) as error:
        print(f"\nPROBLEM: {error}")
        return 1
    problems = _problems()
    print(f"\n{_choices(backend)}\n\n{_tuned()}")
    for hint in hints():
        print(f"\nHint: {hint}.")
    for problem in problems:
        print(f"\nPROBLEM: {problem}")
    return 1 if problems else 0
