"""Run the compiled code of every kernel with every tile that ships, without a GPU; `python -m benchmarks.emulate`.

The PTX that Triton makes for a chip runs on numpy (`benchmarks.ptx`), at the networks' image sizes and on few images.
Its result is held to float64 by the rule of the tests, and must not depend on the order of the warps or on when
asynchronous work lands. One row a kernel, with what it issues and moves, goes to `benchmarks/results/emulate.csv`;
`--triton 3.6.0` does it with another release's compiler, into a table of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from fused_resblock.backends import triton as backend
from fused_resblock.kernels import (
    bottleneck,
    bottleneck_rows,
    by_rings,
    conv_halo,
    conv_pair,
    conv_ring,
    conv_tma,
    expand_shift_halo,
    halo,
    ring,
    tail_ring,
)
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.stage import kernel_of
from fused_resblock.kernels.stem import bind_stem
from fused_resblock.kernels.tiles import StageTile, Tile
from fused_resblock.table import error_line

from .codegen import convolution_of, shipped, stem_kernel, stem_tile
from .gpu import block_shapes, space, stems, tails
from .gpu.elementwise import judge_bn_act, judge_relu_backward
from .gpu.operations import DTYPES, build, own, poisoned, precision
from .harness import parity
from .kernel_table import KEY, Row, key_of, key_of_row, read, table_of, write
from .offline import CHIPS
from .other_triton import run_with
from .ptx.driver import emulated
from .ptx.profile import Profile
from .shapes import ConvShape, odd_shapes
from .workers import in_order

#: chips whose instructions are known; 10.x multiplies in a memory of its own
CAPABILITIES = (80, 86, 89, 90, 120)
NAMES = ("fp16", "bf16", "tf32")
#: images by size, so that there are several tiles
IMAGES = {56: 2, 28: 2, 14: 2, 7: 4}
#: images of any other size
OTHERS = 5
#: multiprocessors, so few that programs take several pieces
FEW = 16
#: modules that ask for them
PLACED = (
    bottleneck,
    bottleneck_rows,
    by_rings,
    conv_halo,
    conv_pair,
    conv_ring,
    conv_tma,
    expand_shift_halo,
    halo,
    ring,
    tail_ring,
)
#: how work lands: late or not, products apart from the rest or not (see `ptx.grid`); the first one is counted
ORDERS = ((False, True), (True, False))
COUNTS = ("instructions", "products", "l2", "device", "wavefronts", "ideal")


@dataclass(frozen=True)
class Job:
    """A kernel to run: its name, what distinguishes it, and what runs it and judges the result."""

    capability: int
    dtype: str
    kernel: str
    case: str
    tile: str
    judge: Callable[[], dict[str, Any]]

    def row(self) -> dict[str, Any]:
        """The row of the table: "ok" with the counts, "wrong", or "fault" where the program could not be run."""
        try:
            found = self.judge()
        except Exception as error:  # a fault of the program, an instruction that is not known, a compiler's failure
            found = {"status": "fault", "note": error_line(error)}
        return {"triton": triton.__version__, **{field: getattr(self, field) for field in KEY}, **found}


@contextmanager
def _few_multiprocessors(capability: int) -> Iterator[None]:
    before = conv_tma.gpu_of
    for module in PLACED:
        module.gpu_of = lambda device: Gpu(FEW, capability)
    try:
        yield
    finally:
        for module in PLACED:
            module.gpu_of = before


def both_ways(capability: int, call: Callable[[], Tensor]) -> tuple[Tensor, str | None, list[Profile], str]:
    """The result, whether another order gives another one, the counts of each launch, and what else is to be said."""
    results: list[Tensor] = []
    profiles: list[Profile] = []
    notes: set[str] = set()
    for late, apart in ORDERS:
        counted = not results
        with _few_multiprocessors(capability), emulated(capability, late, counted, apart) as driver, poisoned():
            results.append(call())
        profiles += driver.profiles
        notes |= driver.notes
    first, *others = (t.nan_to_num(nan=1e30) for t in results)
    same = all(torch.equal(first, other) for other in others)
    return results[0], None if same else "the result depends on the order", profiles, ", ".join(sorted(notes))


def judged(capability: int, call: Callable[[], Tensor], same: Tensor, exact: Tensor) -> dict[str, Any]:
    """What a kernel's result is worth, and its counts."""
    y, fault, profiles, said = both_ways(capability, call)
    failure, largest, bound = parity(y, same, exact)
    counts = {name: sum(getattr(profile, name) for profile in profiles) for name in COUNTS}
    status = "wrong" if failure or fault else "ok"
    note = failure or fault or said
    return {"status": status, "max_error": largest, "error_bound": bound, **counts, "note": note}


def convolution(capability: int, name: str, shape: ConvShape, tile: Tile) -> dict[str, Any]:
    """A convolution of the shape table with a tile."""
    with precision(name) as dtype, torch.no_grad():
        op = build(shape, IMAGES.get(shape.out_size, OTHERS), dtype, "cpu")
        exact = op.to(torch.float64).plain()
        return judged(capability, lambda: op.with_tile(tile), own(name, op.plain), exact)


