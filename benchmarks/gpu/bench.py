"""Whole networks in fp16, bf16 and TF32, and blocks and stages of them: every provider checked, then timed in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fused_resblock.models import ARCHITECTURES

from ..cases import BLOCKS, BODY, exact_output
from ..harness import Outcome, as_left, compare
from . import onnx_session
from .context import Context
from .device import Broken, error_line, is_broken, is_out_of_memory
from .goals import Of
from .networks import L2_GROUPS, LABEL, Case, prepare, providers
from .operations import own, precision
from .records import Records

KEY = (*LABEL, "provider")
COLUMNS = ("status", "median_ms", "p20_ms", "p80_ms", "rounds", "speedup_vs_eager", "images_per_s")
COLUMNS += ("max_error", "error_bound", "extra_mib", "note")
BATCHES = (128, 1, 32, 256)
#: seconds that a group takes to make its providers, below which it is not begun
SECONDS = {"main": 20, "by-stage": 20, "cold": 20, "warm": 20, "compile": 90, "max-autotune": 240, "engines": 60}


def records(context: Context) -> Records:
    """The times."""
    return context.records("bench.csv", KEY, COLUMNS)


def cases(quick: bool = False, engines: bool | None = None) -> Iterator[Case]:
    """What is measured, what matters most first; with other engines where they are installed, unless told."""
    if quick:
        dtype = "fp16" if torch.cuda.is_available() else "ieee"
        yield Case("resnet18", 2, size=64, dtype=dtype)
        yield from (Case("resnet18", 2, "layer2.0", group, 64, dtype) for group in ("main", *L2_GROUPS))
        return
    others = [name for name in ARCHITECTURES if name not in ("resnet18", "resnet50")]
    yield from (Case(network, batch) for batch in BATCHES[:2] for network in ("resnet50", "resnet18"))
    yield from (Case("resnet50", 128, block) for block in BLOCKS)
    stages = ("layer1", "layer2", BODY)
    yield from (Case("resnet50", batch, part, "by-stage") for batch in (128, 64, 256) for part in stages)
    yield from (Case(network, batch) for batch in BATCHES[2:] for network in ("resnet50", "resnet18"))
    yield from (Case(network, 128) for network in others)
    yield from (Case(network, batch, group="compile") for network in ("resnet50", "resnet18") for batch in BATCHES[:2])
    yield from (Case(network, 128, group="max-autotune") for network in ("resnet50", "resnet18"))
    yield from (Case("resnet50", batch, part, "max-autotune") for batch in (128, 64, 256) for part in stages[:2])
    if onnx_session.available() if engines is None else engines:
        yield from (
            Case(network, batch, group="engines") for network in ("resnet50", "resnet18") for batch in BATCHES[:2]
        )
    yield from (Case(network, batch) for batch in BATCHES[1:] for network in others)
    yield from (Case(network, 128, group="compile") for network in others)
    yield from (Case("resnet50", 128, block, group) for group in L2_GROUPS for block in BLOCKS)
    yield from (Case("resnet18", 128, block) for block in BLOCKS)
    yield from (Case("resnet50", 128, block, "compile") for block in BLOCKS)
    yield from (
        Case(network, batch, dtype=dtype)
        for batch in BATCHES
        for dtype in ("bf16", "tf32")
        for network in ("resnet50", "resnet18", *others)
    )
    yield from (Case("resnet50", 128, group="compile", dtype=dtype) for dtype in ("bf16", "tf32"))
    yield from (Case(network, 128, group="max-autotune") for network in others)


def planned(quick: bool = False) -> list[tuple[Of, str]]:
    """What `goals.judge` is told of: the networks and parts that are to be measured, and in which groups."""
    return [(Of(c.network, c.part, c.dtype, c.batch), c.group) for c in cases(quick, engines=True)]


def smaller(case: Case) -> Case | None:
    """The same at half the batch; None at one image."""
    return None if case.batch == 1 else replace(case, batch=case.batch // 2)


def _record(case: Case, outcomes: list[Outcome], extra: dict[str, int | None], table: Records) -> None:
    medians = {o.provider: o.spread.median_ms for o in outcomes if o.spread is not None}
    for outcome in outcomes:
        own, eager, used = medians.get(outcome.provider), medians.get("eager"), extra.get(outcome.provider)
        table.add(
            **case.label(),
            provider=outcome.provider,
            status="failed" if outcome.spread is None else "ok",
            **({} if outcome.spread is None else vars(outcome.spread)),
            speedup_vs_eager=eager / own if eager and own else None,
            images_per_s=case.batch / own * 1e3 if own else None,
            max_error=outcome.max_error,
            error_bound=outcome.error_bound,
            extra_mib=None if used is None else used / 2**20,
            note=outcome.failure,
        )


@torch.no_grad()
def bounding_output(dtype: str, model: nn.Module, x: Tensor, exact: Tensor) -> Tensor:
    """The output whose error sets the bound: torch's own, or an ideal TF32 unit's where that is further off.

    cuDNN may do without TF32 though it is allowed.
    """
    results = [model(x)]
    if dtype == "tf32":
        results.append(own(dtype, lambda: model(x)))
    return max(results, key=lambda y: (y - exact).square().mean().item())


def measure(context: Context, case: Case, table: Records) -> None:
    """Check and time the providers of one case, and record them.

    Raises:
        RuntimeError: if memory runs out.
    """
    device = context.device
    prepared = {"cold": lambda _: device.flush_l2(), "warm": lambda call: call()}
    with precision(case.dtype) as dtype:
        model, x = prepare(case, device.torch_name, dtype)
        made = providers(case, model, x, device)
        exact = exact_output(model, x)
        same_dtype = bounding_output(case.dtype, model, x, exact)
        device.free()
        outcomes = compare(
            made,
            x,
            exact,
            rounds=context.rounds(20 if case.batch >= 128 else 50),
            clock=device.clock,
            prepare=prepared.get(case.group, as_left),
            same_dtype=same_dtype,
        )
    for outcome in outcomes:
        if outcome.failure is not None and is_broken(RuntimeError(outcome.failure)):
            raise Broken(outcome.failure)
    _record(case, outcomes, {name: m.extra_bytes for name, m in made.items()}, table)
    told = ", ".join(f"{o.provider} {o.spread.median_ms:.3f}" for o in outcomes if o.spread is not None)
    context.log(f"bench: {case}: {told} ms")
    for outcome in outcomes:
        if outcome.failure is not None:
            context.log(f"bench: {case}: {outcome.provider} has no time: {outcome.failure}")


def _refuse(case: Case, table: Records, status: str, note: str) -> None:
    for name in ("all", "eager"):  # "all" ends the case, "eager" shows that it was tried
        table.add(**case.label(), provider=name, status=status, note=note)


def _halved(case: Case, table: Records, todo: Sequence[Case]) -> list[Case]:
    """The same at half the batch, if memory ran out and it is not planned yet."""
    half = smaller(case) if table.rows(**case.label(), provider="all", status="oom") else None
    return [] if half is None or half in todo else [half]


def run(context: Context) -> int:
    """Measure what is not yet measured; 1 if a provider gave a wrong result."""
    table = records(context)
    torch.backends.cudnn.benchmark = True
    todo = list(cases(context.quick))
    left = 0
    for case in todo:  # grows by smaller batches
        label = case.label()
        if table.done(*label.values(), "all"):
            todo += _halved(case, table, todo)  # if that was never begun
            continue
        if not context.deadline.allows(0 if context.quick else SECONDS[case.group]):
            left += 1
            continue
        try:
            with table.running(**label, provider="all"):
                measure(context, case, table)
            table.add(**label, provider="all", status="measured")
        except Broken as error:
            _refuse(case, table, "crash", str(error))
            raise
        except Exception as error:  # of a model, a peer or a compiler
            if is_broken(error):
                _refuse(case, table, "crash", error_line(error))
                raise Broken(f"{case}: {error_line(error)}") from error
            out = is_out_of_memory(error)
            _refuse(case, table, "oom" if out else "failed", error_line(error))
            context.log(f"bench: {case}: {'out of memory' if out else error_line(error)}")
            todo += _halved(case, table, todo)
        context.device.free()
    if left:
        context.log(f"bench: {left} cases left")
    wrong = [row for row in table.rows() if "exceeds" in row["note"] or "changes its input" in row["note"]]
    return int(bool(wrong))
