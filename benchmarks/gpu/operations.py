"""One fused convolution with its tensors: the way the kernels, cuDNN and the oracle are all called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_resblock.backends import eager, triton
from fused_resblock.kernels.convolution import bind_convolution
from fused_resblock.kernels.tiles import Tile
from fused_resblock.params import PLAIN, BatchNorm, Bound, Conv, Epilogue
from fused_resblock.tf32_unit import Tf32Unit

from ..shapes import ConvShape

#: name -> dtype and whether TF32 is allowed
DTYPES = {
    "fp16": (torch.float16, True),
    "bf16": (torch.bfloat16, True),
    "tf32": (torch.float32, True),
    "ieee": (torch.float32, False),
}


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """The dtype that a name stands for, with TF32 allowed or not as it says."""
    dtype, allowed = DTYPES[name]
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield dtype
    finally:
        torch.backends.cudnn.allow_tf32 = before


def own(name: str, function: Callable[[], Tensor]) -> Tensor:
    """Torch's own result in a dtype: the error that a kernel's is held against.

    For "tf32" it is that of an ideal TF32 unit; see `tf32_unit`.
    """
    if name != "tf32":
        return function()
    with Tf32Unit():
        return function()


@contextmanager
def poisoned() -> Iterator[None]:
    """NaN in everything that `torch.empty` makes, so that a pixel which nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass(frozen=True)
class Operation:
    """The arguments of a fused convolution."""

    x: Tensor
    conv: Conv
    other: Tensor | None = None
    epilogue: Epilogue = PLAIN

    def to(self, dtype: torch.dtype) -> Operation:
        """The same values in another dtype."""

        def norm(n: BatchNorm | None) -> BatchNorm | None:
            return None if n is None else BatchNorm(*(v if v is None else v.to(dtype) for v in n[:4]), n.eps)

        def conv(c: Conv) -> Conv:
            return c._replace(weight=c.weight.to(dtype), norm=norm(c.norm))

        branch = self.epilogue.shortcut
        epilogue = self.epilogue._replace(shortcut=None if branch is None else conv(branch))
        other = None if self.other is None else self.other.to(dtype)
        return Operation(self.x.to(dtype), conv(self.conv), other, epilogue)

    def run(self, function: Callable[..., Tensor], **options: object) -> Tensor:
        """Call one of the library's `conv_bn_act` on these arguments."""
        return function(self.x, self.conv, self.other, self.epilogue, **options)

    def plain(self) -> Tensor:
        """What torch makes of it, in the tensors' own dtype."""
        return self.run(eager.conv_bn_act)

    def prepared(self, tile: Tile | None = None) -> tuple[Tensor, Conv, Tensor | None, Epilogue]:
        """The arguments as the Triton backend hands them to its kernels: norms formed, small groups joined."""
        return triton.prepared(self.x, self.conv, self.other, self.epilogue, tile)

    def bind(self, tile: Tile) -> Bound:
        """The Triton kernel that the tile is for, with the parameters bound."""
        return bind_convolution(*self.prepared(tile), tile)

    def with_tile(self, tile: Tile) -> Tensor:
        """What the Triton kernel makes of it."""
        return self.bind(tile)(self.x, self.other)

    def tensors(self) -> list[Tensor]:
        """Everything that is read."""
        found = (self.x, *self.conv.tensors(), self.other, *self.epilogue.tensors())
        return [t for t in found if t is not None]

    def bytes(self) -> int:
        """Bytes of all tensors that are read, those that a stride skips included, and of the output."""
        out = self.conv.output_shape(self.x)
        return sum(t.nbytes for t in self.tensors()) + self.x.element_size() * out[0] * out[1] * out[2] * out[3]

    def flops(self) -> int:
        """Multiplications and additions of the convolutions."""
        n, k, p, q = self.conv.output_shape(self.x)
        branch = self.epilogue.shortcut
        depth = self.conv.weight[0].numel() + (0 if branch is None else branch.weight[0].numel())
        return 2 * n * p * q * k * depth


def once_each(bind: Callable[[Operation], Bound]) -> Callable[[Operation], Tensor]:
    """A function of an operation that binds it when it first sees it, and then only runs it."""
    bound: dict[int, tuple[Operation, Bound]] = {}  # an operation that is kept keeps its id

    def run(op: Operation) -> Tensor:
        if id(op) not in bound:
            bound[id(op)] = op, bind(op)
        return bound[id(op)][1](op.x, op.other)

    return run


def build(shape: ConvShape, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> Operation:
    """The operation of a row of the shape table; on the device "meta" without values.

    Inputs are standard normal, weights as large as keeps the output so, norms like trained ones; all in `dtype`, as in
    a network after `.to(dtype)`.
    """
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)
        return t.to(memory_format=torch.channels_last) if len(size) == 4 else t

    def vector(channels: int, low: float, high: float) -> Tensor:
        return torch.rand(channels, generator=generator, device=device).mul_(high - low).add_(low).to(dtype)

    def norm(c: int) -> BatchNorm:
        return BatchNorm(vector(c, -0.5, 0.5), vector(c, 0.5, 1.5), vector(c, 0.5, 1.5), vector(c, -0.5, 0.5))

    def weight(k: int, c: int, size: int) -> Tensor:
        return normal(k, c, size, size, scale=(c * size * size) ** -0.5)

    k, pad, out = shape.out_channels, shape.kernel // 2, shape.out_size
    x = normal(batch, shape.channels, shape.size, shape.size)
    filters = weight(k, shape.channels // shape.groups, shape.kernel)
    conv = Conv(filters, None, norm(k), (shape.stride,) * 2, (pad, pad), (1, 1), shape.groups)
    if shape.residual:
        return Operation(x, conv, normal(batch, k, out, out))
    if shape.shortcut:
        step = shape.shortcut_stride
        x2 = normal(batch, shape.shortcut, out * step, out * step)
        branch = Conv(weight(k, shape.shortcut, 1), None, norm(k), (step, step))
        return Operation(x, conv, x2, Epilogue(shortcut=branch))
    return Operation(x, conv)
