"""What the program runs on: CPU, GPU and versions, for `doctor` and for the stamp on every measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from .version import __version__

#: CPU instruction sets that matter to convolutions, by their names in /proc/cpuinfo, and what to call them.
_CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX-BF16",
    "amx_fp16": "AMX-FP16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
}


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", maxsplit=1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", maxsplit=1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_name() -> str:
    """The processor's marketing name, or the architecture where the system does not tell it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The vector and matrix instruction sets of the CPU that matter here, such as AVX512-BF16 and AMX-BF16."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for flag, name in _CPU_FEATURES.items() if flag in flags]


def version_of(package: str) -> str | None:
    """The installed version of `package`, found without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_name() -> str | None:
    """The name of the current CUDA device; None if torch sees none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None where `nvidia-smi` does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.split()
    return lines[0] if lines else None


def commit() -> str | None:
    """The commit of the checkout that this package is imported from, with "-dirty" after local changes; else None.

    The environment variable FUSED_RESBLOCK_COMMIT goes first: of a copy whose history is gone, or another one's.
    """
    named = os.environ.get("FUSED_RESBLOCK_COMMIT")
    if named:
        return named
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # an installed copy, perhaps inside somebody else's checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def other_busy_seconds() -> float:
    """Processor time spent by everything but this process since the system started; 0 where it is not known.

    The difference of two readings, over the time between them, is the number of cores that were busy with other work.
    """
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    user, nice, system, _idle, _wait, irq, soft_irq, steal = ticks
    own = os.times()
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def stamp() -> dict[str, object]:
    """Everything that a measurement must name to be repeated: hardware, threads, versions and commit."""
    return {
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "threads": torch.get_num_threads(),
        "gpu": gpu_name(),
        "driver": driver_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version_of("triton"),
        "fused_resblock": __version__,
        "commit": commit(),
        "malloc": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
    }
