"""What a forward asked of the kernels: the operations that `tune` searches tiles for, with tensors to try them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..params import PLAIN, BatchNorm, Conv, Epilogue
from ..recorder import Recorder
from . import eager


class Asked(NamedTuple):
    """A fused convolution; with a pool, a stem; with two or three layers, a bottleneck's tail and the next one's head.

    Or a whole bottleneck.

    Attributes:
        size: of x, `[N, C, H, W]`.
        other_size: of the residual or of the shortcut's input, or None.
        dtype, device: of both.
        layers: the convolution; or the 3x3, the expand and, unless it is None, the next reduce; or a block's.
        epilogue: behind the convolution, or behind the expand.
        pool: kernel size, stride, padding, dilation and ceil_mode of a stem's max-pool, else None.
        whole: whether `layers` are a block's reduce, 3x3 and expand; what is added is its own input.
    """

    size: tuple[int, ...]
    other_size: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device
    layers: tuple[Conv, ...]
    epilogue: Epilogue
    pool: tuple[Any, ...] | None = None
    whole: bool = False

    @property
    def kind(self) -> str:
        """One of "stem", "convolution", "tail" and "block"."""
        if self.whole:
            return "block"
        if len(self.layers) > 1:
            return "tail"
        return "convolution" if self.pool is None else "stem"

    @property
    def reduce(self) -> Conv | None:
        """The next block's first convolution, of a tail that has it."""
        return self.layers[2] if len(self.layers) > 2 else None

    def gemms(self) -> Any:
        """The GEMMs of a tail, as `kernels.stage.choose_stage_tile` takes them."""
        from ..kernels.stage import gemms_of

        return gemms_of(self.size, *self.layers[:2], self.epilogue.shortcut, self.reduce)

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Random activations: standard normal, channels_last."""
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(size: Sequence[int] | None) -> Tensor | None:
            if size is None:
                return None
            t = torch.randn(tuple(size), generator=generator, device=self.device).to(self.dtype)
            return t.contiguous(memory_format=torch.channels_last)

        x = normal(self.size)
        assert x is not None
        return x, normal(self.other_size)

    def plain(self, x: Tensor, other: Tensor | None) -> tuple[Tensor, ...]:
        """What torch makes of it, in x's dtype."""
        first, *rest = (_in(conv, x.dtype) for conv in self.layers)
        branch = self.epilogue.shortcut
        epilogue = self.epilogue._replace(shortcut=None if branch is None else _in(branch, x.dtype))
        if self.whole:
            h = eager.conv_bn_act(eager.conv_bn_act(x, first, None, PLAIN), rest[0], None, PLAIN)
            return (eager.conv_bn_act(h, rest[1], x, epilogue),)
        if not rest:
            y = eager.conv_bn_act(x, first, other, epilogue)
            return (y if self.pool is None else torch.max_pool2d(y, *self.pool),)
        y = eager.conv_bn_act(eager.conv_bn_act(x, first, None, PLAIN), rest[0], other, epilogue)
        return (y, *(eager.conv_bn_act(y, conv, None, PLAIN) for conv in rest[1:]))


def _in(conv: Conv, dtype: torch.dtype) -> Conv:
    """A convolution with its weight in a dtype, and in float64 its norm, too."""
    norm = conv.norm
    if norm is not None and dtype == torch.float64:
        mean, var, weight, bias = (None if v is None else v.to(dtype) for v in norm[:4])
        norm = BatchNorm(mean, var, weight, bias, norm.eps)  # type: ignore[arg-type]
    return conv._replace(
        weight=conv.weight.to(dtype), bias=None if conv.bias is None else conv.bias.to(dtype), norm=norm
    )


_asked: Recorder[Asked] = Recorder("asked")
#: a context: within it every operation that is bound is noted in its list
recording = _asked.recording


def is_recording() -> bool:
    """Whether this is within `recording`."""
    return _asked.active()


def note(
    x: Tensor,
    layers: Sequence[Conv | None],
    other: Tensor | None,
    epilogue: Epilogue,
    pool: tuple[Any, ...] | None = None,
    whole: bool = False,
) -> None:
    """Note an operation, if this is within `recording`."""
    if _asked.active():
        size = None if other is None else tuple(other.shape)
        kept = tuple(layer for layer in layers if layer is not None)
        _asked.note(Asked(tuple(x.shape), size, x.dtype, x.device, kept, epilogue, pool, whole))
