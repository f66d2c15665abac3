"""The measure of every parity test: our error against float64 may be at most twice torch's own in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_parity(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, *, what: str, slack: float = 2.0, floor: float = 1e-6
) -> None:
    """Fail unless `actual` is about as close to `exact` (float64) as torch's own `same_dtype` result is.

    Both the maximum and the root mean square error count. `floor` allows for the case where torch happens to be exact,
    as a share of the largest exact value.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{what}: dtype {actual.dtype}, not {same_dtype.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(exact).all(), f"{what}: the oracle itself is not finite"
    ours, theirs = (actual.double() - exact).abs(), (same_dtype.double() - exact).abs()
    low = floor * exact.abs().max()
    rms_ours, rms_theirs = ours.square().mean().sqrt(), theirs.square().mean().sqrt()
    for kind, a, b in (("max", ours.max(), theirs.max()), ("rms", rms_ours, rms_theirs)):
        assert a <= slack * b + low, f"{what}: {kind} error {a:.3e} > {slack} * torch's {b:.3e} + {low:.3e}"
