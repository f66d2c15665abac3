"""The test suite on the GPU, compute-sanitizer, and a CUDA graph: everything in `check` that is not a single tile."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import torch

import fused_resblock as frb
from fused_resblock.demo.inputs import make_model

from .bootstrap import ROOT
from .context import Context
from .device import Broken, error_line, is_broken
from .networks import in_order
from .records import Records

#: test files that run the kernels
SUITE = (
    "test_relu_backward",
    "test_bn_act",
    "test_gradcheck",
    "test_ops",
    "test_recognize",
    "test_select",
    "test_blocks",
    "test_gradients",
    "test_conv_bn_act",
    "test_convert",
    "test_networks",
    "test_transforms",
    "test_compile",
    "test_kept",
    "test_expand_shift",
    "test_stage_kernel",
)
#: seconds for all files, and for compute-sanitizer
SUITE_SECONDS, SANITIZER_SECONDS = 460, 120
#: processes that share the GPU: most of a test's time goes into compiling
PROCESSES = 12


def command_output(
    command: Sequence[str], seconds: float, variables: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a program in the checkout; its exit status, None if it was ended after so many seconds, and what it said."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **(variables or {})}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        said, _ = process.communicate()
        return None, said


def _last_line(text: str) -> str:
    lines = [line.strip("= ") for line in text.strip().splitlines()]
    return lines[-1] if lines else ""


def _record(context: Context, table: Records, case: str, command: Sequence[str], seconds: float, **options) -> None:
    status, said = command_output(command, min(seconds, context.deadline.left()), **options)
    verdict = "timeout" if status is None else "ok" if status == 0 else "failed"
    if verdict != "ok":
        context.keep(f"--- {case}\n{said[-20000:]}")
    kernel, name = case.split(" ", 1)
    table.add(kernel=kernel, dtype="", case=name, tile="", status=verdict, note=_last_line(said))
    context.log(f"check: {case}: {verdict}, {_last_line(said)}")


def check_suite(context: Context, table: Records) -> None:
    """Run the parity tests, in several processes where pytest-xdist is installed."""
    files = [ROOT / "tests" / f"{stem}.py" for stem in (SUITE[:1] if context.quick else SUITE)]
    files = [file for file in files if file.is_file()]
    if table.done("pytest", "", "tests", "") or not files or not context.deadline.allows(20):
        return
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.bootstrap", "-p", "no:cacheprovider", "-q"]
    if not context.quick and importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", str(min(PROCESSES, os.cpu_count() or 1))]
    command += ["--maxfail", "40", "--tb", "short", *map(str, files)]
    _record(context, table, "pytest tests", command, SUITE_SECONDS)


def check_memory(context: Context, table: Records) -> None:
    """Run every kernel once on small shapes under compute-sanitizer's memcheck."""
    if table.done("compute-sanitizer", "", "memcheck", "") or not context.deadline.allows(20):
        return
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        context.log("check: compute-sanitizer is not installed; memory accesses are not checked")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "3", sys.executable, "-m", "benchmarks.gpu.launch_each"]
    unpooled = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or accesses behind a tensor hit the pool and pass
    _record(context, table, "compute-sanitizer memcheck", [*command, "--tiny"], SANITIZER_SECONDS, variables=unpooled)


@torch.no_grad()
def check_graph(context: Context, table: Records) -> None:
    """A captured forward of a fused network must give what the same network gives uncaptured, on new input, too.

    And, ten times over, what it gives where no kernel starts before the one before it has ended; and what the network
    gives once it is frozen and has become one function.
    """
    network = "resnet18" if context.quick else "resnet50"
    if table.done("cuda-graph", "", network, "") or not context.deadline.allows(20):
        return
    try:
        device = context.device.torch_name
        size, dtype = (32, torch.float32) if context.quick else (224, torch.float16)
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        images = images.contiguous(memory_format=torch.channels_last)
        model = make_model(network, None, images).to(device, dtype).to(memory_format=torch.channels_last)
        fused, x = frb.fuse(model), images.to(device, dtype)
        replay = context.device.capture(lambda: fused(x))
        same = torch.equal(replay(), fused(x))
        x.mul_(0.5)
        same &= torch.equal(replay(), fused(x))
        expected, frozen = in_order(model, x)(x), frb.fuse(model, frozen=True)
        note = ""
        if not same:
            note = "the graph's output is not eager's"
        elif not all(torch.equal(replay(), expected) for _ in range(10)):
            note = "the output depends on when kernels start"
        elif not all(torch.equal(frozen(x), expected) for _ in range(10)):
            note = "the frozen network's output is another"
        row = {"status": "wrong" if note else "ok", "note": note}
    except Exception as error:  # a capture can fail in any way
        row = {"status": "crash" if is_broken(error) else "failed", "note": error_line(error)}
    table.add(kernel="cuda-graph", dtype="", case=network, tile="", **row)
    context.log(f"check: CUDA graph of fused {network}: {row['status']} {row['note']}")
    if row["status"] == "crash":
        raise Broken(row["note"])
