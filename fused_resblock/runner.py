"""The modules that a plan names: their tensors are read anew for every call, checked, and handed to the operations."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import backends, dispatch, gates, leaves
from .functional import check_image
from .params import BatchNorm, Bound, Conv, Epilogue
from .plan import Branch, Plan, Step


class Arguments(NamedTuple):
    """One operation on tensors: a convolution, or an elementwise pass where `conv` is None."""

    x: Tensor
    conv: Conv | None
    norm: BatchNorm | None
    other: Tensor | None
    epilogue: Epilogue

    def run(self, backend: str) -> Tensor:
        """The operation's result, with autograd."""
        if self.conv is None:
            return dispatch.bn_act(self.x, self.norm, self.other, self.epilogue, backend=backend)
        return dispatch.conv_bn_act(self.x, self.conv, self.other, self.epilogue, backend=backend)

    def bind(self, backend: str, overwrite: bool) -> Bound:
        """The operation with its parameters bound, for activations such as these."""
        if self.conv is None:
            return backends.bind_bn_act(self.x, self.norm, self.other, self.epilogue, backend=backend)
        return backends.bind_conv_bn_act(
            self.x, self.conv, self.other, self.epilogue, backend=backend, overwrite=overwrite
        )


class BoundBranch:
    """The modules of a `Branch`."""

    def __init__(self, block: nn.Module, branch: Branch) -> None:
        self.source = branch.source
        self.norm = None if branch.norm is None else block.get_submodule(branch.norm)
        self.conv = None if branch.conv is None else block.get_submodule(branch.conv)
        if self.conv is not None:
            self._geometry = leaves.conv_geometry(self.conv)

    def batch_norm(self) -> BatchNorm | None:
        """The norm's tensors as they are now."""
        return None if self.norm is None else BatchNorm.of(self.norm)

    def weights(self) -> Conv:
        """The branch's convolution with its tensors as they are now, whatever it will be called with."""
        return Conv(self.conv.weight, self.conv.bias, self.batch_norm(), *self._geometry)  # type: ignore[union-attr, arg-type]

    def check(self, x: Tensor, autocast: bool) -> None:
        """Raise ValueError if the weight has another device or, outside autocast, another dtype than x."""
        weight: Any = self.conv.weight  # type: ignore[union-attr]
        if weight.dtype != x.dtype and not autocast:
            raise ValueError(f"x must have the weights' dtype {weight.dtype}, got {x.dtype}")
        if weight.device != x.device:
            raise ValueError(f"x must be on the weights' device {weight.device}, got {x.device}")

    def tensors(self, x: Tensor, autocast: bool) -> Conv:
        """The branch's convolution with its tensors as they are now.

        Raises:
            ValueError: as `check`, or if the weight has another channel count.
        """
        self.check(x, autocast)
        conv = self.weights()
        channels = conv.weight.shape[1] * conv.groups
        if x.shape[1] != channels:
            raise ValueError(f"x must have the {channels} channels that a convolution's weight has, got {x.shape[1]}")
        return conv


