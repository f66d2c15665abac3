"""Which backend runs a problem: a pure function of the problem and of what this machine can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """What `select` looks at: the device type, the dtype and the shape of one fused operation.

    `pixels` counts the larger of input and output pixels N*H*W; `tap_reach` is the distance in elements between the
    first and the last tap of the filter. `overpadded` says that a dilated filter can lie in the padding altogether.
    """

    device: str
    dtype: torch.dtype
    kind: str = "conv"  # or "bn_act"
    channels: int = 64
    out_channels: int = 64
    kernel: tuple[int, int] = (1, 1)
    groups: int = 1
    pixels: int = 1
    tap_reach: int = 0
    overpadded: bool = False


@dataclass(frozen=True)
class Choice:
    """A backend's name and why it was taken."""

    backend: str
    reason: str


def preference(problem: Problem) -> tuple[tuple[str, str], ...]:
    """Backends in the order in which they are tried, each with the reason that speaks for it."""
    if problem.device == "cpu":
        return (("onednn", "oneDNN on folded, prepacked weights"),)
    if problem.device != "cuda":
        return ()
    if problem.kind == "conv" and problem.groups > 1:
        return (("cudnn", "grouped convolution: a group fills no Triton tile"), ("triton", "Triton kernel"))
    if problem.kind == "conv" and problem.channels // problem.groups % 8:
        return (("cudnn", "input channels are no multiple of 8: no 16-byte loads"), ("triton", "Triton kernel"))
    return (("triton", "Triton kernel, batch norm in the epilogue"), ("cudnn", "fused cuDNN convolution"))


def select(problem: Problem, refusals: dict[str, str | None]) -> Choice:
    """Pick a backend.

    Args:
        problem: the operation.
        refusals: backend name -> why it cannot run this problem here, None where it can; `eager` is always able.

    Returns:
        The first preferred backend that does not refuse, else `eager` with the reason of the first that did.
    """
    reasons = []
    for name, reason in preference(problem):
        refusal = refusals.get(name)
        if refusal is None:
            return Choice(name, reason)
        reasons.append(f"{name}: {refusal}")
    return Choice("eager", "; ".join(reasons) or f"no fused kernels for {problem.device} tensors")
