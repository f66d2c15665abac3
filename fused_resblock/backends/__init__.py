"""Where a fused operation runs: four backends with the same functions, and the choice between them.

Each backend is a module with `unavailable()` (why it cannot be used on this machine), `unsupported(problem)` (why it
cannot run one operation), `bind_conv_bn_act` and `bind_bn_act`. To bind is to do all that depends on parameters and
shapes alone: fold, pack, choose tiles. What comes back is called with activations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..kernels.gpu import gpu_of
from ..params import PLAIN, BatchNorm, Bound, BoundPair, Conv, Epilogue, Pair, output_size
from . import asked, cudnn, eager, few_images, onednn, triton, tuned
from .eager import dense
from .select import Choice, Problem, preference, select

Shape = Sequence[int]
#: how often the caches have been cleared; what was bound before that is not used again
generation = 0
BACKENDS: dict[str, ModuleType] = {"triton": triton, "cudnn": cudnn, "onednn": onednn, "eager": eager}


def environment() -> str:
    """The value of `FUSED_RESBLOCK_BACKEND`, "" where it is not set."""
    return os.environ.get("FUSED_RESBLOCK_BACKEND", "")


def check_name(backend: str) -> str:
    """Return `backend`, or the value of `FUSED_RESBLOCK_BACKEND` in place of "auto".

    Raises:
        TypeError: if it is no string.
        ValueError: if it is neither "auto" nor a backend.
        RuntimeError: if the backend is not available on this machine.
    """
    source = "backend"
    if backend == "auto":
        backend = environment() or "auto"
        source = "FUSED_RESBLOCK_BACKEND"
    if backend == "auto":
        return backend
    if not isinstance(backend, str):
        raise TypeError(f"{source} must be a string, got {backend!r}")
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    # Dynamo cannot trace what is asked of torch; `fuse` and the calls before have asked it
    reason = None if torch.compiler.is_compiling() else BACKENDS[backend].unavailable()
    if reason is not None:
        raise RuntimeError(f"{source} must be available on this machine, got {backend!r}: {reason}")
    return backend


def refusal(name: str, problem: Problem) -> str | None:
    """Why the backend cannot run the problem on this machine; None when it can."""
    return BACKENDS[name].unavailable() or BACKENDS[name].unsupported(problem)


@lru_cache(maxsize=4096)  # images of every size may come
def resolve(backend: str, problem: Problem, measured: str | None = None) -> Choice:
    """The backend that runs `problem`: the named one, or `select`'s choice for "auto", a measured one before others.

    A named backend that cannot run this problem (its device or dtype) gives way to `eager`; the reason says so.
    """
    if backend == "auto":
        names = {name for name, _ in preference(problem)} | ({measured} if measured else set())
        return select(problem, {name: refusal(name, problem) for name in names}, measured)
    reason = refusal(backend, problem)
    return Choice(backend, "forced") if reason is None else Choice("eager", f"{backend}: {reason}")


def overpadded(kernel: Pair, padding: Pair, dilation: Pair) -> bool:
    """Whether a dilated filter can lie in the padding altogether."""
    return max(dilation) > 1 and any(p > d * (k - 1) for k, p, d in zip(kernel, padding, dilation, strict=True))


def conv_problem(
    device: torch.device, dtype: torch.dtype, shape: Shape, weight_shape: Shape, *geometry: Any
) -> Problem:
    """What `select` needs to know of a convolution: of x its device, dtype and shape; of `Conv` all but the tensors."""
    n, channels, h, w = shape
    k, _, r, s = weight_shape
    p, q = output_size(h, w, r, s, *geometry[:3])
    padding, dilation, groups = geometry[1:]
    reach = ((r - 1) * dilation[0] * w + (s - 1) * dilation[1] + 1) * channels
    pixels = n * max(h * w, p * q)
    capability = gpu_of(device).capability
    padded = overpadded((r, s), padding, dilation)
    return Problem(device.type, dtype, "conv", channels, k, (r, s), groups, pixels, reach, padded, capability)


def _ambiguous(shape: Shape) -> bool:
    """Whether an image of this shape is channels_last and NCHW at once, so that torch's operations may pick either."""
    _, channels, h, w = shape
    return channels == 1 or h * w == 1


