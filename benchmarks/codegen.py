"""Compile every kernel with every tile that ships, for six generations of chips, and hold the code to its gates.

`python -m benchmarks.codegen` needs no GPU. It writes one row a kernel to `benchmarks/results/codegen.csv`, which is
kept, so that a diff shows what a change did to the machine code; `--check` compares with the kept file and fails on a
broken gate or on anything that became worse.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

from fused_resblock.kernels.bn_act import bn_act
from fused_resblock.kernels.conv_bn_act import conv_bn_act
from fused_resblock.kernels.relu_backward import relu_backward
from fused_resblock.kernels.tiles import Gpu, Tile, choose_tile
from fused_resblock.params import BatchNorm

from .gpu.operations import build
from .offline import CHIPS, Chip, compiling_for, inspect
from .shapes import ConvShape, all_shapes

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
BATCHES = (1, 32, 128)
RESULTS = Path(__file__).parent / "results" / "codegen.csv"
KEY = ("capability", "dtype", "kernel", "case", "tile")


@dataclass(frozen=True)
class Job:
    """One kernel to compile: its name, what distinguishes it, and the launch."""

    capability: int
    dtype: str
    kernel: str
    case: str
    tile: str
    launch: Callable[[], Any]
    pipelined: bool  # whether its main loop has more than one iteration
    multiplies: bool


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def _norm(channels: int) -> BatchNorm:
    return BatchNorm(*(_meta(channels) for _ in range(4)))


def _launch_conv(shape: ConvShape, batch: int, dtype: torch.dtype, tile: Tile) -> Any:
    operation = build(shape, batch, dtype, "meta")
    conv, epilogue = operation.conv, operation.epilogue
    conv = conv._replace(norm=_norm(shape.out_channels))  # norms in fp32, as in a model under autocast
    if epilogue.shortcut is not None:
        epilogue = epilogue._replace(shortcut=epilogue.shortcut._replace(norm=_norm(shape.out_channels)))
    return conv_bn_act(operation.x, conv, operation.other, epilogue, tile=tile)


def _conv_jobs(chip: Chip, name: str) -> Iterator[Job]:
    dtype, seen = DTYPES[name], set()
    gpu = Gpu(chip.multiprocessors, chip.capability)
    for shape in all_shapes():
        for batch in BATCHES:
            m, taps = batch * shape.out_size**2, shape.kernel**2
            n, k = shape.out_channels // shape.groups, shape.channels // shape.groups
            tile = choose_tile(m, n, k, taps, dtype.itemsize, second=bool(shape.shortcut), gpu=gpu)
            epilogue = "second" if shape.shortcut else "residual" if shape.residual else "plain"
            grouped = ".grouped" if shape.groups > 1 else ""
            case = f"{shape.kernel}x{shape.kernel}.s{max(shape.stride, shape.shortcut_stride)}.{epilogue}{grouped}"
            tile_name = f"{tile.block_m}x{tile.block_n}x{tile.block_k}.w{tile.num_warps}.s{tile.num_stages}"
            if (case, tile_name) in seen:
                continue
            seen.add((case, tile_name))

            def launch(shape: ConvShape = shape, batch: int = batch, tile: Tile = tile) -> Any:
                return _launch_conv(shape, batch, dtype, tile)

            pipelined = taps * k > tile.block_k and shape.groups == 1
            yield Job(chip.capability, name, "conv_bn_act", case, tile_name, launch, pipelined, True)


def jobs(capabilities: Sequence[int] = tuple(CHIPS), dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[Job]:
    """Every kernel and tile that the heuristic picks for the shape table at batch 1, 32 and 128."""
    for capability in capabilities:
        for name in dtypes:
            yield from _conv_jobs(CHIPS[capability], name)
            x = _meta(32, 64, 56, 56, dtype=DTYPES[name])

            def elementwise(x: torch.Tensor = x) -> Any:
                return bn_act(x, _norm(64), x)

            def backward(x: torch.Tensor = x) -> Any:
                return relu_backward(x, x)

            yield Job(capability, name, "bn_act", "residual", "", elementwise, False, False)
            yield Job(capability, name, "relu_backward", "", "", backward, False, False)


def compile_job(job: Job) -> dict[str, Any]:
    """Compile a job and read its code: one row of the table."""
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        with compiling_for(job.capability) as compiled:
            job.launch()
    finally:
        torch.backends.cudnn.allow_tf32 = allow_tf32
    ((_, kernel),) = compiled
    facts = inspect(kernel, CHIPS[job.capability])
    return {**{field: getattr(job, field) for field in KEY}, **facts}


def broken_gates(row: dict[str, Any], job: Job) -> list[str]:
    """What is wrong with a kernel's code; empty if nothing is."""
    chip, faults = CHIPS[job.capability], []
    if row["stack"] or row["local"]:
        faults.append(f"spills: {row['stack']} bytes of stack, {row['local']} local-memory instructions")
    if row["shared"] > chip.shared_limit:
        faults.append(f"shared memory {row['shared']} over the chip's {chip.shared_limit}")
    if job.multiplies and not row["matrix"]:
        faults.append(f"no {chip.matrix} instruction")
    if job.pipelined and not row["async_loads"]:
        faults.append("no asynchronous loads in a pipelined loop")
    if job.pipelined and row["async_loads"] != row["async_128"]:
        faults.append(f"only {row['async_128']} of {row['async_loads']} asynchronous loads are 128-bit")
    if job.kernel != "relu_backward" and not row["max_nan"]:
        faults.append("the ReLU drops NaN")
    return faults


def worse(row: dict[str, Any], kept: dict[str, str]) -> list[str]:
    """In what a kernel's code is worse than the kept row: fewer resident programs, or fewer 128-bit loads."""
    return [
        f"{field} {row[field]}, was {kept[field]}"
        for field in ("resident", "async_128", "matrix")
        if int(row[field]) < int(kept[field])
    ]


def read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a kept table by their key; empty where there is none."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {tuple(row[field] for field in KEY): row for row in csv.DictReader(file)}


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print what is wrong, write the table. Returns 1 if a gate is broken or, with --check, code got worse."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("--capability", type=int, action="append", choices=tuple(CHIPS), help="default: all")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="default: all")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the kept table")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE.csv")
    args = parser.parse_args(argv)
    kept, faults, rows = read(args.out), [], []
    todo = list(jobs(args.capability or tuple(CHIPS), args.dtype or tuple(DTYPES)))
    for job in tqdm(todo, unit="kernel", disable=None):
        row = {"triton": triton.__version__, **compile_job(job)}
        rows.append(row)
        key = tuple(str(row[field]) for field in KEY)
        found = broken_gates(row, job)
        if args.check and key in kept and kept[key]["triton"] == triton.__version__:
            found += worse(row, kept[key])
        faults += [f"{' '.join(key)}: {fault}" for fault in found]
    if not args.check:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print("\n".join(faults) if faults else f"{len(rows)} kernels, every gate holds")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
