"""Compile every kernel with every tile that ships, for six generations of chips, and hold the code to its limits.

`python -m benchmarks.codegen` needs no GPU. It writes one row a kernel to `benchmarks/results/codegen.csv`, which is
kept, so that a diff shows what a change did to the machine code; `--check` compares with the kept file and fails on a
broken limit or on anything that became worse. A kernel is compiled only where something that goes into it has changed
since its row was made (`benchmarks.unchanged`; the names are beside the table, in `.inputs.json`); `--all` compiles
every one. `--triton 3.6.0` does it with another release, from its wheel, into a table of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from fused_resblock.kernels.bn_act import bn_act
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.relu_backward import relu_backward
from fused_resblock.kernels.stage import kernel_of
from fused_resblock.kernels.stem import bind_stem, pack_weight
from fused_resblock.kernels.tiles import StemTile, Tile
from fused_resblock.params import Affine, Conv

from .gpu import block_shapes, space
from .gpu.operations import build, precision
from .gpu.tail_shapes import TailShape
from .gpu.tails import TailJob
from .kernel_table import KEY, Kept, Row, key_of, read, read_kept, table_of, write
from .offline import CHIPS, compiling_for, inspect
from .other_triton import run_with
from .shapes import ConvShape, all_shapes, wide_shapes
from .unchanged import Unchanged, name_of, not_again
from .workers import in_order

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Job:
    """One kernel to compile: its name, what distinguishes it, and the launch."""

    capability: int
    dtype: str
    kernel: str
    case: str
    tile: str
    launch: Callable[[], Any]
    pipelined: bool = False  # whether plain pointers feed a main loop of several stages
    multiplies: bool = True
    tma: bool = False
    rectifies: bool = True


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def _affine(channels: int) -> Affine:
    return Affine(_meta(channels), _meta(channels))


def shipped(
    gpu: Gpu, name: str, shapes: Sequence[ConvShape] = (*all_shapes(), *wide_shapes())
) -> Iterator[tuple[ConvShape, int, Tile, str]]:
    """Each tile that is chosen for a kind of convolution: a shape and a batch it is chosen for, and the kind."""
    seen = set()
    for shape in shapes:
        for batch in BATCHES:
            tile = space.chosen(shape, batch, name, gpu)
            epilogue = "second" if shape.shortcut else "residual" if shape.residual else "plain"
            grouped = ".grouped" if shape.groups > 1 else ""
            case = f"{shape.kernel}x{shape.kernel}.s{max(shape.stride, shape.shortcut_stride)}.{epilogue}{grouped}"
            if (case, str(tile)) not in seen:
                seen.add((case, str(tile)))
                yield shape, batch, tile, case


def _conv_jobs(gpu: Gpu, name: str) -> Iterator[Job]:
    for shape, batch, tile, case in shipped(gpu, name):

        def launch(shape: ConvShape = shape, batch: int = batch, tile: Tile = tile) -> Any:
            return build(shape, batch, DTYPES[name], "meta").with_tile(tile)

        tma = tile.persistent > 0
        pipelined = shape.kernel**2 * shape.channels > tile.block_k and shape.groups == 1 and not tma
        pipelined &= tile.num_stages > 1
        # with a split loop the ReLU is in the kernel that adds the sums up
        yield Job(
            gpu.capability,
            name,
            convolution_of(tile, shape),
            case,
            str(tile),
            launch,
            pipelined,
            tma=tma,
            rectifies=tile.split_k == 1,
        )


def convolution_of(tile: Tile, shape: ConvShape) -> str:
    """The kernel that runs a convolution with a tile."""
    if tile.ring:
        return "conv_pair" if shape.shortcut else "conv_ring"
    return "conv_halo" if tile.halo else "conv_tma" if tile.persistent else "conv_bn_act"


def stem_kernel(capability: int, dtype: str) -> str:
    """The kernel that runs a stem."""
    return "stem_hopper" if capability == 90 and dtype != "tf32" else "stem"


def stem_tile(capability: int) -> StemTile | None:
    """What a stem is bound with for a chip: None, as on a Hopper, of which a tensor without a GPU is taken to be."""
    return None if capability == 90 else StemTile()


def _stage_jobs(gpu: Gpu, name: str) -> Iterator[Job]:
    """The tail of a bottleneck with the next reduce, without, and with a downsample branch, for each width.

    And with the reduce of the next stage, which is twice as wide.
    """
    dtype = DTYPES[name]
    for width, size in ((64, 56), (128, 28), (256, 14)):
        branch = (1, 64) if width == 64 else (2, 2 * width)  # stride, and channels of what branches off
        for case, (stride, second), outputs in (
            ("residual", (1, 0), width),
            ("last", (1, 0), 0),
            ("second", branch, width),
            ("next", (1, 0), 2 * width),
        ):
            shape = TailShape("", width, size, stride, second, outputs)
            for tile in shape.shipped(dtype.itemsize, gpu):
                launch = partial(TailJob(shape, 128, name, tile).launch, dtype)
                yield Job(gpu.capability, name, kernel_of(tile), f"{width}.{case}", str(tile), launch, tma=tile.tma)


def _block_jobs(gpu: Gpu, name: str) -> Iterator[Job]:
    """Whole bottlenecks."""
    dtype = DTYPES[name]
    for shape in block_shapes.shapes(False):
        case = f"{shape.width}-{shape.outputs}.{'second' if shape.second else 'residual'}"
        for tile in shape.shipped(dtype.itemsize, gpu):
            launch = partial(TailJob(shape, 128, name, tile).launch, dtype)
            yield Job(gpu.capability, name, shape.kernel, case, str(tile), launch, tma=True)


def jobs(capabilities: Sequence[int] = tuple(CHIPS), dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[Job]:
    """Every kernel and tile that is chosen for the networks at batch 1 to 256."""
    for capability in capabilities:
        gpu = Gpu(CHIPS[capability].multiprocessors, capability)
        for name in dtypes:
            dtype = DTYPES[name]
            yield from _conv_jobs(gpu, name)
            yield from _stage_jobs(gpu, name)
            yield from _block_jobs(gpu, name)
            x = _meta(32, 64, 56, 56, dtype=dtype)
            image = _meta(32, 3, 224, 224, dtype=dtype)
            first = Conv(_meta(64, 3, 7, 7, dtype=dtype), None, _affine(64), (2, 2), (3, 3))  # type: ignore[arg-type]

            def stem(image: torch.Tensor = image, first: Conv = first, capability: int = capability) -> Any:
                return bind_stem(image, first, pack_weight(first.weight, True), stem_tile(capability))(image)

            def elementwise(x: torch.Tensor = x) -> Any:
                return bn_act(x, _affine(64), x)

            def backward(x: torch.Tensor = x) -> Any:
                return relu_backward(x, x)

            yield Job(capability, name, stem_kernel(capability, name), "7x7", "", stem)
            yield Job(capability, name, "bn_act", "residual", "", elementwise, multiplies=False)
            yield Job(capability, name, "relu_backward", "", "", backward, multiplies=False, rectifies=False)


def compile_job(job: Job, kept: Kept | None = None) -> tuple[str, Row]:
    """Compile a job and read its code: what it was made from, and its row of the table; or give what is kept of both.

    Only a job that is made from something else than its kept row is compiled.
    """
    name, row = (kept or {}).get(key_of(job), (None, {}))
    try:
        with precision(job.dtype), compiling_for(job.capability) as compiled, not_again(name):
            job.launch()
    except Unchanged:
        assert name is not None
        return name, row
    # the last of its name: a branch may have a launch of its own before it
    *_, kernel = (k for name, k in compiled if name == f"_{job.kernel}_kernel")
    facts = inspect(kernel, CHIPS[job.capability])
    return name_of(kernel), {"triton": triton.__version__, **{field: getattr(job, field) for field in KEY}, **facts}


def compile_all(
    capabilities: Sequence[int], dtypes: Sequence[str], kept: Kept
) -> Iterator[tuple[Job, tuple[str, Row]]]:
    """Every job with what it was made from and its row, in order, compiled on all cores."""
    listing = partial(jobs, capabilities, dtypes)
    todo = list(listing())
    work = partial(compile_job, kept=kept)
    yield from zip(todo, in_order(listing, work, range(len(todo)), "kernel"), strict=True)


def broken_limits(row: dict[str, Any], job: Job) -> list[str]:
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
    if job.tma and not row["tma_loads"]:
        faults.append("no TMA loads")
    if job.rectifies and not row["max_nan"]:
        faults.append("the ReLU drops NaN")
    return faults


def worse(row: dict[str, Any], kept: dict[str, str]) -> list[str]:
    """In what a kernel's code is worse than the kept row: fewer resident programs, say, or fewer 128-bit loads."""
    one_by_one = row["serialized"] and kept["serialized"] == "False"
    return ["matrix instructions one by one"] * one_by_one + [
        f"{field} {row[field]}, was {kept[field]}"
        for field in ("resident", "async_128", "tma_loads", "matrix")
        if int(row[field]) < int(kept[field])
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print what is wrong, write the table. Returns 1 if a limit is broken or, with --check, on worse code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("--capability", type=int, action="append", choices=tuple(CHIPS), help="default: all")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="default: all")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the kept table")
    parser.add_argument("--all", action="store_true", help="compile those too that nothing has changed for")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="default: the kept table of this Triton")
    parser.add_argument("--triton", metavar="VERSION|WHEEL", help="compile with another release of Triton")
    args = parser.parse_args(argv)
    if args.triton is not None:
        try:
            return run_with(args.triton, "benchmarks.codegen", sys.argv[1:] if argv is None else argv)
        except ValueError as error:
            parser.error(str(error))
    args.out = args.out or table_of("codegen", triton.__version__)
    kept, known = read(args.out), {} if args.all else read_kept(args.out)
    faults, made, compiled = [], {}, 0
    for job, (name, row) in compile_all(args.capability or tuple(CHIPS), args.dtype or tuple(DTYPES), known):
        key = key_of(job)
        made[key] = name, row
        compiled += known.get(key, ("",))[0] != name
        found = broken_limits(row, job)
        if args.check and kept.get(key, {}).get("triton") == triton.__version__:
            found += worse(row, kept[key])
        faults += [f"{' '.join(key)}: {fault}" for fault in found]
    if not args.check:
        whole = {**read_kept(args.out), **made}  # with those of other chips and dtypes
        names, rows = zip(*(whole[key] for key in map(key_of, jobs()) if key in whole), strict=True)
        write(args.out, rows, names)
    print("\n".join(faults) if faults else f"{len(made)} kernels, every limit holds; compiled now: {compiled}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
