"""The Triton kernels: CUDA tensors, or CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`), for tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.gpu import gpu_of, tf32_allowed
from ..kernels.tf32 import tf32_weight
from ..kernels.tiles import StageTile, Tile
from ..params import PLAIN, Affine, BatchNorm, Bound, BoundPair, Conv, Epilogue
from . import asked, tuned
from .folding import TensorCache, bypassed, scale_shift
from .guarded import guarded
from .select import Problem

MOST_ROWS = 8192  # of a program: its last row is counted in 32 bits, too
_weights = TensorCache()  # in another dtype, rounded to TF32, channels_last, or with groups joined
_affines = TensorCache()  # norms as scale and shift


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET is not set"
    return None


def interpreting() -> bool:
    """Whether Triton's interpreter is switched on."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot run the problem; None when it can."""
    if problem.device == "cpu" and not interpreting():
        return "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    if problem.device not in ("cpu", "cuda"):
        return f"no Triton kernels for {problem.device} tensors"
    if problem.dtype == torch.float64 and problem.device == "cuda":
        return "float64 runs in the interpreter only"
    if problem.pixels >= 2**31 - MOST_ROWS or problem.tap_reach >= 2**31:
        return "the image has more pixels than a 32-bit index counts"
    return None


def affine(norm: BatchNorm | None, conv: Conv | None, dtype: torch.dtype) -> Any:
    """A norm, and the bias of the convolution in front of it, as scale and shift in fp32 (fp64 for fp64).

    The weight of that one, `conv`, tells norms apart that a compiled graph computes one after the other in the same
    memory. While weights are trained (`folding.uncached`) the norm's own tensors go to the kernel,
    which forms them itself.
    """
    if norm is None:
        return None
    if bypassed():
        mean, var, weight, beta = (None if v is None else v.contiguous() for v in norm[:4])
        return BatchNorm(mean, var, weight, beta, norm.eps)  # type: ignore[arg-type]
    wide = torch.promote_types(dtype, torch.float32)
    bias = None if conv is None else conv.bias
    parts = (*norm[:4], bias) if conv is None else (conv.weight, *norm[:4], bias)

    def compute() -> Affine:
        with torch.no_grad():
            scale, shift = scale_shift(norm, wide)
            return Affine(scale, shift if bias is None else shift + bias.to(wide) * scale)

    return _affines.get(parts, (wide, norm.eps), compute)


def joined_groups(outputs: int, channels: int, groups: int) -> int:
    """How many groups of a convolution a kernel takes for one: as many as make 32 channels, where that divides them."""
    per_group = min(channels, outputs) // groups
    joined = 1
    while joined * per_group < 32 and groups % (2 * joined) == 0:
        joined *= 2
    return joined


