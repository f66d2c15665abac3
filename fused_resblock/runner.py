"""Running a plan on a block: the modules it names are looked up once, and each call asks whether they still hold."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import backends, dispatch, leaves
from .functional import check_image
from .params import BatchNorm, Conv
from .plan import Branch, Plan, Step


class _Slots:
    """The places that hold a module's tensors, so that reading them skips `nn.Module.__getattr__` (0.4 us each)."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        self._places = (module.__dict__, module._parameters, module._buffers)
        self._slots = [(next((p for p in self._places if name in p), self._places[0]), name) for name in names]

    def read(self) -> list[Any]:
        """The tensors as they are now."""
        return [place[name] if name in place else self._search(name) for place, name in self._slots]

    def _search(self, name: str) -> Any:
        """A tensor that is no longer where it was, as when a parameter became a buffer."""
        return next((place[name] for place in self._places if name in place), None)


class _BoundNorm:
    """A norm module and its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._slots = _Slots(module, ("running_mean", "running_var", "weight", "bias"))

    def tensors(self) -> BatchNorm:
        """The norm's tensors as they are now."""
        if torch.compiler.is_compiling():
            return BatchNorm.of(self.module)
        mean, var, weight, bias = self._slots.read()
        return BatchNorm(mean, var, weight, bias, self.module.eps)  # type: ignore[arg-type]


class _BoundBranch:
    """The modules of a `Branch`."""

    def __init__(self, block: nn.Module, branch: Branch) -> None:
        self.source = branch.source
        self.norm = None if branch.norm is None else _BoundNorm(block.get_submodule(branch.norm))
        self.conv = None if branch.conv is None else block.get_submodule(branch.conv)
        if self.conv is not None:
            self._geometry = leaves.conv_geometry(self.conv)
            self._slots = _Slots(self.conv, ("weight", "bias"))

    def tensors(self, x: Tensor, autocast: bool) -> Conv:
        """The branch's convolution with its tensors as they are now; raises as `check` does."""
        weight, bias = self.check(x, autocast)
        return Conv(weight, bias, None if self.norm is None else self.norm.tensors(), *self._geometry)

    def check(self, x: Tensor, autocast: bool) -> tuple[Any, Any]:
        """Weight and bias as they are now.

        Raises:
            ValueError: if the weight has another device or, outside autocast, another dtype than x.
        """
        if torch.compiler.is_compiling():
            weight: Any = self.conv.weight  # type: ignore[union-attr]
            bias: Any = self.conv.bias  # type: ignore[union-attr]
        else:
            weight, bias = self._slots.read()
        if weight.dtype != x.dtype and not autocast:
            raise ValueError(f"x must have the weights' dtype {weight.dtype}, got {x.dtype}")
        if weight.device != x.device:
            raise ValueError(f"x must be on the weights' device {weight.device}, got {x.device}")
        return weight, bias


