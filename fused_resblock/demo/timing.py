"""Median latency of several ways to do the same thing, measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

import torch

WARM_UP = 3


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a CUDA device; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def interleaved(
    calls: Mapping[str, Callable[[], object]],
    runs: int,
    device: torch.device,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Time every call `runs` times, one round after another and each round in the opposite order.

    Slow drifts of the machine (heat, neighbours) so fall on all calls alike, and none always profits from a cache
    that another filled. Each call is first made `WARM_UP` times untimed. The clock runs from before the call until
    the device has finished it.

    Args:
        calls: name -> what to time; runs under `torch.no_grad()`.
        runs: rounds that are timed, at least 1.
        device: where the work happens.
        tick: called after each round, for a progress bar.

    Returns:
        Name -> median latency in milliseconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    order = list(calls)
    for _ in range(runs):
        for name in order:
            synchronize(device)
            start = perf_counter()
            calls[name]()
            synchronize(device)
            samples[name].append((perf_counter() - start) * 1e3)
        order.reverse()
        tick()
    return {name: median(times) for name, times in samples.items()}