class BoundStep:
    """The modules of a `Step`."""

    def __init__(self, block: nn.Module, step: Step) -> None:
        self.step = step
        self.main = BoundBranch(block, step.main)
        self.shortcut = None if step.shortcut is None else BoundBranch(block, step.shortcut)
        self.module = None if step.module is None else block.get_submodule(step.module)
        self.residual_norm = None if step.residual_norm is None else block.get_submodule(step.residual_norm)

    def arguments(self, values: Sequence[Tensor], autocast: bool) -> Arguments | None:
        """The operation on the values before it; None if the terms of its add differ in shape, or nothing is left.

        Terms may broadcast, which no kernel does; of an image smaller than the filter torch says what is wrong.
        """
        step = self.step
        x = values[step.main.source]
        conv = None if self.main.conv is None else self.main.tensors(x, autocast)
        norm = self.main.batch_norm() if conv is None else None
        shape = tuple(x.shape) if conv is None else conv.output_shape(x)
        if not torch.compiler.is_compiling() and min(shape[2:]) < 1:
            return None
        other = branch = None
        if step.residual is not None:
            other = values[step.residual]
            n, c, h, w = other.shape
            if (n, c, -(-h // step.residual_stride), -(-w // step.residual_stride)) != shape:
                return None
        elif self.shortcut is not None:
            other = values[self.shortcut.source]
            branch = self.shortcut.tensors(other, autocast)
            if branch.output_shape(other) != shape:
                return None
        residual_norm = None if self.residual_norm is None else BatchNorm.of(self.residual_norm)
        return Arguments(x, conv, norm, other, Epilogue(step.residual_stride, residual_norm, branch, step.relu))


class Runner:
    """A plan with its modules.

    Args:
        block: the fused block.
        plan: what it computes.
    """

    def __init__(self, block: nn.Module, plan: Plan) -> None:
        # dropout may be switched on alone, so every module's mode counts where one of them matters; a reference to the
        # block itself would keep it alive
        self.eval_only = list(block.modules())[1:] if plan.eval_only else []
        self._block = weakref.ref(block)
        self.steps = [BoundStep(block, step) for step in plan.steps]
        self.norms = [block.get_submodule(path) for path in plan.norms()]
        found = [step.module for step in self.steps]
        self.gates = [module for module in found if module is not None and not isinstance(module, nn.AvgPool2d)]

    def _in_channels(self) -> int | None:
        """Channels that the block takes now: a layer may have been pruned in place."""
        for branch in (b for step in self.steps for b in (step.main, step.shortcut) if b is not None):
            if branch.source == 0 and branch.conv is not None:
                conv: Any = branch.conv
                return conv.weight.shape[1] * conv.groups
            if branch.source == 0 and branch.norm is not None:
                return len(branch.norm.running_mean)  # type: ignore[arg-type]
        return None  # a pool reads the input

    def mode_obstacle(self) -> str | None:
        """Why the block's mode calls for its own forward; None when the plan may run."""
        block = self._block()
        if self.eval_only and block is not None and any(module.training for module in (block, *self.eval_only)):
            return "in train() it computes something else"
        if any(map(leaves.uses_batch_statistics, self.norms)) or any(map(gates.trains, self.gates)):
            return "batch statistics (train mode)"
        if self.gates and torch.compiler.is_compiling():
            return "gates are compiled with the block's own forward"
        if not torch.compiler.is_compiling() and any(map(is_traceable_wrapper_subclass, self.parameters())):
            return "weights of a tensor subclass"
        return None

    def better_apart(self, x: Tensor, backend: str) -> bool:
        """Whether the block's own forward takes less time than the plan: on a CPU where gradients are taken.

        Weights that are trained change at every step, and torch packs them anyway; to fold and pack them on top is 1 to
        2 times its time. For a gradient of the input alone the folded weights are formed once more.

        Raises:
            TypeError, ValueError: if x does not fit the block.
        """
        if backends.check_name(backend) != "auto" or not isinstance(x, Tensor) or x.device.type != "cpu":
            return False
        if torch.compiler.is_compiling() or not dispatch.trained([x, *self.parameters()]):
            return False
        self.check(x, dispatch.autocast_dtype(x) is not None)
        return True

    def unbatched(self, x: object) -> bool:
        """Whether x is one image `[C, H, W]`, which a block without norms takes, as torch's convolutions do."""
        return isinstance(x, Tensor) and x.dim() == 3 and not self.norms

    def check(self, x: Tensor, autocast: bool) -> None:
        """Raise before the first step if x does not fit the block.

        Raises:
            TypeError, ValueError: see `functional.conv_bn_act`.
        """
        check_image(x, "x")
        channels = self._in_channels()
        if channels is not None and x.shape[1] != channels:
            raise ValueError(f"x must have {channels} channels, as the block has, got {x.shape[1]}")
        for step in self.steps:  # the first step may have no weights of its own
            if step.main.conv is not None:
                step.main.check(x, autocast)  # that of its channels is the step's: a gate may widen x before it
                return

    def run(self, x: Tensor, backend: str) -> Tensor | None:
        """The block's output for `x`, with autograd; None if its shapes, or a gate, ask for its own forward.

        Raises:
            TypeError, ValueError: if x does not fit the block; see `functional.conv_bn_act`.
        """
        dtype = dispatch.autocast_dtype(x) if isinstance(x, Tensor) else None
        self.check(x, dtype is not None)
        backend = backends.check_name(backend)
        values = [x if dtype is None else x.to(dtype)]
        for step in self.steps:
            if step.module is not None:
                source = values[step.main.source]
                values.append(gates.run(step.module, source))
                if values[-1].dtype != source.dtype:
                    return None
                continue
            arguments = step.arguments(values, dtype is not None)
            if arguments is None:
                return None
            values.append(arguments.run(backend))
        return values[-1]

    def parameters(self) -> list[Tensor]:
        """Every tensor that the plan's operations read besides activations."""
        convs = [b.conv for step in self.steps for b in (step.main, step.shortcut) if b is not None]
        found: list[Any] = [t for conv in convs if conv is not None for t in (conv.weight, conv.bias)]
        found += [t for norm in self.norms for t in BatchNorm.of(norm)[:4]]
        return [t for t in found if t is not None]
