"""Networks on the CPU: eager, fused and `torch.compile` with freezing, in turns; `python -m benchmarks.bench_cpu`.

Writes the CSV that the README's tables are made from (`results.Row`): latency of whole networks and of their bodies,
the time that fusing and packing take, and memory. `pytest benchmarks --benchmark-only` measures single cases by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import gettempdir
from time import perf_counter_ns

import torch
from tqdm import tqdm

import fused_resblock as frb
from fused_resblock.models import ARCHITECTURES
from fused_resblock.table import format_table

from . import memory, results
from .cases import BATCHES, DTYPES, NETWORKS, PARTS, PROVIDERS, SIZE, Case, exact_output, prepare, providers
from .harness import Disturbance, Outcome, Spread, compare
from .results import Row

OUT = results.FOLDER / "cpu.csv"
WHAT = ("latency", "fuse", "memory")


def latency(case: Case, rounds: int, tick: Callable[[], object], names: Sequence[str] = tuple(PROVIDERS)) -> list[Row]:
    """Time one forward of every named provider, "eager" among them."""
    model, x = prepare(case)
    made = providers(model, x, tuple(names))
    return latency_rows(case, compare(made, x, exact_output(model, x), rounds=rounds, tick=tick))


def latency_rows(case: Case, outcomes: Sequence[Outcome]) -> list[Row]:
    """A row for each provider, with its quotients to the others' medians where both were measured."""
    medians = {o.provider: o.spread.median_ms for o in outcomes if o.spread is not None}
    rows = []
    for outcome in outcomes:
        own, eager, compiled = (medians.get(name) for name in (outcome.provider, "eager", "compile"))
        rows.append(
            Row(
                "latency",
                **(vars(case) | {"provider": outcome.provider}),
                status="failed" if outcome.spread is None else "ok",
                **({} if outcome.spread is None else vars(outcome.spread)),
                speedup_vs_eager=eager / own if eager and own else None,
                ratio_to_compile=own / compiled if compiled and own else None,
                max_error=outcome.max_error,
                error_bound=outcome.error_bound,
                other_cores=outcome.other_cores,
                note=outcome.failure or "",
            )
        )
    return rows


@torch.no_grad()
def fusing(case: Case, rounds: int, tick: Callable[[], object]) -> list[Row]:
    """Time `fuse(model)`, its copy of the model included, and what the first call takes longer than the second."""
    model, x = prepare(case)
    frb.fuse(model)(x)  # imports and oneDNN's code generation are not what is measured
    fuse_ns, packing_ns = [], []
    disturbance = Disturbance()
    for _ in range(rounds):
        times = [perf_counter_ns()]
        fused = frb.fuse(model)
        times.append(perf_counter_ns())
        for _ in range(2):
            fused(x)
            times.append(perf_counter_ns())
        fuse_ns.append(times[1] - times[0])
        packing_ns.append(times[2] - times[1] - (times[3] - times[2]))
        tick()
    same = vars(case) | {"provider": "fused", "other_cores": disturbance.cores()}
    return [
        Row("fuse", **same, **vars(Spread.of(fuse_ns))),
        Row("packing", **same, **vars(Spread.of(packing_ns))),
    ]


def memory_rows(case: Case, forwards: int, tick: Callable[[], object]) -> list[Row]:
    """Measure the memory of eager and fused forwards in processes of their own."""
    rows = []
    for provider in ("eager", "fused"):
        same = vars(case) | {"provider": provider}
        shape = case.dtype, case.batch, case.size
        try:
            figures = memory.measure(case.network, provider, *shape, forwards, torch.get_num_threads())
            rows.append(Row("memory", **same, rounds=forwards, **figures))
        except RuntimeError as error:
            rows.append(Row("memory", **same, status="failed", note=str(error)))
        tick()
    return rows


def _jobs(args: argparse.Namespace) -> list[tuple[str, Case, Callable[..., list[Row]], int, int]]:
    """What is to be done: a title, the case, the function, its rounds, and its ticks."""
    jobs = []
    for network, dtype, batch, part in product(args.networks, args.dtypes, args.batches, args.parts):
        case = Case(network, part, dtype, batch, args.size)
        if "latency" in args.only:
            jobs.append((f"{case}", case, partial(latency, names=args.providers), args.rounds, args.rounds))
    for network, dtype in product(args.networks, args.dtypes):
        case = Case(network, "whole", dtype, min(args.batches), args.size)
        rounds = max(1, args.rounds // 3)
        if "fuse" in args.only:
            jobs.append((f"fuse {case}", case, fusing, rounds, rounds))
    for network, dtype, batch in product(args.networks, args.dtypes, args.batches):
        case = Case(network, "whole", dtype, batch, args.size)
        if "memory" in args.only:
            jobs.append((f"memory {case}", case, memory_rows, 5, 2))
    return jobs


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_cpu", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=tuple(ARCHITECTURES), default=NETWORKS, metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtypes", nargs="+", choices=(*DTYPES, "float16"), default=DTYPES)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N")
    parser.add_argument("--providers", nargs="+", choices=tuple(PROVIDERS), default=tuple(PROVIDERS), metavar="NAME")
    parser.add_argument("--only", nargs="+", choices=WHAT, default=WHAT, help="default: all three")
    parser.add_argument("--size", type=int, default=SIZE, metavar="PIXELS", help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="timed rounds (default: 30)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help="resnet18, batch 1, 64 pixels, 3 rounds: does it run?")
    parser.add_argument("--out", type=Path, metavar="CSV", help=f"is overwritten (default: {OUT}, unless --quick)")
    args = parser.parse_args(argv)
    if args.quick:
        args.networks, args.batches, args.size, args.rounds = ("resnet18",), (1,), 64, 3
    if "eager" not in args.providers:
        parser.error(f"providers must include eager, got {' '.join(args.providers)}")
    args.out = args.out or (Path(gettempdir()) / OUT.name if args.quick else OUT)
    least = {"batches": 1, "size": 64, "rounds": 1}  # below 64 the last stage has one pixel and no variance
    for name, bound in least.items():
        value = min(args.batches) if name == "batches" else getattr(args, name)
        if value < bound:
            parser.error(f"{name} must be at least {bound}, got {value}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"threads must be at least 1, got {args.threads}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a provider failed, else 0."""
    args = _arguments(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    marks = results.stamp()
    writer = results.Writer(args.out)
    failed = False
    jobs = _jobs(args)
    with tqdm(total=sum(ticks for *_, ticks in jobs), unit="round", disable=None) as bar:
        for title, case, job, rounds, _ in jobs:
            bar.set_description(title)
            rows = results.stamped(job(case, rounds, bar.update), marks)
            writer.write(rows)
            failed |= any(row.status == "failed" for row in rows)
            bar.write(f"\n{title}\n{_summary(rows)}")
    print(f"\nwrote {args.out}")
    return int(failed)


def _summary(rows: Sequence[Row]) -> str:
    """The figures of one job as a plain table, without columns in which nothing was measured."""
    columns = ("benchmark", "provider", "status", "median_ms", "p20_ms", "p80_ms", "speedup_vs_eager")
    columns += ("ratio_to_compile", "other_cores", "state_mib", "packed_mib", "imports_mib", "peak_rss_mib", "note")
    shown = [name for name in columns if any(getattr(row, name) not in (None, "") for row in rows)]
    cells = [[getattr(row, name) for name in shown] for row in rows]
    return format_table(shown, [[f"{c:.2f}" if isinstance(c, float) else c for c in line] for line in cells])


if __name__ == "__main__":
    raise SystemExit(main())
