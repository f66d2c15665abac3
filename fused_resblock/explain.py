"""`explain`: what became of each residual block of a model, and of what lies around the blocks, as data and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from . import backends, flat
from .backends import tuned
from .convert import blocks
from .frozen import Freezable
from .head import Head, is_fast
from .kernels.gpu import gpu_of
from .leaves import conv_geometry
from .modules import FusedBlock
from .network import FusedNetwork
from .network import obstacle as stem_obstacle
from .plan import Plan
from .stage import FusedStage, is_stage, kernel_state
from .stage import obstacle as stage_obstacle
from .swap import own_class
from .table import format_table

_AUTOGRAD = "this is for calls under torch.no_grad() or torch.inference_mode(); autograd is on now"


class BlockReport(NamedTuple):
    """One residual block: its name in the model, its class, whether it runs fused, on which backend, and why."""

    name: str
    cls: str
    fused: bool
    backend: str
    reason: str


class PartReport(NamedTuple):
    """A stem, a chain of blocks, a frozen network or a fast head: name, modules, whether it is so now, and why."""

    name: str
    modules: str
    fused: bool
    reason: str


class Explanation(list[BlockReport]):
    """The reports of a model's residual blocks, in order, and those of its `parts`; printed as tables."""

    def __init__(self, reports: Iterable[BlockReport], parts: Iterable[PartReport] = ()) -> None:
        super().__init__(reports)
        self.parts = list(parts)

    def __str__(self) -> str:
        text = self._blocks()
        if torch.is_grad_enabled() and any(report.fused for report in self):
            text += f"\n{_AUTOGRAD}"
        if self.parts:
            rows = [(p.name or "(model)", p.modules, "fused" if p.fused else "apart", p.reason) for p in self.parts]
            text += f"\n\n{format_table(('part', 'modules', 'state', 'reason'), rows)}"
        return text

    def _blocks(self) -> str:
        if not self:
            return "no residual blocks found"
        rows = [(r.name or "(model)", r.cls, "fused" if r.fused else "kept", r.backend, r.reason) for r in self]
        fused = sum(r.fused for r in self)
        return f"{format_table(('name', 'class', 'state', 'backend', 'reason'), rows)}\n{fused} of {len(self)} fused"


def explain(model: nn.Module) -> Explanation:
    """Say for every residual block of a model whether it runs fused, by which backend, and why or why not.

    The answer is for a call under `torch.no_grad()` or `torch.inference_mode()`, with the model in its present mode, on
    its present device and in its dtype. Under autograd stems, chains and heads run apart, and on a CPU blocks whose
    weights are trained run their own forward.

    Returns:
        The reports of the blocks as a list, and those of stems, chains, frozen networks and heads in its `parts`.

    Raises:
        TypeError: if model is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    reports = (_report(name, module, outcome) for name, module, outcome in blocks(model))
    return Explanation(reports, _parts(model))


def _parts(model: nn.Module) -> Iterator[PartReport]:
    example = next((p for p in model.parameters() if p.is_floating_point()), None)
    for name, module in model.named_modules():
        if isinstance(module, FusedNetwork):
            modules = dict(module.named_modules())
            for stem in module._fused_stems:
                reason = stem_obstacle(module, stem) or _eager_stem(modules[stem[0]])
                kinds = " + ".join(own_class(modules[path]).__name__ for path in stem if path in modules)
                path = f"{name}.{stem[0]}".lstrip(".")
                yield PartReport(path, kinds, reason is None, reason or "one operation")
            if module._fused_frozen:
                one, said = (False, "in train mode") if module.training else flat.standing(module)
                yield PartReport(name, "the network", one, f"frozen: {said}")
        elif isinstance(module, FusedStage):
            reason = stage_obstacle(module) or _eager_stage(module)  # type: ignore[arg-type]
            said = reason or f"one chain{kernel_state(module)}{_frozen(module)}"  # type: ignore[arg-type]
            yield PartReport(name, f"{len(module)} blocks", reason is None, said)  # type: ignore[arg-type]
        elif isinstance(module, nn.Sequential) and sum(isinstance(m, FusedBlock) for m in module.children()) > 1:
            if not is_stage(module):  # else `fuse` was told not to make chains
                reason = stage_obstacle(module) or "a forward of its own"
                yield PartReport(name, f"{len(module)} modules", False, reason)
        elif isinstance(module, Head) and example is not None and is_fast(module, example):
            yield PartReport(name, own_class(module).__name__, True, module.WHY)


def _eager_stem(conv: nn.Module) -> str | None:
    """Why a stem that begins with this convolution runs as plain PyTorch; None where it does not."""
    choice = _choice(conv.__dict__["_fused_backend"], conv)
    return choice.reason if choice.backend == "eager" else None


def _eager_stage(stage: FusedStage) -> str | None:
    """Why all blocks of a chain run as plain PyTorch; None where any does not."""
    choices = [_choices(block, block._fused_plan) for block in stage.children()]  # type: ignore[arg-type]
    reasons = dict.fromkeys(reason for names, found in choices if names == ["eager"] for reason in found)
    return "; ".join(reasons) if all(names == ["eager"] for names, _ in choices) else None


def _report(name: str, module: nn.Module, outcome: Plan | str) -> BlockReport:
    cls = type(module).__name__
    if not isinstance(module, FusedBlock):
        reason = outcome if isinstance(outcome, str) else "not fused: `fuse` was not called, or left it out"
        return BlockReport(name, cls, False, "eager", reason)
    obstacle = module.reference_reason()
    if obstacle is not None:
        return BlockReport(name, cls, False, "eager", obstacle)
    assert isinstance(outcome, Plan)
    names, reasons = _choices(module, outcome)
    return BlockReport(name, cls, names != ["eager"], "+".join(names), "; ".join(reasons) + _remarks(module))


def _choices(block: FusedBlock, plan: Plan) -> tuple[list[str], list[str]]:
    """The backends of a block's convolutions, and the reasons for them, each once."""
    convs = [block.get_submodule(branch.conv or "") for branch in plan.convs()]
    choices = [_choice(block._fused_backend, conv) for conv in convs]
    return list(dict.fromkeys(c.backend for c in choices)), list(dict.fromkeys(c.reason for c in choices))


def _remarks(block: FusedBlock) -> str:
    """What else there is to know of a fused block."""
    if any(tensor.is_inference() for tensor in (*block.parameters(), *block.buffers())):
        return "; folded at every call: nothing tells when inference tensors change"
    kept = [step.module for step in block._fused_plan.steps if step.module is not None]  # type: ignore[union-attr]
    return "".join(f"; {path} runs as it is" for path in dict.fromkeys(kept)) + _frozen(block)


def _frozen(module: Freezable) -> str:
    return "; frozen" if module.unasked() else ""


def _choice(backend: str, conv: nn.Module) -> backends.Choice:
    """What runs a convolution: by all that is known before an image comes."""
    assert isinstance(conv, nn.Conv2d)
    weight, kernel = conv.weight, (conv.weight.shape[2], conv.weight.shape[3])
    _, padding, dilation, groups = conv_geometry(conv)
    problem = backends.Problem(
        weight.device.type,
        weight.dtype,
        channels=conv.in_channels,
        out_channels=weight.shape[0],
        kernel=kernel,
        groups=groups,
        overpadded=backends.overpadded(kernel, padding, dilation),
        capability=gpu_of(weight.device).capability,
    )
    name = backends.check_name(backend)
    choice = backends.resolve(name, problem)
    if name == "auto" and tuned.measured(weight.device):
        return replace(choice, reason=f"{choice.reason}; for some shapes what was measured to be faster")
    return choice
