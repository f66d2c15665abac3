"""The `demo` command: its options, their checks, and the report it prints."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .. import machine
from . import report

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_MODELS = ["resnet18", "resnet50"]
_NEEDS = {"sklearn": "scikit-learn", "numpy": "numpy", "PIL": "pillow", "tqdm": "tqdm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo."""
    parser.add_argument("--model", action="append", metavar="NAME", help="network(s); repeat it or separate by commas")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="state_dict for the one --model (default: random)")
    parser.add_argument("--image", action="append", type=Path, metavar="FILE", help="picture(s) instead of the samples")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures are repeated up to N (default: one each)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="timed rounds (default: 20)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the time of each block")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--skip-digits", action="store_true", help="leave the handwritten digits out")
    parser.add_argument("--skip-photos", action="store_true", help="leave the photographs out")


def prepare(args: argparse.Namespace) -> Callable[[], int]:
    """Check every option and read every input; nothing is measured yet.

    Returns:
        What runs the demo and gives its exit code: 0, or 1 if fused and eager results disagree.

    Raises:
        ValueError: if an option, a picture or a checkpoint is not usable.
        RuntimeError: if `FUSED_RESBLOCK_BACKEND` names a backend that this machine does not have.
    """
    names = _check(args)
    state, pictures = None, {}
    if not args.skip_photos:
        from .inputs import check_fit, load_pictures, read_weights

        if args.weights is not None:
            state = read_weights(args.weights)
            check_fit(state, names[0])
        pictures = load_pictures(args.image or ())
    return lambda: run(args, names, state, pictures)


def _check(args: argparse.Namespace) -> list[str]:
    """Check what can be checked without reading a file; return the names of the networks."""
    from ..backends import check_name
    from ..models import ARCHITECTURES
    from .plot import SUFFIXES

    names = [name.strip() for group in args.model or DEFAULT_MODELS for name in group.split(",")]
    for name in names:
        if name not in ARCHITECTURES:
            raise ValueError(f"model must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    if args.weights is not None and len(names) != 1:
        raise ValueError(f"model must be a single network when weights are given, got {', '.join(names)}")
    for option, most in (("batch", 4096), ("runs", 1_000_000)):
        value = getattr(args, option)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{option} must be from 1 to {most}, got {value}")
    if args.batch is not None and args.batch < len(args.image or ()):
        raise ValueError(f"batch must be at least the number of images, {len(args.image)}, got {args.batch}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be available, got 'cuda': torch sees no CUDA device")
    if args.skip_digits and args.skip_photos:
        raise ValueError("skip-digits and skip-photos must not both be given, got both: nothing is left to show")
    for option in ("plot", "weights", "image"):
        if getattr(args, option) and args.skip_photos:
            raise ValueError(f"{option} must be given without skip-photos, got both: it is for the photograph part")
    if args.plot is not None and args.plot.suffix.lower() not in SUFFIXES:
        raise ValueError(f"plot must end in one of {', '.join(SUFFIXES)}, got {str(args.plot)!r}")
    for option in ("plot", "json"):
        file = getattr(args, option)
        if file is not None and not _writable(file):
            raise ValueError(f"{option} must be a file that can be written, got {str(file)!r}")
    needs = _NEEDS | ({"matplotlib": "matplotlib"} if args.plot else {})
    absent = [package for module, package in needs.items() if find_spec(module) is None]
    if absent:
        raise ValueError(f"demo must have {', '.join(absent)}, got none: pip install '.[demo]' in the repository")
    check_name("auto")
    return names


def _writable(file: Path) -> bool:
    """Whether a file can be written; it is not there afterwards if it was not before."""
    there = file.exists()
    try:
        with file.open("ab"):
            pass
        if not there:
            file.unlink()
    except OSError:
        return False
    return True


def run(args: argparse.Namespace, names: list[str], state: dict[str, Tensor] | None, pictures: dict[str, Any]) -> int:
    """Run the parts that were not skipped, print them, write the files that were asked for; return the exit code."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    stamp = machine.stamp()
    results: dict[str, Any] = {"machine": stamp, "dtype": args.dtype, "device": args.device, "runs": args.runs}
    print(report.machine_line(stamp, args.device))
    failures = []
    if not args.skip_digits:
        from .digits import compare

        results["digits"] = compare(device, dtype)
        print(report.digits(results["digits"]))
        if results["digits"]["differing"]:
            failures.append("fused and eager networks classify digits differently")
    if not args.skip_photos:
        results["photos"] = _photos(args, names, state, pictures)
        failures += [
            f"{result['model']} is less exact fused than eager" for result in results["photos"] if not result["parity"]
        ]
    results["failures"] = failures
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {args.json}")
    if args.plot:
        from .plot import plot_blocks

        where = stamp["gpu"] if args.device == "cuda" else f"{stamp['cpu']}, {stamp['threads']} threads"
        plot_blocks(results["photos"], f"{where}, {args.dtype}, batch {results['photos'][0]['batch']}", args.plot)
        print(f"\nwrote {args.plot}")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def _photos(
    args: argparse.Namespace, names: list[str], state: dict[str, Tensor] | None, pictures: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure each network on the pictures and print it as soon as it is done."""
    from tqdm import tqdm

    from .inputs import make_model, to_batch
    from .photos import measure

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    batch = args.batch or len(pictures)
    images = to_batch(list(pictures.values()), batch)
    x = images.to(device=device, dtype=dtype)
    results = []
    for name in names:
        model = make_model(name, state, images).to(device, dtype)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # disable=None: no bar where standard error is not a terminal
        with tqdm(desc=name, unit="round", leave=False, disable=None) as bar:

            def progress(total: int, bar: tqdm = bar) -> Callable[[], object]:
                bar.reset(total)
                return bar.update

            began, others = perf_counter(), machine.other_busy_seconds()
            result = measure(model, x, args.runs, progress)
            others = (machine.other_busy_seconds() - others) / (perf_counter() - began)
        result |= {"model": name, "batch": batch, "images": list(pictures)}
        result["weights"] = "random" if state is None else args.weights.name
        result |= {"other_cores": others, "disturbed": others + torch.get_num_threads() > (os.cpu_count() or 1) + 0.25}
        results.append(result)
        print(report.photos(result))
    return results