def bind_conv_bn_act(
    x: Tensor,
    conv: Conv,
    other: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    *,
    backend: str = "auto",
    overwrite: bool = False,
) -> Bound:
    """Bind the operation of `functional.conv_bn_act` to its parameters, on the backend that `resolve` names.

    Args:
        x, other: channels_last examples of the activations: shapes, dtype and device are what counts.
        conv, epilogue: the parameters; a weight may be wider than x and is then rounded to its dtype.
        backend: a backend's name or "auto".
        overwrite: the result may be written into the memory of `other`, a residual of stride 1.

    Returns:
        A function of x and other that computes without autograd and gives a channels_last result.
    """
    shape = conv.output_shape(x)
    if x.shape[0] == 0:
        return lambda x, _: torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    asked.note(x, (conv,), other, epilogue)
    problem = conv_problem(x.device, x.dtype, x.shape, conv.weight.shape, *conv[3:])
    entry = tuned.lookup(x, conv, other, epilogue) if backend == "auto" else None
    module = BACKENDS[resolve(backend, problem, None if entry is None else entry.backend).backend]
    run: Bound = module.bind_conv_bn_act(x, conv, other, epilogue, overwrite)
    if _ambiguous(x.shape) or _ambiguous(shape) or (other is not None and _ambiguous(other.shape)):
        return lambda x, other: dense(run(x, other))
    return run


def may_be_triton(backend: str, device: torch.device) -> bool:
    """Whether a kernel of several operations may be asked for; on its own, "auto" never runs Triton's interpreter."""
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def bind_expand_shift(
    h: Tensor,
    conv: Conv,
    expand: Conv,
    other: Tensor,
    shortcut: Conv | None,
    reduce: Conv | None,
    *,
    backend: str = "auto",
    force: bool = False,
    overwrite: bool = False,
) -> BoundPair | None:
    """Bind a bottleneck's tail and the next one's first convolution as one kernel; see `kernels.expand_shift`.

    Args:
        h, other: channels_last examples of the 3x3's input, and of the residual or of the downsample branch's input.
        conv, expand, shortcut, reduce: the convolutions with their norms; the last two may be None.
        backend: a backend's name or "auto".
        force: bind it wherever it can run, not only where a table says that it is faster than conv by conv.
        overwrite: the block's output may be written into the memory of `other`, if that is a residual.

    Returns:
        A function of h and other that gives the block's output and what the next convolution makes of it (None without
        one); None where the convolutions have to run one by one.
    """
    y_shape = (h.shape[0], expand.weight.shape[0], *conv.output_size(*h.shape[2:]))
    layers = [(h.shape, conv), (conv.output_shape(h), expand)]
    layers += [(other.shape, shortcut)] if shortcut is not None else []
    layers += [(y_shape, reduce)] if reduce is not None else []
    if not may_be_triton(backend, h.device) or h.shape[0] == 0 or any(_ambiguous(shape) for shape, _ in layers):
        return None
    for shape, layer in layers:
        problem = conv_problem(h.device, h.dtype, shape, layer.weight.shape, *layer[3:])
        if refusal("triton", problem) is not None:
            return None
    asked.note(h, (conv, expand, reduce), other, Epilogue(shortcut=shortcut))
    if asked.is_recording():  # its convolutions are to be noted, too, whatever a table says
        return None
    apart = partial(bind_apart, backend=backend)
    return triton.bind_expand_shift(h, conv, expand, other, shortcut, reduce, force, overwrite, apart)


