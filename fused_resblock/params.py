"""The arguments of a fused convolution, bundled: what every layer below `functional` passes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .frozen_norms import eps_of

#: tensors without a life of their own: subclasses may compute something else, and have no storage to be asked for
PLAIN_TYPES = (Tensor, nn.Parameter)
Pair = tuple[int, int]
#: an operation with its parameters bound: gives y for x and the other activation that it reads, if any
Bound = Callable[[Tensor, Any], Tensor]

#: one that gives two activations, the second of which may be None
BoundPair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


class BatchNorm(NamedTuple):
    """Inference batch norm: `weight * (x - mean) / sqrt(var + eps) + bias`, each tensor `[C]` and floating point.

    `weight` (gamma) and `bias` (beta) may be None for 1 and 0. `eps` may be 0.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    @classmethod
    def of(cls, module: nn.Module) -> BatchNorm:
        """The running statistics and affine parameters of an `nn.BatchNorm2d` or a FrozenBatchNorm2d.

        Raises:
            TypeError: if it has none.
        """
        eps: Any = getattr(module, "eps", None)
        if eps is None and isinstance(module, nn.Module):
            eps = eps_of(module)
        if getattr(module, "running_mean", None) is None or eps is None:
            raise TypeError(f"module must be a batch norm with running statistics, got {type(module).__name__}")
        return cls(module.running_mean, module.running_var, module.weight, module.bias, eps)  # type: ignore[arg-type]


class Affine(NamedTuple):
    """A norm formed beforehand: `scale * x + shift`, each tensor `[C]` in fp32 (fp64 for fp64 activations)."""

    scale: Tensor
    shift: Tensor


class Conv(NamedTuple):
    """A convolution and the norm behind it: weight `[K, C/groups, R, S]`, bias `[K]` or None, norm over K or None."""

    weight: Tensor
    bias: Tensor | None = None
    norm: BatchNorm | None = None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias and, where there is a norm, its four vectors."""
        return (self.weight, self.bias) if self.norm is None else (self.weight, self.bias, *self.norm[:4])

    @property
    def eps(self) -> float | None:
        """The norm's eps, or None where there is no norm."""
        return None if self.norm is None else self.norm.eps

    def output_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        """Shape of the output for the input x."""
        return (x.shape[0], self.weight.shape[0], *self.output_size(x.shape[2], x.shape[3]))

    def output_size(self, height: int, width: int) -> Pair:
        """Rows and columns of the output for an input of `height` x `width`."""
        rows, columns = self.weight.shape[2:]
        return output_size(height, width, rows, columns, self.stride, self.padding, self.dilation)


class Shortcut(NamedTuple):
    """A downsample branch, `norm(conv1x1(x))`, to be accumulated in the same tile as the convolution it joins.

    `x` is `[N, C2, H2, W2]`, `weight` `[K, C2, 1, 1]`, `bias` `[K]` or None, `stride` of both axes.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    norm: BatchNorm | None = None
    stride: int = 1

    @property
    def conv(self) -> Conv:
        """The branch's convolution."""
        return Conv(self.weight, self.bias, self.norm, stride=(self.stride, self.stride))


class Epilogue(NamedTuple):
    """What becomes of `z = norm(conv(x))`, or of `norm(x)`, before it is stored.

    `act(z)` alone, or with another activation tensor `other`: `act(z + norm(conv1x1(other)))` where there is a
    shortcut, else `act(z + residual_norm(other[:, :, ::t, ::t]))` with t = residual_stride.

    Attributes:
        residual_stride: t.
        residual_norm: norm of the residual, or None; for elementwise operations only.
        shortcut: the downsample branch, a 1x1 convolution without padding or groups, or None.
        relu: whether act is ReLU.
    """

    residual_stride: int = 1
    residual_norm: BatchNorm | None = None
    shortcut: Conv | None = None
    relu: bool = True

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The parameters in it."""
        norm = () if self.residual_norm is None else self.residual_norm[:4]
        return norm if self.shortcut is None else (*norm, *self.shortcut.tensors())


#: a ReLU and nothing else
PLAIN = Epilogue()


def pair(value: int | Pair) -> Pair:
    """`value` for both axes, or the two values themselves; one in a tuple is for both, as torch has it."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def output_size(height: int, width: int, rows: int, columns: int, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Rows and columns of a convolution's output for an image of height x width and a filter of rows x columns."""
    return (
        (height + 2 * padding[0] - dilation[0] * (rows - 1) - 1) // stride[0] + 1,
        (width + 2 * padding[1] - dilation[1] * (columns - 1) - 1) // stride[1] + 1,
    )
