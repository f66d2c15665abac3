"""Arguments, the order of the steps, and the processes that they run in.

Each step is a process of its own: a kernel that breaks the GPU's context ends that process alone, and the next one goes
on behind it; a step that does not end by itself is ended before nine minutes are over.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

from .bootstrap import ROOT
from .requirements import Unusable, check_versions, versions

STEPS = ("check", "suite", "tune", "bench", "profile")
BUDGET, LONGEST, GRACE = 500.0, 510.0, 20.0
BAD_INPUT, LOST_CONTEXT, RESTARTS = 2, 75, 8
QUICK_BUDGET = 120.0

#: runs one step for so many seconds and gives its exit status, None if it had to be ended
Spawn = Callable[[str, float], "int | None"]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check; ends the program with status 2 and a message if something is wrong."""
    told = "Check, tune, measure and profile on an NVIDIA GPU; each step goes on where it was stopped."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=told)
    parser.add_argument("step", nargs="?", choices=(*STEPS, "all", "summary"), default="all", help="default: all")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: $OUT, else benchmarks/results/<gpu>")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: does it run?")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"of each step (default: {BUDGET:.0f})")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.budget is None:
        args.budget = QUICK_BUDGET if args.quick else BUDGET
    if not 1 <= args.budget <= LONGEST:
        parser.error(f"budget must lie in [1, {LONGEST:.0f}], got {args.budget:g}")
    if args.out is None and os.environ.get("OUT"):
        args.out = Path(os.environ["OUT"])
    if args.out is not None:
        args.out = args.out.resolve()
        if args.out.exists() and not args.out.is_dir():
            parser.error(f"out must be a folder, got {args.out}")
    return args


def slug(gpu: str) -> str:
    """A GPU's name as a folder's: `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def inside(args: argparse.Namespace) -> int:
    """Run one step in this process.

    Raises:
        Unusable: if the machine lacks what is needed.
    """
    check_versions(versions())
    from .context import Context
    from .deadline import Deadline
    from .device import CudaDevice
    from .steps import run_step

    deadline = Deadline(args.budget)
    device = CudaDevice()
    folder = args.out or ROOT / "benchmarks" / "results" / slug(device.name)
    return run_step(args.step, Context(device, folder, deadline, args.quick))


def spawner(args: argparse.Namespace) -> Spawn:
    """Runs a step as `python -m benchmarks.gpu STEP --inside` and ends it when it overruns its time."""

    def spawn(step: str, seconds: float) -> int | None:
        command = [sys.executable, "-m", "benchmarks.gpu", step, "--inside", "--budget", f"{seconds:.0f}"]
        command += ["--out", str(args.out)] * (args.out is not None) + ["--quick"] * args.quick
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            return process.wait(seconds + GRACE)
        except BaseException as error:  # an interrupt must not leave the step behind, either
            overran = isinstance(error, subprocess.TimeoutExpired)
            if not overran:  # nor what runs in it be taken for a crash
                os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if overran:
                return None
            raise

    return spawn


def supervise(step: str, budget: float, spawn: Spawn, clock: Callable[[], float] = monotonic) -> int:
    """Run a step, again after a lost context while time is left; its exit status."""
    end = clock() + budget
    for _ in range(RESTARTS):
        left = end - clock()
        if left < 1:
            break
        status = spawn(step, left)
        if status is None:
            print(f"{step}: ended after {budget + GRACE:.0f} s; what was measured is kept, run it again to go on")
            return 1
        if status < 0:
            print(f"{step}: its process was ended by signal {-status}; starting it again")
        elif status != LOST_CONTEXT:
            return status
    print(f"{step}: not finished; what was measured is kept, run it again to go on")
    return 1


def run_all(args: argparse.Namespace, spawn: Spawn) -> int:
    """Run the steps that were asked for, then the summary; 2 at once if the machine cannot run them, else 1 or 0."""
    if args.step == "summary":
        return supervise("summary", args.budget, spawn)
    status = 0
    for step in STEPS if args.step == "all" else (args.step,):
        told = supervise(step, args.budget, spawn)
        if told == BAD_INPUT:
            return BAD_INPUT
        status |= int(told != 0)
    supervise("summary", 60, spawn)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = arguments(argv)
    try:
        if args.inside:
            return inside(args)
        check_versions(versions())
        return run_all(args, spawner(args))
    except Unusable as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"benchmarks.gpu: cannot write the results: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("benchmarks.gpu: interrupted; what was measured is kept", file=sys.stderr)
        return 130
