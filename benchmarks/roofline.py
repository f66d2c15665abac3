"""What a chip's ceilings allow each block and network, and what our plan should take: `python -m benchmarks.roofline`.

Four floors a block: eager (every operation reads and writes memory), per-conv (every convolution fused with what
follows it, the best that fusion conv by conv can do), stage (a block's tail and the next one's head as one kernel) and
whole (a block that reads its input and writes its output once). Beside them the prediction for our kernels with the
tiles that the heuristic picks. Ceilings come from the `ceilings.json` of a measured chip in `benchmarks/results/`
(`make gpu-check`), the rate of L2 from the convolutions in the `tune.csv` beside it (`predictions.fitted_l2`), and what
was measured from `bench.csv`; with `--assumed`, or without a measured chip, from `NOMINAL`, which no run of this code
measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fused_resblock.kernels.cost import Ceilings
from fused_resblock.table import format_table

from .cases import BODY
from .floors import DEPTHS, STAGES, Floors, network_floors, stem_floors
from .predictions import fitted_l2
from .result_tables import read_table

RESULTS = Path(__file__).parent / "results" / "roofline.csv"
NOMINAL = Ceilings("H100 (assumed: 3.0 TB/s, L2 5.5 TB/s, 700 TFLOP/s)", 3.0e12, 5.5e12, 700e12, 132)


def kept_ceilings() -> Path | None:
    """The `ceilings.json` of a measured chip in `benchmarks/results/`, if there is one."""
    return next(iter(sorted(RESULTS.parent.glob("*/ceilings.json"))), None)


def read_ceilings(path: Path | None) -> Ceilings:
    """The ceilings in a `ceilings.json` (see `benchmarks.gpu.ceilings`); `NOMINAL` for no path.

    Raises:
        ValueError: if the file does not hold them.
    """
    if path is None:
        return NOMINAL
    data = json.loads(path.read_text(encoding="utf-8"))
    names = ("copy_tb_per_s", "l2_copy_tb_per_s", "bf16_matrix_tflops")
    if not isinstance(data, dict):
        raise ValueError(f"ceilings must hold an object, got {type(data).__name__}")
    try:
        dram, l2, matrix = (1e12 * float(data[name]) for name in names)
        chip = Ceilings(f"{data['gpu']} (measured ceilings)", dram, l2, matrix, int(data["multiprocessors"]))
    except KeyError as error:
        needed = f"gpu, multiprocessors, {', '.join(names)}"
        raise ValueError(f"ceilings must hold {needed}, got no {error}") from None
    for name, rate in zip((*names, "multiprocessors"), (dram, l2, matrix, chip.multiprocessors), strict=True):
        if not 0 < rate < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {data[name]}")
    return chip


def kept_chip() -> Ceilings:
    """The ceilings of the chip in `benchmarks/results/`, with L2's rate as its convolutions show it; else `NOMINAL`."""
    path = kept_ceilings()
    chip = read_ceilings(path)
    tuned = path.with_name("tune.csv") if path else None
    if tuned is None or not tuned.exists():
        return chip
    l2 = fitted_l2(read_table(tuned), chip)
    return replace(chip, l2=l2, name=f"{chip.name.removesuffix(')')}, L2's fitted: {l2 / 1e12:.1f} TB/s)")


def read_measured(path: Path | None) -> dict[tuple[str, str, str], float]:
    """Microseconds of what ran fused as CUDA graphs, by network, row of the table and batch.

    Networks ran whole, with the classifier, and beside the body there are stages of it; blocks ran alone, so conv by
    conv.
    """
    if path is None:
        return {}
    found: dict[tuple[str, str, str], float] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            part, stage = row["part"], row["group"] == "by-stage"
            ours = (row["status"], row["provider"], row["dtype"]) == ("ok", "fused+graph", "fp16")
            if ours and (stage or row["group"] == "main"):
                name = {"whole": "stem and body", BODY: "body"}.get(part, part)
                name = re.sub(r"^layer(\d)\.(\d)$", lambda m: f"l{m[1]}" + ".first" * (m[2] == "0"), name)
                found[row["network"], name, row["batch"]] = round(1e3 * float(row["median_ms"]), 1)
    return found


def stages(network: str, batch: int, itemsize: int, chip: Ceilings) -> list[tuple[str, int, Floors]]:
    """Each stage alone, as it is measured: "layer1" to "layer4". In a body the last tail of a stage may do more."""
    return [(f"layer{n}", 1, network_floors(network, batch, itemsize, chip, [n])[0]) for n in STAGES]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument(
        "--ceilings", type=Path, metavar="FILE.json", help="of a measured chip; default: the kept one's"
    )
    parser.add_argument("--measured", type=Path, metavar="FILE.csv", help="what `make gpu-bench` measured on it, fp16")
    parser.add_argument("--assumed", action="store_true", help="ceilings that nobody measured")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--itemsize", type=int, default=2, choices=(2, 4), help="bytes of an element")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE.csv")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"batch must be at least 1, got {args.batch}")
    kept = None if args.ceilings is not None or args.assumed else kept_ceilings()
    if kept is not None:
        beside = kept.with_name("bench.csv")
        args.measured = args.measured or (beside if beside.exists() else None)
    try:
        chip = read_ceilings(args.ceilings) if kept is None else kept_chip()
        measured = read_measured(args.measured)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"ceilings and measured must name files of make gpu, got {error}")
    rows = []
    for network in DEPTHS:
        total, blocks = network_floors(network, args.batch, args.itemsize, chip)
        stem = stem_floors(args.batch, args.itemsize, chip)
        alone = stages(network, args.batch, args.itemsize, chip)
        parts = [("stem", 1, stem), *blocks, *alone, ("body", 1, total), ("stem and body", 1, stem + total)]
        for block, count, floors in parts:
            micros = [round(1e6 * value, 1) for value in vars(floors).values()]
            seen = measured.get((network, block, str(args.batch)))
            rows.append([chip.name, network, args.batch, args.itemsize, block, count, *micros, seen or "not measured"])
    headers = ["chip", "network", "batch", "itemsize", "block", "count"]
    headers += ["eager_us", "per_conv_us", "stage_us", "whole_us", "predicted_us", "predicted_stage_us"]
    headers += ["predicted_whole_us", "measured_us"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([headers, *rows])
    print(chip.name)
    print(format_table(headers[1:], [row[1:] for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
