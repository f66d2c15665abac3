"""Timing several ways to compute the same thing: correctness first, then rounds in which they take turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter, perf_counter_ns

import torch
from torch import Tensor

from fused_resblock.machine import other_busy_seconds
from fused_resblock.table import error_line

#: how many times eager PyTorch's own error (same dtype, against float64) a provider's error may be, and what share of
#: the largest exact value is allowed on top, for the case where PyTorch happens to be exact.
SLACK, FLOOR = 2.0, 1e-6
WARM_UP = 3
#: the provider whose error sets the bound of all
BASELINE = "eager"

Call = Callable[[Tensor], Tensor]
Prepare = Callable[[Callable[[], object]], None]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of a series of times in milliseconds, and how many there were."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int

    @classmethod
    def of(cls, samples_ns: Sequence[int]) -> Spread:
        """Summarise times given in nanoseconds; percentiles are interpolated between the nearest two."""
        fifths = quantiles(samples_ns, n=5, method="inclusive") if len(samples_ns) > 1 else list(samples_ns) * 4
        return cls(median(samples_ns) / 1e6, fifths[0] / 1e6, fifths[3] / 1e6, len(samples_ns))


@dataclass(frozen=True)
class Outcome:
    """What became of one provider: its times, or why it has none; its largest error and the bound on it.

    `other_cores` is how many cores other programs kept busy, on average, while it was timed.
    """

    provider: str
    spread: Spread | None
    failure: str | None = None
    max_error: float | None = None
    error_bound: float | None = None
    other_cores: float | None = None


class Disturbance:
    """How many cores other programs keep busy, from the moment that this is made."""

    def __init__(self) -> None:
        self._began, self._busy = perf_counter(), other_busy_seconds()

    def cores(self) -> float:
        """The average up to now."""
        return (other_busy_seconds() - self._busy) / (perf_counter() - self._began)


def turn(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: each round starts one provider later, and every other cycle runs backwards.

    So each provider takes every place equally often and comes as often before each other one as after it.
    """
    start = number % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if number // len(names) % 2 else order


def as_left(call: Callable[[], object]) -> None:
    """No preparation: caches are as whatever ran before has left them."""


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = WARM_UP,
    clock: Callable[[], int] = perf_counter_ns,
    tick: Callable[[], object] = _nothing,
    prepare: Prepare = as_left,
) -> dict[str, Spread]:
    """Time every call once a round, in the order of `turn`; drifts of the machine then fall on all alike.

    Unless `prepare` sees to them, caches are as the provider before left them (warm weights only where they fit beside
    another provider's). The garbage collector is off while the clock runs. Times are wall-clock times of CPU work.

    Args:
        calls: name -> what to time.
        rounds: how many times each is timed, at least 1.
        warm_up: how many times each is called untimed before.
        clock: nanoseconds.
        tick: called after each round, for a progress bar.
        prepare: called with what is about to be timed, before the clock is read.

    Raises:
        ValueError: if rounds is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    samples: dict[str, list[int]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warm_up):
            call()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name in turn(list(calls), number):
                call = calls[name]
                prepare(call)
                start = clock()
                call()
                samples[name].append(clock() - start)
            tick()
    finally:
        if collecting:
            gc.enable()
    return {name: Spread.of(times) for name, times in samples.items()}


def parity(actual: Tensor, same_dtype: Tensor, exact: Tensor) -> tuple[str | None, float, float]:
    """Hold a result against the exact one by the rule of the tests: at most `SLACK` times PyTorch's own error.

    Args:
        actual: a provider's output.
        same_dtype: eager PyTorch's output in the same dtype.
        exact: the output of the same network, with the same rounded weights, in float64.

    Returns:
        What is wrong or None, the largest absolute error, and the bound on it.
    """
    if actual.shape != exact.shape or actual.dtype != same_dtype.dtype:
        got, want = (f"{t.dtype} {tuple(t.shape)}" for t in (actual, same_dtype))
        return f"output is {got}, not {want}", float("nan"), float("nan")
    low = FLOOR * exact.abs().max().item()
    ours, theirs = ((t.double() - exact).abs() for t in (actual, same_dtype))
    largest, bound = ours.max().item(), SLACK * theirs.max().item() + low
    if not largest <= bound:  # NaN is a failure, too
        return f"max error {largest:.2e} exceeds {bound:.2e}", largest, bound
    rms, rms_bound = ours.square().mean().sqrt().item(), SLACK * theirs.square().mean().sqrt().item() + low
    if not rms <= rms_bound:
        return f"rms error {rms:.2e} exceeds {rms_bound:.2e}", largest, bound
    return None, largest, bound


@torch.no_grad()
def compare(
    providers: Mapping[str, Callable[[], Call]],
    x: Tensor,
    exact: Tensor,
    *,
    rounds: int,
    clock: Callable[[], int] = perf_counter_ns,
    tick: Callable[[], object] = _nothing,
    prepare: Prepare = as_left,
    same_dtype: Tensor | None = None,
) -> list[Outcome]:
    """Check every provider's output on `x`, then time those that are right.

    A provider that cannot be made or called, that changes its input, or whose error exceeds the bound of `parity` has
    an `Outcome` with the reason and without times.

    Args:
        providers: name -> what makes the callable, `BASELINE` among them; all runs under `torch.no_grad()`.
        x: the input of each.
        exact: the right output, in float64.
        rounds, clock, tick, prepare: see `time_in_turns`.
        same_dtype: the output whose error sets the bound; None for that of `BASELINE`.

    Raises:
        RuntimeError: if that output is not finite: nothing can be held against it.
    """
    before = x.clone()
    if same_dtype is None:
        same_dtype = providers[BASELINE]()(x)
    if not (torch.isfinite(same_dtype).all() and torch.isfinite(exact).all()):
        raise RuntimeError(f"{BASELINE} must give finite numbers, got {same_dtype.isnan().sum()} NaN")
    calls: dict[str, Callable[[], object]] = {}
    verdicts: dict[str, tuple[str | None, float | None, float | None]] = {}
    for name, make in providers.items():
        try:
            call = make()
            verdicts[name] = parity(call(x), same_dtype, exact)
        except Exception as error:  # a provider may fail in any way; the others are measured all the same
            verdicts[name] = error_line(error), None, None
        if not torch.equal(x, before):
            x.copy_(before)
            verdicts[name] = "changes its input", None, None
        if verdicts[name][0] is None:
            calls[name] = lambda call=call: call(x)  # type: ignore[misc]
    disturbance = Disturbance()
    spreads = time_in_turns(calls, rounds=rounds, clock=clock, tick=tick, prepare=prepare)
    others = disturbance.cores()
    return [Outcome(name, spreads.get(name), *verdicts[name], others) for name in providers]
