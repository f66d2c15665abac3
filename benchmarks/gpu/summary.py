"""The last thing that is printed: what was found, in a few lines."""

from __future__ import annotations

from fused_resblock.table import format_table

from . import bandwidth, bench, ceilings, check, goals, profile, tune
from .context import Context
from .networks import L2_GROUPS
from .records import Row, read_json

KERNELS = ("conv_bn_act", "bn_act", "relu_backward", "expand_shift", "bottleneck_rows", "stem")
PROVIDERS = (
    "eager",
    "folded",
    "cudnn",
    "fused",
    "frozen",
    "triton",
    "stages",
    "in-order",
    "conv-by-conv",
    "compile",
    "max-autotune",
    "onnxruntime",
)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {status}" for status, number in sorted(counts.items())) or "none"


def _networks(rows: list[Row]) -> str:
    """Median milliseconds by case, a column a provider, eager mode and CUDA graph on lines of their own."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        provider, _, graph = row["provider"].partition("+")
        if provider not in PROVIDERS:
            continue
        launch = (graph or "eager") + (f", L2 {row['group']}" if row["group"] in L2_GROUPS else "")
        text = f"{float(row['median_ms']):.3f}" if row["status"] == "ok" else row["status"]
        line = lines.setdefault((row["network"], row["part"], row["dtype"], row["batch"], launch), {})
        if row["group"] == "main" or provider not in line:
            line[provider] = text
    shown = [name for name in PROVIDERS if any(name in line for line in lines.values())]
    cells = [[*key, *(line.get(name) for name in shown)] for key, line in lines.items()]
    return (
        format_table(["network", "part", "dtype", "batch", "launch", *shown], cells)
        if cells
        else "no networks measured"
    )


def text(context: Context) -> str:
    """The summary of everything in the folder that belongs to this GPU, these versions and this commit."""
    rates = read_json(context.folder / "ceilings.json")
    verdicts, times = check.records(context), tune.records(context)
    networks = bench.records(context).rows()
    kernels = [row for row in verdicts.rows() if row["kernel"] in KERNELS]
    others = [row for row in verdicts.rows() if row not in kernels]
    winners = read_json(context.folder / "tiles.json").get("winners", [])
    by_backend: dict[str, int] = {}
    for winner in winners:
        by_backend[winner["backend"]] = by_backend.get(winner["backend"], 0) + 1
    stages = read_json(context.folder / "tiles.json").get("stages", [])
    stamp = context.stamp
    judged = goals.judge(networks, bench.planned(context.quick))
    judged += goals.besides(
        [], bandwidth.shares(times.rows(), {stamp["gpu"]: rates} if "copy_tb_per_s" in rates else {})
    )
    lines = [
        f"{stamp['gpu']}, driver {stamp.get('driver')}, torch {stamp.get('torch')}, Triton {stamp.get('triton')}, "
        f"fused_resblock {stamp.get('fused_resblock')} ({stamp.get('commit')}), {stamp.get('date')}",
    ]
    if "l2_copy_tb_per_s" in rates:
        lines.append(ceilings.line(rates))
    lines += [
        f"kernels and tiles checked: {_counts(verdicts.count('status', kernels))}",
        f"tests, memory check, CUDA graph: {_counts(verdicts.count('status', others))}",
        f"convolutions tuned: {len(times.rows(status='tuned', backend='all'))}; fastest: {_counts(by_backend)}",
        f"as one kernel faster: {sum(row['faster'] for row in stages)} of {len(stages)} tails and blocks timed",
        f"launches profiled: {len(profile.records(context).rows(status='ok'))}",
        "",
        "channels_last, median ms:",
        _networks(networks),
        "",
        format_table(["goal", "measured", "met"], [list(line) for line in judged]),
    ]
    return "\n".join(lines)


def run(context: Context) -> int:
    """Print the summary and keep it."""
    told = text(context)
    (context.folder / "summary.txt").write_text(told + "\n", encoding="utf-8")
    print(f"\n{told}", flush=True)
    return 0
