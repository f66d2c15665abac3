"""`explain`: what became of each residual block of a model, as data and as a table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from . import backends
from .convert import blocks
from .modules import FusedBlock
from .plan import Plan
from .table import format_table


class BlockReport(NamedTuple):
    """One residual block: its name in the model, its class, whether it runs fused, on which backend, and why."""

    name: str
    cls: str
    fused: bool
    backend: str
    reason: str


class Explanation(list[BlockReport]):
    """The reports of a model's residual blocks, in order; printed as a table."""

    def __str__(self) -> str:
        if not self:
            return "no residual blocks found"
        rows = [(r.name or "(model)", r.cls, "fused" if r.fused else "kept", r.backend, r.reason) for r in self]
        fused = sum(r.fused for r in self)
        return f"{format_table(('name', 'class', 'state', 'backend', 'reason'), rows)}\n{fused} of {len(self)} fused"


def explain(model: nn.Module) -> Explanation:
    """Say for every residual block of a model whether it runs fused, by which backend, and why or why not.

    The answer is for a call made now: with the model in its present mode, on its present device and in its dtype.

    Raises:
        TypeError: if model is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return Explanation(_report(name, module, outcome) for name, module, outcome in blocks(model))


def _report(name: str, module: nn.Module, outcome: Plan | str) -> BlockReport:
    cls = type(module).__name__
    if not isinstance(module, FusedBlock):
        reason = outcome if isinstance(outcome, str) else "not fused yet: call fuse"
        return BlockReport(name, cls, False, "eager", reason)
    obstacle = module.reference_reason()
    if obstacle is not None:
        return BlockReport(name, cls, False, "eager", obstacle)
    assert isinstance(outcome, Plan)
    choices = [_choice(module, branch.conv) for branch in outcome.convs()]
    names = list(dict.fromkeys(choice.backend for choice in choices))
    reasons = list(dict.fromkeys(choice.reason for choice in choices))
    return BlockReport(name, cls, names != ["eager"], "+".join(names), "; ".join(reasons))


def _choice(block: FusedBlock, path: str | None) -> backends.Choice:
    conv = block.get_submodule(path or "")
    assert isinstance(conv, torch.nn.Conv2d)
    weight = conv.weight
    problem = backends.Problem(
        weight.device.type,
        weight.dtype,
        channels=conv.in_channels,
        out_channels=weight.shape[0],
        kernel=(weight.shape[2], weight.shape[3]),
        groups=conv.groups,
    )
    return backends.resolve(backends.check_name(block._fused_backend), problem)
