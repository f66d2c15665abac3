"""Three designs at two rates of L2: `python -m benchmarks.l2_rates`, a part of `make roofline`.

Which design is predicted to win, conv by conv, the stage kernel or a whole bottleneck as one kernel, turns on how fast
tiles come from L2. A copy within L2 was measured (`ceilings.json`); the tiles of the convolutions that were timed came
faster (`predictions.fitted_l2`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fused_resblock.kernels.cost import Ceilings

from .floors import network_floors
from .result_tables import read_table, write_table
from .results import FOLDER
from .roofline import kept_ceilings, kept_chip, read_ceilings, stages

RESULTS = FOLDER / "l2_rates.csv"
HEADERS = ("chip", "batch", "l2_tb_per_s", "of", "network", "part")
HEADERS += ("predicted_us", "predicted_stage_us", "predicted_whole_us")
HEADERS += ("measured_conv_by_conv_us", "measured_us")
NETWORKS = ("resnet50", "wide_resnet50_2")
BATCH = 128


def measured(bench: Path) -> dict[tuple[str, str, str], float]:
    """Microseconds of stages of a network as CUDA graphs, by network, stage and way: "conv-by-conv" or "fused"."""
    found: dict[tuple[str, str, str], float] = {}
    for row in read_table(bench):
        here = (row["group"], row["dtype"], row["batch"], row["status"]) == ("by-stage", "fp16", str(BATCH), "ok")
        name, _, graph = row["provider"].partition("+")
        if here and graph:
            found[row["network"], row["part"], name] = round(1e3 * float(row["median_ms"]), 1)
    return found


def lines(chip: Ceilings, of: str, known: dict[tuple[str, str, str], float]) -> Iterator[list[object]]:
    """The first two stages and the body of each network by a chip's ceilings."""
    for network in NETWORKS:
        total, _ = network_floors(network, BATCH, 2, chip)
        first_two = stages(network, BATCH, 2, chip)[:2]
        for part, floors in (*((name, f) for name, _, f in first_two), ("layer1-4", total)):
            times = [f"{1e6 * t:.1f}" for t in (floors.ours, floors.ours_stage, floors.ours_whole)]
            if floors.ours_whole == floors.ours_stage:  # no block of it is narrow enough
                times[2:] = ["-"]
            seen = [known.get((network, part, name), "") for name in ("conv-by-conv", "fused")]
            yield [chip.name.partition(" (")[0], BATCH, f"{chip.l2 / 1e12:.1f}", of, network, part, *times, *seen]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.l2_rates", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE.csv")
    args = parser.parse_args(argv)
    path = kept_ceilings()
    if path is None:
        parser.error("a ceilings.json must be in benchmarks/results/, got none")
    known = measured(path.with_name("bench.csv"))
    table = [*lines(read_ceilings(path), "a copy within L2", known)]
    table += lines(kept_chip(), "convolutions that were timed", known)
    write_table(args.out, HEADERS, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