def tail(capability: int, name: str, shape: tails.Shape, tile: StageTile) -> dict[str, Any]:
    """A bottleneck's tail with a tile of the stage kernel, or a whole one with a tile of its own."""
    with precision(name) as dtype, torch.no_grad():
        asked = shape.build(IMAGES.get(shape.size, OTHERS), dtype, "cpu")
        x, other = asked.inputs()
        exact = tails.joined(asked.plain(x.double(), None if other is None else other.double()))
        same = own(name, lambda: tails.joined(asked.plain(x, other)))
        return judged(capability, lambda: tails.joined(tails.bound(asked, tile)(x, other)), same, exact)


def stem(capability: int, name: str, size: int) -> dict[str, Any]:
    """The stem on images of `size` rows and columns."""
    with precision(name) as dtype, torch.no_grad():
        op = stems.operation(size, 2, dtype, "cpu")
        same, exact = stems.results(op, name)
        conv, packed = backend.prepare(op.conv, dtype), backend.packed_stem(op.x, op.conv)
        run = bind_stem(op.x, conv, packed, stem_tile(capability))
        return judged(capability, lambda: run(op.x), same, exact)


def elementwise(capability: int, name: str, judge: Callable[..., Any], c: int, size: int, what: str) -> dict[str, Any]:
    """An elementwise kernel, with the judgement of `gpu.elementwise`."""
    for late in (False, True):
        with emulated(capability, late), torch.no_grad():
            failure, largest, bound = judge(torch.Generator().manual_seed(0), DTYPES[name][0], c, size, what)
        if failure is not None:
            break
    status = "wrong" if failure else "ok"
    return {"status": status, "max_error": largest, "error_bound": bound, "note": failure or ""}


def jobs(capabilities: Sequence[int] = CAPABILITIES, dtypes: Sequence[str] = NAMES) -> Iterator[Job]:
    """Every kernel and tile that is chosen for the networks at batch 1 to 256."""
    for capability in capabilities:
        gpu = Gpu(CHIPS[capability].multiprocessors, capability)
        for name in dtypes:
            for shape, _, tile, _ in (*shipped(gpu, name), *shipped(gpu, name, odd_shapes())):
                run = partial(convolution, capability, name, shape, tile)
                kernel = convolution_of(tile, shape)
                yield Job(capability, name, kernel, space.key_of(shape), str(tile), run)
            for joint in (*tails.shapes(False), *block_shapes.odd_shapes(False)):
                for stage_tile in joint.shipped(DTYPES[name][0].itemsize, gpu):
                    run = partial(tail, capability, name, joint, stage_tile)
                    kernel = kernel_of(stage_tile) if joint.backend == "stage" else joint.kernel
                    yield Job(capability, name, kernel, joint.key(), str(stage_tile), run)
            for size in (64, 37):
                run = partial(stem, capability, name, size)
                yield Job(capability, name, stem_kernel(capability, name), f"7x7.{size}px", "", run)
            for kernel, judge, what in (
                ("bn_act", judge_bn_act, "residual"),
                ("bn_act", judge_bn_act, "strided"),
                ("relu_backward", judge_relu_backward, "relu"),
            ):
                for c, size in ((64, 9), (67, 9)):
                    run = partial(elementwise, capability, name, judge, c, size, what)
                    yield Job(capability, name, kernel, f"{c}.{size}px.{what}", "", run)


def merged(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Rows in the order of `jobs`, with those that a table holds of kernels that were not run."""
    kept = {**read(path), **{key_of_row(row): row for row in rows}}
    keys = [key_of(job) for job in jobs()]
    fields = ["triton", *KEY, "status", "max_error", "error_bound", *COUNTS, "note"]
    return [{field: kept[key].get(field, "") for field in fields} for key in keys if key in kept]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print what is wrong, write the table; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emulate", description=__doc__)
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES, help="default: all")
    parser.add_argument("--dtype", action="append", choices=NAMES, help="default: all")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="default: all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth; writes no table")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="default: the kept table of this Triton")
    parser.add_argument("--triton", metavar="VERSION|WHEEL", help="compile with another release of Triton")
    args = parser.parse_args(argv)
    if args.triton is not None:
        try:
            return run_with(args.triton, "benchmarks.emulate", sys.argv[1:] if argv is None else argv)
        except ValueError as error:
            parser.error(str(error))
    if args.every < 1:
        parser.error(f"every must be at least 1, got {args.every}")
    capabilities, dtypes = args.capability or CAPABILITIES, args.dtype or NAMES
    listing = partial(jobs, capabilities, dtypes)
    numbers = [n for n, job in enumerate(listing()) if not args.kernel or job.kernel in args.kernel][:: args.every]
    if not numbers:
        parser.error(f"kernel must name kernels of these chips and dtypes, got {' '.join(args.kernel)}")
    rows, faults = [], 0
    for row in in_order(listing, Job.row, numbers, "kernel"):
        rows.append(row)
        if row["status"] != "ok":
            faults += 1
            tqdm.write(" ".join(str(row[field]) for field in (*KEY, "status", "note")))
    if args.every == 1:
        path = args.out or table_of("emulate", triton.__version__)
        write(path, merged(path, rows))
    print(f"Triton {triton.__version__}: {len(rows)} kernels, {faults} not right")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