class _BoundStep:
    """The modules of a `Step`."""

    def __init__(self, block: nn.Module, step: Step) -> None:
        self.main = _BoundBranch(block, step.main)
        self.shortcut = None if step.shortcut is None else _BoundBranch(block, step.shortcut)
        self.pool = None if step.pool is None else block.get_submodule(step.pool)
        self.residual = step.residual
        self.residual_norm = None if step.residual_norm is None else _BoundNorm(block.get_submodule(step.residual_norm))
        self.epilogue = {"residual_stride": step.residual_stride, "relu": step.relu}

    def run(self, values: list[Tensor], calls: ModuleType, backend: str, autocast: bool) -> Tensor | None:
        """The step's value from the values before it, by the operations of `calls`: `dispatch` or `backends`.

        None if the terms of the add differ in shape: they may broadcast, which no kernel does.
        """
        x = values[self.main.source]
        if self.pool is not None:
            return self.pool(x)
        residual = None if self.residual is None else values[self.residual]
        if self.main.conv is None:
            if residual is not None and not self._fits(residual, x.shape):
                return None
            norm = None if self.main.norm is None else self.main.norm.tensors()
            residual_norm = None if self.residual_norm is None else self.residual_norm.tensors()
            return calls.bn_act(
                x, norm, residual=residual, residual_norm=residual_norm, backend=backend, **self.epilogue
            )
        shortcut = None
        conv = self.main.tensors(x, autocast)
        if residual is not None and not self._fits(residual, conv.output_shape(x)):
            return None
        if self.shortcut is not None:
            x2 = values[self.shortcut.source]
            shortcut = x2, self.shortcut.tensors(x2, autocast)
            if shortcut[1].output_shape(x2) != conv.output_shape(x):
                return None
        return calls.conv_bn_act(x, conv, residual=residual, shortcut=shortcut, backend=backend, **self.epilogue)

    def _fits(self, residual: Tensor, shape: Sequence[int]) -> bool:
        """Whether the residual, read at its stride, has this shape."""
        n, c, h, w = residual.shape
        stride = self.epilogue["residual_stride"]
        return (n, c, -(-h // stride), -(-w // stride)) == tuple(shape)


class Runner:
    """A plan with its modules.

    Args:
        block: the fused block.
        plan: what it computes.
    """

    def __init__(self, block: nn.Module, plan: Plan) -> None:
        # dropout may be switched on alone, so every module's mode counts where one of them matters
        self.eval_only = list(block.modules()) if plan.eval_only else []
        self.steps = [_BoundStep(block, step) for step in plan.steps]
        self.norms = [block.get_submodule(path) for path in plan.norms()]
        self.in_channels = self._in_channels()

    def _in_channels(self) -> int | None:
        for branch in (b for step in self.steps for b in (step.main, step.shortcut) if b is not None):
            if branch.source == 0 and branch.conv is not None:
                return branch.conv.in_channels  # type: ignore[return-value]
            if branch.source == 0 and branch.norm is not None:
                return len(branch.norm.module.running_mean)  # type: ignore[arg-type]
        return None  # a pool reads the input

    def _check_like_weights(self, x: Tensor, autocast: bool) -> None:
        """Raise before the first step, which may have no weights of its own, if x does not fit the first that has."""
        for step in self.steps:
            if step.main.conv is not None:
                step.main.check(x, autocast)
                return

    def mode_obstacle(self) -> str | None:
        """Why the block's mode calls for its own forward; None when the plan may run."""
        if any(module.training for module in self.eval_only):
            return "in train() it computes something else"
        for norm in self.norms:
            if leaves.uses_batch_statistics(norm):
                return "batch statistics (train mode)"
        return None

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        """The block's output for `x`, by its plan; None if the shapes are such that only its own forward can say.

        Raises:
            TypeError, ValueError: if x does not fit the block; see `functional.conv_bn_act`.
        """
        check_image(x, "x")
        if self.in_channels is not None and x.shape[1] != self.in_channels:
            raise ValueError(f"x must have {self.in_channels} channels, as the block has, got {x.shape[1]}")
        dtype = dispatch.autocast_dtype(x)
        self._check_like_weights(x, dtype is not None)
        backend = backends.check_name(backend)
        calls = backends if not torch.is_grad_enabled() and dispatch.plain((x,)) else dispatch
        values = [x if dtype is None else x.to(dtype)]
        for step in self.steps:
            value = step.run(values, calls, backend, dtype is not None)
            if value is None:
                return None
            values.append(value)
        return values[-1]


class Watch:
    """Notices what a runner cannot see: modules replaced by hand, hooks and forwards added after fusing."""

    def __init__(self, block: nn.Module) -> None:
        inner = [m for m in block.modules() if m is not block]
        self._children = [
            (m._modules, name, child, type(child)) for m in block.modules() for name, child in m._modules.items()
        ]
        self._sizes = [(m._modules, len(m._modules)) for m in block.modules()]
        self._convs = [(m, self._settings(m)) for m in inner if isinstance(m, nn.Conv2d)]
        self._hooks = [hooks for m in inner for hooks in leaves.hook_dicts(m)]
        self._attributes = [m.__dict__ for m in inner]

    @staticmethod
    def _settings(conv: nn.Conv2d) -> tuple[Any, ...]:
        return conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode

    def same_modules(self) -> bool:
        """Whether every module is still where it was, of the same class and with the same settings."""
        for modules, name, child, cls in self._children:
            if modules.get(name) is not child or type(child) is not cls:
                return False
        for modules, size in self._sizes:
            if len(modules) != size:
                return False
        return all(self._settings(conv) == settings for conv, settings in self._convs)

    def obstacle(self) -> str | None:
        """Why inner modules must be called one by one; None when they need not."""
        for hooks in self._hooks:
            if hooks:
                return "hooks on inner modules"
        for attributes in self._attributes:
            if "forward" in attributes or "parametrizations" in attributes.get("_modules", ()):
                return "the forward of an inner module is overridden on the instance"
        return "global module hooks" if nn.modules.module._has_any_global_hook() else None


def layout(block: nn.Module) -> tuple[tuple[str, type], ...]:
    """Path and class of every module in the block: what `unchanged` compares where identities cannot be."""
    return tuple((name, type(module)) for name, module in block.named_modules() if name)


def unchanged(block: nn.Module, expected: tuple[tuple[str, type], ...]) -> bool:
    """Whether the block's modules are of the classes they were and have no hooks; `torch.compile` can trace this."""
    modules = dict(block.named_modules())
    if len(modules) != len(expected) + 1:
        return False
    for name, cls in expected:
        if name not in modules or type(modules[name]) is not cls:
            return False
        for hooks in leaves.hook_dicts(modules[name]):
            if len(hooks) > 0:
                return False
    return True


def untraceable(x: object) -> bool:
    """Whether the block's own forward must be recorded node by node: a `torch.fx` proxy or `torch.jit.trace`."""
    return isinstance(x, fx.Proxy) or torch.jit.is_tracing()