def in_tf32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix units multiply in TF32: fp32 where torch allows it, from Ampere on, and not in the interpreter."""
    return dtype == torch.float32 and tf32_allowed() and not interpreting() and gpu_of(device).capability >= 80


def prepare(conv: Conv, dtype: torch.dtype, joined: int = 1) -> Conv:
    """The convolution as the kernels take it: weight in `dtype` and channels_last, groups joined, norm as `affine`.

    Weights that are multiplied in TF32 are rounded to it (`tf32_weight`).
    """
    weight, bias = conv.weight, conv.bias
    tf32 = in_tf32(dtype, weight.device)
    dense = weight.is_contiguous(memory_format=torch.channels_last) and weight.data_ptr() % 16 == 0
    if joined > 1 or weight.dtype != dtype or tf32 or not dense:

        def compute() -> Tensor:
            from ..kernels.halo import join_groups

            wide = join_groups(weight.detach(), conv.groups, joined) if joined > 1 else weight.detach()
            wide = tf32_weight(wide.to(dtype)) if tf32 else wide.to(dtype)
            return wide.clone(memory_format=torch.channels_last)  # memory of its own begins at a multiple of 16

        weight = _weights.get((conv.weight,), (dtype, joined, conv.groups, tf32), compute)
    norm = affine(conv.norm, conv, dtype)
    if isinstance(norm, Affine):
        bias = None
    bias = None if bias is None else bias.contiguous()
    return conv._replace(weight=weight, bias=bias, norm=norm, groups=conv.groups // joined)


def prepared(
    x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue, tile: Tile | None = None
) -> tuple[Tensor, Conv, Tensor | None, Epilogue]:
    """The arguments of an operation as the kernels take them, or as the kernel that a tile is for does.

    Small groups are joined into larger ones with zeros between them, so that the matrix units have full tiles; by
    `conv_halo` itself.
    """
    if epilogue.shortcut is not None:
        epilogue = epilogue._replace(shortcut=prepare(epilogue.shortcut, x.dtype))
    joined = 1 if tile is not None and tile.halo else _joined(conv)
    return x, prepare(conv, x.dtype, joined), other, epilogue


def _joined(conv: Conv) -> int:
    return joined_groups(conv.weight.shape[0], conv.weight.shape[1] * conv.groups, conv.groups)


def _shaped(conv: Conv) -> Conv:
    """The convolution with its groups joined, of which the shapes alone are there: what a tile is chosen for."""
    joined, (k, c, r, s) = _joined(conv), conv.weight.shape
    weight = torch.empty((k, joined * c, r, s), dtype=conv.weight.dtype, device="meta")
    return conv._replace(weight=weight, groups=conv.groups // joined)


def bind_conv_bn_act(x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue, overwrite: bool) -> Bound:
    """See `backends.bind_conv_bn_act`."""
    from ..kernels.convolution import bind_convolution, choose, usable

    shapes = x, _shaped(conv), other, epilogue

    def bind(tile: Tile, overwrite: bool) -> Bound:
        return bind_convolution(*prepared(x, conv, other, epilogue, tile), tile, overwrite=overwrite)

    def bind_predicted(overwrite: bool = False) -> Bound:
        return bind(choose(*shapes, gpu_of(x.device)), overwrite)

    tile = usable(tuned.lookup(x, conv, other, epilogue), *shapes)
    if tile is None:
        return bind_predicted(overwrite)
    return guarded(partial(bind, tile, overwrite), f"tile {tile}", bind_predicted, "with a predicted tile")


def tail_refusal(
    dtype: torch.dtype, conv: Conv, expand: Conv, shortcut: Conv | None, reduce: Conv | None
) -> str | None:
    """Why there is no tile for a tail of these convolutions, of activations in `dtype`; None when there is one."""
    from ..kernels.stage import candidates, refusal

    if (reason := refusal(conv, expand, shortcut, reduce)) is not None:
        return reason
    if dtype == torch.float32 and not tf32_allowed():
        return "products in fp32 do not fit the registers, and TF32 is not allowed"
    width, outputs = conv.weight.shape[0], 0 if reduce is None else reduce.weight.shape[0]
    if not candidates(width, outputs, dtype.itemsize, shortcut is not None, gpu_of(conv.weight.device)):
        return (
            f"no tile has room for {max(width, outputs)} channels in {tuned.dtype_name(dtype).removeprefix('torch.')}"
        )
    return None


def bind_expand_shift(
    h: Tensor,
    conv: Conv,
    expand: Conv,
    other: Tensor,
    shortcut: Conv | None,
    reduce: Conv | None,
    force: bool,
    overwrite: bool,
    apart: Callable[..., BoundPair],
) -> BoundPair | None:
    """See `backends.bind_expand_shift`; `apart` binds the same conv by conv."""
    from ..kernels.stage import choose_stage_tile, gemms_of, takes
    from ..kernels.tables import stage_name

    if tail_refusal(h.dtype, conv, expand, shortcut, reduce) is not None:
        return None
    entry = tuned.lookup_stage(h, conv, stage_name(conv, expand, shortcut, reduce))
    if entry is not None and entry.tile and not takes(h, conv, expand, shortcut, reduce, entry.tile):
        entry = None  # what was measured is not what would run
    if not force and (entry is None or not entry.faster):
        return None
    tile = None if entry is None else entry.tile
    if tile is None:
        gemms = gemms_of(h.shape, conv, expand, shortcut, reduce)
        tile = choose_stage_tile(gemms, h.element_size(), gpu_of(h.device))
    if tile is None:
        return None
    bind = partial(bind_tail, h, conv, expand, other, shortcut, reduce, tile, overwrite)
    return guarded(
        bind, f"tile {tile} of a tail", lambda: apart(h, conv, expand, other, shortcut, reduce), "conv by conv"
    )


def tail_tiles(h: Tensor, conv: Conv, expand: Conv, shortcut: Conv | None, reduce: Conv | None) -> list[StageTile]:
    """The tiles that a search has to try for a tail."""
    from ..kernels.stage import fitting, gemms_of, takes

    if tail_refusal(h.dtype, conv, expand, shortcut, reduce) is not None:
        return []
    tiles = fitting(gemms_of(h.shape, conv, expand, shortcut, reduce), h.element_size(), gpu_of(h.device))
    return [tile for tile in tiles if takes(h, conv, expand, shortcut, reduce, tile)]


def bind_tail(
    h: Tensor,
    conv: Conv,
    expand: Conv,
    other: Tensor,
    shortcut: Conv | None,
    reduce: Conv | None,
    tile: StageTile,
    overwrite: bool = False,
) -> BoundPair:
    """See `bind_expand_shift`; with this tile."""
    from ..kernels.stage import bind_stage

    layers = [None if layer is None else prepare(layer, h.dtype) for layer in (conv, expand, shortcut, reduce)]
    return bind_stage(h, *layers[:2], other, *layers[2:], tile, overwrite=overwrite)


def packed_stem(x: Tensor, conv: Conv) -> Tensor:
    """The weight of a stem as its kernels take it, formed once."""
    from ..kernels.stem import pack_weight

    odd, tf32 = bool(conv.padding[1] % 2), in_tf32(x.dtype, x.device)

    def pack() -> Tensor:
        weight = conv.weight.detach().to(x.dtype)
        return pack_weight(tf32_weight(weight) if tf32 else weight, odd)

    return _weights.get((conv.weight,), ("stem", x.dtype, odd, tf32), pack)


def bind_stem(x: Tensor, conv: Conv, relu: bool, pool: tuple[Any, ...], measured: bool) -> Bound | None:
    """See `backends.bind_stem`; `measured` asks whether a table knows something faster."""
    from ..kernels import stem, tables

    if stem.refusal(conv, relu, pool) is not None:
        return None
    asked.note(x, (conv,), None, Epilogue(relu=relu), pool)
    entry = tuned.lookup(x, conv, None, PLAIN, suffix=tables.STEM) if measured else None
    if entry is not None and entry.backend != "triton":
        return None
    packed = packed_stem(x, conv)
    norm = affine(conv.norm, conv, x.dtype)
    bias = None if isinstance(norm, Affine) else conv.bias
    return stem.bind_stem(x, conv._replace(bias=bias, norm=norm), packed)


def bind_bn_act(x: Tensor, norm: BatchNorm | None, other: Tensor | None, epilogue: Epilogue) -> Bound:
    """See `backends.bind_bn_act`."""
    from ..kernels.bn_act import bind_bn_act as bind

    epilogue = epilogue._replace(residual_norm=affine(epilogue.residual_norm, None, x.dtype))
    return bind(tuple(x.shape), x.dtype, affine(norm, None, x.dtype), other, epilogue, device=x.device)


def relu_backward(dy: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `backends.relu_backward`."""
    from ..kernels.relu_backward import relu_backward as launch

    return launch(dy, y)
