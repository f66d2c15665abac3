"""Which backend runs a problem: a pure function of the problem, of what this machine can do, and of measurements."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """What `select` looks at: the device type, the dtype and the shape of one fused operation.

    `pixels` counts the larger of input and output pixels N*H*W; `tap_reach` is the distance in elements between the
    first and the last tap of the filter. `overpadded` says that a dilated filter can lie in the padding altogether.
    `capability` is that of a CUDA device, 90 for 9.0.
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
    capability: int = 90


@dataclass(frozen=True)
class Choice:
    """A backend's name and why it was taken."""

    backend: str
    reason: str


def preference(problem: Problem) -> tuple[tuple[str, str], ...]:
    """Backends in the order in which they are tried where nothing was measured, each with what speaks for it."""
    if problem.device == "cpu":
        return (("onednn", "oneDNN on folded, prepacked weights"),)
    if problem.device != "cuda":
        return ()
    if problem.kind == "conv" and problem.groups > 1:
        return (("cudnn", "grouped convolution: a group fills no Triton tile"), ("triton", "Triton kernel"))
    if problem.kind == "conv" and problem.channels // problem.groups % 8:
        return (("cudnn", "input channels are no multiple of 8: no 16-byte loads"), ("triton", "Triton kernel"))
    if problem.kind == "conv" and problem.kernel != (1, 1) and problem.capability < 90:
        # Triton's 3x3 without TMA reaches 58 to 74 % of cuDNN's (pytorch#174752)
        return (("cudnn", "fused cuDNN convolution: no TMA on this GPU"), ("triton", "Triton kernel"))
    return (("triton", "Triton kernel, batch norm in the epilogue"), ("cudnn", "fused cuDNN convolution"))


def select(problem: Problem, refusals: dict[str, str | None], measured: str | None = None) -> Choice:
    """Pick a backend.

    Args:
        problem: the operation.
        refusals: backend name -> why it cannot run this problem here, None where it can; `eager` is always able.
        measured: the backend that was fastest in a table, or None.

    Returns:
        The measured one, else the first preferred one, that does not refuse; `eager`, with the reasons, if all do.
    """
    order = preference(problem)
    if measured is not None:
        order = ((measured, "fastest when measured"), *order)
    reasons = []
    for name, reason in order:
        refusal = refusals.get(name)
        if refusal is None:
            return Choice(name, reason)
        reasons.append(f"{name}: {refusal}")
    return Choice("eager", "; ".join(dict.fromkeys(reasons)) or f"no fused kernels for {problem.device} tensors")
