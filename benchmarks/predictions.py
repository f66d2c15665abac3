"""How good the choice of tiles is where none was measured: predictions held against the tiles that a GPU has timed.

`python -m benchmarks.predictions` or `make roofline`. From the `tune.csv` of a GPU in `benchmarks/results/`: what each
tile should have taken over what it took, and the time of the tile that the heuristic picks over that of the fastest.
Of a convolution those were timed that a short look left (`gpu.tune.FINALISTS`): a pick that is not among them was
slower, or did not run. Of a tail every tile was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from tqdm import tqdm

from fused_resblock.kernels.choice import chip_of, predicted_seconds
from fused_resblock.kernels.convolution import gemms_of
from fused_resblock.kernels.cost import Ceilings
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.stage import choose_stage_tile
from fused_resblock.kernels.stage import predicted_seconds as tail_seconds
from fused_resblock.kernels.tiles import StageTile, Tile

from .gpu.block_shapes import shapes as block_shapes
from .gpu.operations import DTYPES, build, precision
from .gpu.space import chosen, distinct_shapes, key_of
from .gpu.tail_shapes import shapes as tail_shapes
from .result_tables import read_table, write_table
from .results import FOLDER

RESULTS = FOLDER / "predictions.csv"
HEADERS = ("gpu", "kind", "dtype", "batch", "tiles", "over_measured", "cases", "picked")
HEADERS += ("over_fastest", "worst_over_fastest")
#: the kind of operation by the name of its times in `tune.csv`
KINDS = {"triton": "convolutions", "stage": "tails", "block": "blocks"}
H100 = Gpu()
STEPS = 12  # of a bisection
FIT_BATCH, FIT_DTYPES = 128, ("fp16", "bf16")


class Timed(NamedTuple):
    """A tile that was timed: microseconds, the prediction by a chip's ceilings, and whether it is the one picked."""

    gpu: str
    kind: str
    dtype: str
    batch: int
    case: str
    us: float
    seconds: Callable[[Ceilings], float]
    picked: bool

    def over_measured(self, chip: Ceilings) -> float:
        """What was predicted over what was measured."""
        return 1e6 * self.seconds(chip) / self.us


def timed(rows: Iterable[Mapping[str, str]]) -> Iterator[Timed]:
    """The tiles of our kernels in a `tune.csv` of an H100."""
    convolutions = {key_of(shape): shape for shape in distinct_shapes()}
    tails = {shape.key(): shape for shape in tail_shapes(False)}
    blocks = {shape.key(): shape for shape in block_shapes(False)}
    for row in rows:
        kind, case, dtype, batch = KINDS.get(row["backend"], ""), row["case"], row["dtype"], int(row["batch"])
        itemsize = DTYPES[dtype][0].itemsize
        if row["status"] != "ok":
            continue
        seconds: Callable[[Ceilings], float]
        if kind == "convolutions" and case in convolutions:
            shape, tile = convolutions[case], Tile.parse(row["tile"])
            with precision(dtype) as torch_dtype:
                x, conv, _, epilogue = build(shape, batch, torch_dtype, "meta").prepared()
            gemm, second = gemms_of(x, conv, epilogue)
            seconds = partial(predicted_seconds, gemm, itemsize, tile, residual=shape.residual, second=second)
            picked = tile == chosen(shape, batch, dtype, H100)
        elif kind == "tails" and case in tails:
            gemms, stage_tile = tails[case].build(batch, DTYPES[dtype][0], "meta").gemms(), StageTile.parse(row["tile"])
            seconds = partial(tail_seconds, gemms, itemsize, stage_tile)
            picked = stage_tile == choose_stage_tile(gemms, itemsize, H100)
        elif kind == "blocks" and case in blocks:
            seconds = blocks[case].seconds(batch, StageTile.parse(row["tile"]))
            picked = False  # a table alone picks it
        else:
            continue
        yield Timed(row["gpu"], kind, dtype, batch, case, float(row["median_us"]), seconds, picked)


def fitted_l2(rows: Iterable[Mapping[str, str]], chip: Ceilings) -> float:
    """Bytes a second from L2 at which half of the predictions for convolutions are too low, and half too high.

    Of those in 16 bits at batch 128: in smaller ones launches count, and in TF32 the matrix units have another rate.
    The chip's own where none was timed.

    Args:
        rows: of a `tune.csv`.
        chip: the other ceilings.
    """
    tiles = [t for t in timed(rows) if (t.kind, t.batch) == ("convolutions", FIT_BATCH) and t.dtype in FIT_DTYPES]
    if not tiles:
        return chip.l2
    low, high = 1e12, 32e12
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        too_long = median(tile.over_measured(replace(chip, l2=middle)) for tile in tiles) > 1
        low, high = (middle, high) if too_long else (low, middle)
    return low


def summary(tiles: Iterable[Timed], chip: Ceilings) -> list[list[object]]:
    """A line for each kind, dtype and batch: see `HEADERS`.

    Tiles, the median of predicted over measured; cases, in how many of them the tile that is picked was timed, the mean
    and the largest of its time over that of the fastest.
    """
    groups: dict[tuple[str, str, str, int], list[Timed]] = {}
    for tile in tiles:
        groups.setdefault(tile[:4], []).append(tile)
    lines: list[list[object]] = []
    for key, group in sorted(groups.items()):
        fastest: dict[str, float] = {}
        for tile in group:
            fastest[tile.case] = min(tile.us, fastest.get(tile.case, tile.us))
        over = [tile.us / fastest[tile.case] for tile in group if tile.picked]
        known = [f"{mean(over):.3f}", f"{max(over):.3f}"] if over else ["", ""]
        ratio = median(tile.over_measured(chip) for tile in group)
        lines.append([*key, len(group), f"{ratio:.2f}", len(fastest), len(over), *known])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE.csv")
    args = parser.parse_args(argv)
    rows = [row for path in sorted(args.results.glob("*h100*/tune.csv")) for row in read_table(path)]
    lines = summary(timed(tqdm(rows, disable=None)), chip_of(H100))
    write_table(args.out, HEADERS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
