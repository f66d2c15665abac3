"""The fastest right tile of every convolution, held against cuDNN: with a cold L2, and with a warm one (`warm_us`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resblock.backends import cudnn, tuned
from fused_resblock.kernels.bn_act import bn_act
from fused_resblock.kernels.tables import BACKENDS, scratch_us, winner
from fused_resblock.kernels.tiles import Tile
from fused_resblock.params import Epilogue

from ..harness import Spread, parity
from ..shapes import ConvShape
from . import check, cudnn_graph, space, stems, tails
from .context import Context
from .device import Broken, error_line, is_broken, is_out_of_memory
from .operations import DTYPES, Operation, build, once_each, own, precision
from .records import Records, read_json, write_json
from .timing import ROUNDS, micros

KEY = ("dtype", "case", "batch", "backend", "tile")
COLUMNS = ("status", "median_us", "p20_us", "p80_us", "rounds", "warm_us", "tflops", "tb_per_s", "sets", "note")
BATCHES = (128, 32, 1)
#: (dtype, batches) in the order in which they are tuned
PLAN = (("fp16", BATCHES), ("bf16", (128,)), ("tf32", (32,)))
#: tiles that are timed again, at length, after a short look at all
FINALISTS, LOOK = 4, 5
MOST_SETS = 16


def records(context: Context) -> Records:
    """The times."""
    return context.records("tune.csv", KEY, COLUMNS)


def cudnn_fused(op: Operation) -> Tensor:
    """cuDNN's fused convolutions on folded weights."""
    return op.run(cudnn.bind_conv_bn_act, overwrite=False)(op.x, op.other)


