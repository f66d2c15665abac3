"""Memory of a network on the CPU, eager or fused, in a process of its own: `python -m benchmarks.memory -h`."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

MIB = 2**20
_ROOT = Path(__file__).parent.parent


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MiB.

    Not `resource.getrusage`: Linux hands the parent's peak on to a child that is started by fork and exec, and so the
    peak of a small process that a large one starts would be that of the large one (`setmax_mm_hiwater_rss` in
    fs/exec.c).
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status must have {field}, got none")


def measure_here(network: str, provider: str, dtype: str, batch: int, size: int, forwards: int) -> dict[str, float]:
    """Build the network in `dtype`, fuse it in place or not, run it, and say what that took; see `results.Row`.

    Values do not matter here: the weights are those of a fresh network, made in `dtype` at once so that no wider copy
    counts towards the peak.
    """
    import torch

    import fused_resblock as frb

    imports = resident_mib("VmRSS")
    torch.set_default_dtype(getattr(torch, dtype))
    model = frb.models.build(network).eval()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if provider == "fused":
        frb.fuse(model, inplace=True)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(forwards):
            model(x)
    state = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    opaque = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.is_mkldnn)
    packed = sum(torch.ops.mkldnn._nbytes(tensor) for tensor in opaque)
    return {
        "state_mib": state / MIB,
        "packed_mib": packed / MIB,
        "imports_mib": imports,
        "peak_rss_mib": resident_mib("VmHWM"),
    }


def measure(network: str, provider: str, dtype: str, batch: int, size: int, forwards: int, threads: int) -> dict:
    """Run `measure_here` in a new process.

    Raises:
        RuntimeError: if the process fails.
    """
    options = [network, provider, dtype, *map(str, (batch, size, forwards, threads))]
    command = [sys.executable, "-m", "benchmarks.memory", *options]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        raise RuntimeError(f"{' '.join(options)} must run, got exit code {done.returncode}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure as the arguments say and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("network", "provider", "dtype"):
        parser.add_argument(name)
    for name in ("batch", "size", "forwards", "threads"):
        parser.add_argument(name, type=int)
    args = vars(parser.parse_args())

    import torch

    torch.set_num_threads(args.pop("threads"))
    print(json.dumps(measure_here(**args)))


if __name__ == "__main__":
    main()
