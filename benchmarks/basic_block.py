"""Two designs for a BasicBlock that were weighed and are not built: `python -m benchmarks.basic_block`.

One kernel for both 3x3: a program takes a box of the block's output, computes the first convolution for the box and the
pixels around it into shared memory, and the second one from there; its steps wait for each other, as those of the stage
kernel with a halo do. What is predicted here is with the filters in shared memory where they fit, else with both
convolutions' filters read from L2 for every box.

Winograd F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016): 2.25 times fewer
products, of 4 times the input. What is counted is the way to the matrix units: 16 sums for each 2x2 outputs leave
registers for 64 of these by 32 channels, and both operands of each product come from shared memory. Only that is
counted, beside the usual ceilings: transforms, and filters from L2, cost nothing, so this is a bound and no prediction.
Its error is in `test_basic_block`.

Beside them stands what the block's convolutions took one by one on the measured chip.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from fused_resblock.kernels.cost import LATENCY, Ceilings, Cost, predicted
from fused_resblock.kernels.tables import BACKENDS

from .floors import blocks_of, floors_of, gemm_of
from .gpu.space import key_of
from .result_tables import write_table
from .results import FOLDER
from .roofline import kept_ceilings, kept_chip
from .shapes import ConvShape
from .tables import NOT_MEASURED

RESULTS = FOLDER / "basic_block.csv"
HEADERS = ("chip", "batch", "block", "per_conv_us", "one_floor_us", "predicted_us", "predicted_one_us")
HEADERS += ("winograd_bound_us", "measured_us")
SIDES = (4, 7, 8, 14, 16, 28)  # of a box; the best ones count
ROWS = 64  # of a matrix instruction
TILES, CHANNELS = 64, 32  # a Winograd program's 2x2 outputs, and the channels whose sums it holds at once
OPERATIONS, BYTES = 4096, 128  # of 16-bit matrix units and of shared memory, a multiprocessor and cycle, on sm_90


def one_kernel_seconds(shapes: Sequence[ConvShape], batch: int, itemsize: int, chip: Ceilings) -> float:
    """What both 3x3 should take as one kernel, with the best box."""
    first, second = shapes
    x, y = gemm_of(first, batch), gemm_of(second, batch)
    filters = itemsize * sum(shape.weights() for shape in shapes)

    def seconds(rows: int, columns: int) -> float:
        between = (rows + 2) * (columns + 2)
        seen = (first.stride * (rows + 1) + 3) * (first.stride * (columns + 1) + 3)
        boxes = batch * -(-second.out_size // rows) * -(-second.out_size // columns)
        held = itemsize * (seen * x.k + between * x.n)
        if held > chip.shared:
            return float("inf")
        stay = held + filters <= chip.shared
        products = [(between, x.n * x.k * 9), (rows * columns, y.n * (y.k * 9 + second.shortcut))]
        flops = sum(2 * -(-pixels // ROWS) * ROWS * filter_ for pixels, filter_ in products)
        read = itemsize * seen * x.k + (0 if stay else filters)
        step = chip.multiprocessors * (flops / chip.matrix + read / chip.l2) + 3 * LATENCY
        dram = itemsize * (x.in_pixels * x.k + y.m * y.n) + filters
        loaded = boxes * read + y.m * y.n * itemsize + (filters * chip.multiprocessors if stay else 0)
        cost = Cost(dram, loaded, boxes * flops)
        return predicted(cost, boxes, 1, chip, step_seconds=step, hindered=True)

    return min(seconds(*sides) for sides in product(SIDES, repeat=2))


def winograd_seconds(shape: ConvShape, batch: int, itemsize: int, chip: Ceilings) -> float:
    """What a 3x3 of stride 1 takes at least in F(2x2, 3x3): its operands' way from shared memory, and the ceilings."""
    gemm = gemm_of(shape, batch)
    passes = -(-gemm.n // CHANNELS)
    inputs, filters = 16 * TILES * gemm.k * itemsize, 16 * gemm.k * gemm.n * itemsize
    y = gemm.m * gemm.n * itemsize * (2 if shape.residual else 1)
    dram = gemm.in_pixels * gemm.k * itemsize + y + filters
    cycle = OPERATIONS * chip.multiprocessors / chip.matrix

    def seconds(parts: int) -> float:
        """With the output channels in so many parts, each a program's."""
        programs = parts * -(-gemm.m // (4 * TILES))
        moved = inputs * (1 + passes // parts) + 2 * filters // parts  # written once, read for all channels
        flops = 2 * programs * 16 * TILES * gemm.k * gemm.n // parts
        cost = Cost(dram, programs * (inputs // 4), flops)
        return predicted(cost, programs, 1, chip, step_seconds=moved / BYTES * cycle)

    return min(seconds(parts) for parts in range(1, passes + 1) if passes % parts == 0)


def read_measured(path: Path | None, batch: int) -> dict[str, float]:
    """Microseconds of the fastest backend for each convolution in fp16, by case, from a `tune.csv`."""
    if path is None or not path.exists():
        return {}
    best: dict[str, float] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            ours = row["backend"] in BACKENDS and row["status"] == "ok"
            if ours and (row["dtype"], row["batch"]) == ("fp16", str(batch)):
                us = float(row["median_us"])
                best[row["case"]] = min(us, best.get(row["case"], us))
    return best


def rows(batch: int, chip: Ceilings, measured: dict[str, float]) -> list[list[object]]:
    """A line for each distinct block of ResNet-18."""
    found: list[list[object]] = []
    for block, shapes in blocks_of("basic").items():
        floors = floors_of(shapes, batch, 2, chip)
        one = one_kernel_seconds(shapes, batch, 2, chip)
        seconds = [floors.per_conv, floors.whole, floors.ours, one]
        plain = all(shape.stride == 1 and not shape.shortcut for shape in shapes)
        winograd = sum(winograd_seconds(shape, batch, 2, chip) for shape in shapes) if plain else None
        micros: list[object] = [f"{1e6 * value:.1f}" for value in seconds]
        micros.append("" if winograd is None else f"{1e6 * winograd:.1f}")
        times = [measured.get(key_of(shape)) for shape in shapes]
        seen = NOT_MEASURED if None in times else f"{sum(t for t in times if t is not None):.1f}"
        found.append([chip.name, batch, block, *micros, seen])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.basic_block", description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE.csv")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"batch must be at least 1, got {args.batch}")
    ceilings = kept_ceilings()
    measured = read_measured(ceilings and ceilings.with_name("tune.csv"), args.batch)
    lines = rows(args.batch, kept_chip(), measured)
    write_table(args.out, HEADERS, lines, hidden=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