def bind_apart(
    h: Tensor,
    conv: Conv,
    expand: Conv,
    other: Tensor,
    shortcut: Conv | None,
    reduce: Conv | None,
    *,
    backend: str = "auto",
) -> BoundPair:
    """What `bind_expand_shift` gives, conv by conv."""
    inner = bind_conv_bn_act(h, conv, backend=backend)
    example = inner(h, None)
    outer = bind_conv_bn_act(example, expand, other, Epilogue(shortcut=shortcut), backend=backend)
    last = None if reduce is None else bind_conv_bn_act(outer(example, other), reduce, backend=backend)

    def run(h: Tensor, other: Tensor) -> tuple[Tensor, Tensor | None]:
        y = outer(inner(h, None), other)
        return y, None if last is None else last(y, None)

    return run


def bind_stem(x: Tensor, conv: Conv, relu: bool, pool: tuple[Any, ...], *, backend: str = "auto") -> Bound | None:
    """Bind a convolution, its norm, a ReLU and a max-pool as one operation; see `kernels.stem` and `few_images`.

    Args:
        x: a channels_last example of the image.
        conv: the convolution with its norm.
        relu: whether there is a ReLU.
        pool: the max-pool's kernel size, stride, padding, dilation and ceil_mode.
        backend: a backend's name or "auto".

    Returns:
        A function of the image; None where the pool has to be an operation of its own.
    """
    if x.shape[0] == 0:
        return None
    problem = conv_problem(x.device, x.dtype, x.shape, conv.weight.shape, *conv[3:])
    if resolve(backend, problem).backend == "onednn":
        return few_images.bind_stem(x, conv, relu, pool)
    if not may_be_triton(backend, x.device) or refusal("triton", problem) is not None:
        return None
    run = triton.bind_stem(x, conv, relu, pool, measured=backend == "auto")
    return None if run is None else (lambda x, other: dense(run(x, other)))


def bind_bn_act(
    x: Tensor,
    norm: BatchNorm | None,
    other: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    *,
    backend: str = "auto",
) -> Bound:
    """Bind the operation of `functional.bn_act`; see `bind_conv_bn_act`."""
    if x.shape[0] == 0:
        return lambda x, _: torch.empty_like(x, memory_format=torch.channels_last)
    if norm is None and other is None and not epilogue.relu:
        return lambda x, _: x.clone(memory_format=torch.channels_last)  # the result is never x itself
    n, channels, h, w = x.shape
    problem = Problem(x.device.type, x.dtype, "bn_act", channels, channels, pixels=n * h * w)
    run: Bound = BACKENDS[resolve(backend, problem).backend].bind_bn_act(x, norm, other, epilogue)
    return lambda x, other: dense(run(x, other))


def conv_bn_act(x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue, *, backend: str = "auto") -> Tensor:
    """Run the operation of `functional.conv_bn_act` without autograd; every layout is accepted."""
    x, other = dense(x), None if other is None else dense(other)
    return bind_conv_bn_act(x, conv, other, epilogue, backend=backend)(x, other)


def bn_act(
    x: Tensor, norm: BatchNorm | None, other: Tensor | None, epilogue: Epilogue, *, backend: str = "auto"
) -> Tensor:
    """Run the operation of `functional.bn_act` without autograd; every layout is accepted."""
    x, other = dense(x), None if other is None else dense(other)
    return bind_bn_act(x, norm, other, epilogue, backend=backend)(x, other)


def relu_backward(dy: Tensor, y: Tensor | None, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`dz = dy * (y > 0)` (dy itself where y is None) and its sum over N, H, W in fp32 or wider."""
    n, channels, h, w = dy.shape
    problem = Problem(dy.device.type, dy.dtype, "bn_act", channels, channels, pixels=n * h * w)
    if n and resolve(backend, problem).backend == "triton":
        return triton.relu_backward(dense(dy), None if y is None else dense(y))
    dz = dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
    return dz, dz.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32))


def clear_caches() -> None:
    """Forget every folded or repacked weight, as after an edit through `tensor.data` that PyTorch does not record."""
    global generation
    generation += 1
    for caches in (triton._weights, triton._affines, cudnn._folded, onednn._packed):
        caches.clear()