def cudnn_epilogue(op: Operation) -> Tensor:
    """cuDNN's plain convolutions, then one Triton pass for norm, residual and ReLU."""
    conv = op.conv
    z = F.conv2d(op.x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    branch = op.epilogue.shortcut
    if branch is None or op.other is None:
        return bn_act(z, conv.norm, op.other)
    other = F.conv2d(op.other, branch.weight, None, branch.stride)
    return bn_act(z, conv.norm, other, Epilogue(residual_norm=branch.norm))


PEERS: dict[str, Callable[[Operation], Tensor]] = {"cudnn": cudnn_fused, "cudnn+bn_act": cudnn_epilogue}


def peers() -> dict[str, Callable[[Operation], Tensor]]:
    """What the kernels are held against: `PEERS`, and cuDNN's graphs where nvidia-cudnn-frontend is installed."""
    return PEERS | ({"cudnn-frontend": cudnn_graph.runner()} if cudnn_graph.available() else {})


def sets(op: Operation, l2_bytes: int) -> int:
    """Copies of the operands that are rotated so that none is in L2 when its turn comes, at least one more than fit."""
    return min(MOST_SETS, 1 + -(-l2_bytes // op.bytes()))


def timed(context: Context, ops: Sequence[Operation], function: Callable[[Operation], Tensor], rounds: int) -> Spread:
    """Time a function over the rotated operands."""
    calls = [lambda op=op: function(op) for op in ops]
    return Spread.of(context.device.times(calls, context.rounds(rounds)))


class Case:
    """One convolution at one batch: times its tiles and its peers."""

    def __init__(self, context: Context, table: Records, dtype: str, shape: ConvShape, batch: int) -> None:
        self.context, self.table = context, table
        self.labels = {"dtype": dtype, "case": space.key_of(shape), "batch": batch}
        device = context.device.torch_name
        first = build(shape, batch, DTYPES[dtype][0], device)
        count = sets(first, context.device.l2_bytes)
        self.ops = [first, *(build(shape, batch, DTYPES[dtype][0], device, seed) for seed in range(1, count))]
        self._judged: tuple[Tensor, Tensor] | None = None

    def judge(self, function: Callable[[Operation], Tensor]) -> str | None:
        """What is wrong with a result at this batch, or None."""
        if self._judged is None:
            op = self.ops[0]
            self._judged = own(self.labels["dtype"], op.plain), op.to(torch.float64).plain()
        return parity(function(self.ops[0]), *self._judged)[0]

    def look(self, tiles: Sequence[str]) -> list[str]:
        """Time every tile shortly; the fastest few."""
        times = {}
        for name in tiles:
            try:
                with self.table.running(**self.labels, backend="triton", tile=name):
                    spread = timed(self.context, self.ops, triton_with(name), LOOK)
                self.table.add(**self.labels, backend="triton", tile=name, status="look", **micros(spread))
                times[name] = spread.median_ms
            except Exception as error:  # it was right at another batch, but may still fail to run
                self._lost(error, "triton", name)
        return sorted(times, key=times.__getitem__)[:FINALISTS]

    def _lost(self, error: Exception, backend: str, tile: str) -> None:
        if is_out_of_memory(error):
            raise error
        status = "crash" if is_broken(error) else "failed"
        self.table.add(**self.labels, backend=backend, tile=tile, status=status, note=error_line(error))
        if status == "crash":
            raise Broken(error_line(error)) from error

    def measure(self, backend: str, function: Callable[[Operation], Tensor], tile: str = "") -> float | None:
        """Judge, time and record; the median in microseconds, None if there is none."""
        try:
            with self.table.running(**self.labels, backend=backend, tile=tile):
                fault = self.judge(function)
                if fault is None:
                    spread = timed(self.context, self.ops, function, ROUNDS)
                    warm = timed(self.context, self.ops[:1], function, ROUNDS)  # the same operands again and again
        except Exception as error:  # cuDNN refuses some shapes, and is absent on a CPU
            self._lost(error, backend, tile)
            return None
        if fault is not None:
            self.table.add(**self.labels, backend=backend, tile=tile, status="wrong", note=fault)
            return None
        us, op = 1e3 * spread.median_ms, self.ops[0]
        self.table.add(
            **self.labels,
            backend=backend,
            tile=tile,
            status="ok",
            **micros(spread),
            warm_us=1e3 * warm.median_ms,
            tflops=op.flops() / us / 1e6,
            tb_per_s=op.bytes() / us / 1e6,
            sets=len(self.ops),
        )
        return us


def triton_with(tile: str) -> Callable[[Operation], Tensor]:
    """The Triton kernel with a named tile, bound once for each operation."""
    return once_each(lambda op: op.bind(Tile.parse(tile)))


def right_tiles(verdicts: Records, dtype: str, case: str) -> list[str]:
    """The tiles that `check` found right."""
    return [row["tile"] for row in verdicts.rows(kernel="conv_bn_act", dtype=dtype, case=case, status="ok")]


def write_winners(context: Context, table: Records) -> int:
    """Write the winner of each case to tiles.json; how many there are."""
    shapes = {space.key_of(shape): shape for shape in check.shapes(context)}
    best: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}

    def counted_us(row: dict[str, str]) -> float:
        shape, us = shapes[row["case"]], float(row["median_us"])
        if not row["tile"]:
            return us
        pixels = int(row["batch"]) * shape.out_size**2
        return us + scratch_us(Tile.parse(row["tile"]), shape.stride > 1, pixels, shape.out_channels)

    for row in (row for row in table.rows(status="ok") if row["case"] in shapes):
        by_backend = best.setdefault((row["dtype"], row["case"], row["batch"]), {})
        before = by_backend.get(row["backend"])
        if before is None or counted_us(row) < counted_us(before):
            by_backend[row["backend"]] = row
    winners = []
    for (dtype, case, batch), rows in best.items():
        shape = shapes[case]
        us = {name: float(row["median_us"]) for name, row in rows.items()}
        if not any(name in BACKENDS for name in us):  # a peer may be a way that the library does not offer
            continue
        winners.append(
            {
                "dtype": dtype,
                "case": space.case_of(shape),
                "pixels": int(batch) * shape.out_size**2,
                "backend": winner(us, shape.weights() * DTYPES[dtype][0].itemsize),
                "tile": rows["triton"]["tile"] if "triton" in rows else None,
                "us": us,
            }
        )
    winners += stems.winners(context, table)
    if winners or not read_json(context.folder / "tiles.json"):
        marks = {name: context.stamp.get(name) for name in ("gpu", "driver", "torch", "triton", "commit", "date")}
        gpu = context.device.gpu
        head = {**marks, "capability": gpu.capability, "multiprocessors": gpu.multiprocessors}
        write_json(context.folder / "tiles.json", {**head, "winners": winners, "stages": tails.winners(context, table)})
    return len(winners)


def convolutions(context: Context, verdicts: Records, table: Records, dtype: str, batch: int) -> int:
    """Tune the convolutions of a dtype at a batch that are not tuned; how many are left."""
    for shape in check.shapes(context):
        case = space.key_of(shape)
        if table.done(dtype, case, batch, "all", ""):
            continue
        if not context.deadline.allows(5):
            break
        lost = {r["backend"] + r["tile"] for r in table.rows(dtype=dtype, case=case, batch=batch, status="crash")}
        tiles = [tile for tile in right_tiles(verdicts, dtype, case) if "triton" + tile not in lost]
        if not tiles and not lost:  # none has been checked yet
            continue
        try:
            with precision(dtype):
                tuning = Case(context, table, dtype, shape, batch)
                found = {name: tuning.measure(name, call) for name, call in peers().items() if name not in lost}
                for name in tuning.look(tiles):
                    us = tuning.measure("triton", triton_with(name), name)
                    found["triton"] = min((t for t in (us, found.get("triton")) if t is not None), default=None)
            told = ", ".join(f"{name} {us:.1f}" for name, us in found.items() if us is not None)
            context.log(f"tune: {dtype} {case} batch {batch}: {told} us")
            table.add(dtype=dtype, case=case, batch=batch, backend="all", tile="", status="tuned")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            table.add(dtype=dtype, case=case, batch=batch, backend="all", tile="", status="oom", note=error_line(error))
            context.log(f"tune: {dtype} {case} batch {batch}: out of memory")
            context.device.free()
    return sum(not table.done(dtype, space.key_of(shape), batch, "all", "") for shape in check.shapes(context))


@torch.no_grad()
def run(context: Context) -> int:
    """Tune what is not yet tuned; 1 if nothing has been checked."""
    verdicts, table = check.records(context), records(context)
    if not verdicts.rows(kernel="conv_bn_act", status="ok"):
        context.log("tune: no tile has been found right on this GPU: run the step check first")
        return 1
    torch.backends.cudnn.benchmark = True
    plan = [("ieee", 2)] if context.quick else [(dtype, batch) for dtype, batches in PLAN for batch in batches]
    left = 0
    for dtype, batch in plan:
        left += convolutions(context, verdicts, table, dtype, batch)
        for backend in ("stage", "block"):  # held against the fastest tiles of convolutions, and then of tails
            if write_winners(context, table) and context.device.torch_name == "cuda":
                tuned.load_config(context.folder / "tiles.json")
            left += tails.tune(context, verdicts, table, dtype, batch, backend)
        left += stems.tune(context, table, dtype, batch)
    context.log(f"tune: {write_winners(context, table)} winners" + (f"; {left} cases left" if left else ""))
    return 0
