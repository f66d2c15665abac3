"""The command line: `fused-resblock demo | explain | tune | doctor`, also `python -m fused_resblock`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .version import __version__


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line long, as are those of the commands, and that wants options in full."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="a network of fused_resblock.models")
    parser.add_argument("--backend", default="auto", help="auto (default), triton, cudnn, onednn or eager")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def _prepare_explain(args: argparse.Namespace) -> Callable[[], int]:
    import torch

    from . import backends, explain, fuse, models

    if args.model not in models.ARCHITECTURES:
        raise ValueError(f"model must be one of {', '.join(models.ARCHITECTURES)}, got {args.model!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be available, got 'cuda': torch sees no CUDA device")
    backends.check_name(args.backend)

    def job() -> int:
        model = models.build(args.model).eval().to(args.device, getattr(torch, args.dtype))
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            print(explain(fuse(model, backend=args.backend)))
        return 0

    return job


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="a network of fused_resblock.models")
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        help="images (default: 32); a tile is used from a quarter to four times as many",
    )
    parser.add_argument("--size", type=int, default=224, help="rows and columns of an image")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--out", metavar="FILE.json", help="the table; continued if it exists")


def _prepare_tune(args: argparse.Namespace) -> Callable[[], int]:
    import torch

    from . import models, tune
    from .tuned_file import check_out

    if args.model not in models.ARCHITECTURES:
        raise ValueError(f"model must be one of {', '.join(models.ARCHITECTURES)}, got {args.model!r}")
    for name in ("batch", "size"):
        if not 1 <= getattr(args, name) <= 4096:
            raise ValueError(f"{name} must be from 1 to 4096, got {getattr(args, name)}")
    if not torch.cuda.is_available():
        raise ValueError("tune must have a CUDA device, got none")
    path = check_out(args.out, torch.device("cuda"))

    def job() -> int:
        dtype = getattr(torch, args.dtype)
        model = models.build(args.model).eval().to("cuda", dtype)
        x = torch.randn(args.batch, 3, args.size, args.size, device="cuda", dtype=dtype)
        try:
            print(f"written to {tune(model, x, out=path)}")
        except KeyboardInterrupt:
            held = f"; the same command goes on with what is in {path}" if path.exists() else ""
            print(f"fused-resblock: interrupted{held}", file=sys.stderr)
            return 130
        return 0

    return job


def _prepare_doctor(args: argparse.Namespace) -> Callable[[], int]:
    from . import doctor

    return doctor.run


def _parser() -> argparse.ArgumentParser:
    from .demo import command

    parser = _Parser(prog="fused-resblock", description="Fused residual blocks for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fused_resblock {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{demo,explain,tune,doctor}")

    demo = commands.add_parser("demo", help="compare eager and fused networks on sample images")
    command.add_arguments(demo)
    demo.set_defaults(prepare=command.prepare)

    explain = commands.add_parser("explain", help="show what is fused in a network, by which backend, and why")
    _add_explain(explain)
    explain.set_defaults(prepare=_prepare_explain)

    tune = commands.add_parser("tune", help="search the fastest tiles for a network on this machine's GPU")
    _add_tune(tune)
    tune.set_defaults(prepare=_prepare_tune)

    doctor = commands.add_parser("doctor", help="show versions, hardware and usable backends")
    doctor.set_defaults(prepare=_prepare_doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    A command first checks all that the user gave it: what fails there is the user's to correct and is told in one
    line, with exit code 2. An exception after that is a bug and keeps its traceback.

    Args:
        argv: the arguments; None means those of the process.

    Returns:
        The exit code: 0, 1 if the command found something wrong, 2 for a mistake in the arguments; 130 and 141 for an
        interruption by the keyboard and by the end of a pipe.
    """
    try:
        args = _parser().parse_args(argv)
        try:
            job = args.prepare(args)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            print(f"fused-resblock: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        code = job()
        if sys.stdout is not None:  # it is where the process was started with its output closed
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as of `| head`; what is left to print is for nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
