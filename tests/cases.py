"""What the tests of the fused operations share: backends, dtypes, problems, and the same operations in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resblock import backends
from fused_resblock.functional import BatchNorm, Shortcut

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HERE = [
    name for name, backend in backends.BACKENDS.items() if backend.unavailable() is None
]  # backends of this machine
BACKENDS = [pytest.param(name, id=name) for name in HERE]

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (FP16, BF16, FP32, FP64)]


def require(backend: str, dtype: torch.dtype = FP32) -> None:
    """Skip the test where the backend would hand this dtype to `eager`, which has cases of its own."""
    reason = backends.refusal(backend, backends.Problem(DEVICE, dtype))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def floor(dtype: torch.dtype) -> float:
    """`assert_parity`'s allowance for what torch computes exactly: a few units in the last place of fp32, or fp64."""
    return 1e-13 if dtype == FP64 else 1e-6


def slack_of(backend: str, dtype: torch.dtype) -> float:
    """`assert_parity`'s slack: 2, the rule; 4 where Triton's interpreter truncates to bf16 and a GPU would round.

    3 for cuDNN, whose fused operations take weights that are folded and rounded once more.
    """
    if backend == "cudnn":
        return 3.0
    return 4.0 if backend == "triton" and dtype == BF16 and DEVICE == "cpu" else 2.0


def make_norm(channels: int, kind: str = "affine", dtype: torch.dtype = FP32) -> BatchNorm:
    """A norm with random statistics: "affine", "plain" (no gamma, beta), "gamma" or "beta" alone, "eps0", "wide eps"."""
    mean, var, gamma, beta = torch.rand(4, channels, dtype=FP64) + 0.5
    mean, beta = mean - 1, beta - 1
    if kind in ("plain", "beta"):
        gamma = None
    if kind in ("plain", "gamma"):
        beta = None
    eps = {"eps0": 0.0, "wide eps": 0.1}.get(kind, 1e-5)
    return cast(BatchNorm(mean, var, gamma, beta, eps), dtype)


def cast(tree: Any, dtype: torch.dtype, device: str = DEVICE) -> Any:
    """The same structure with every tensor detached, in `dtype` and on `device`; memory formats stay."""
    if isinstance(tree, Tensor):
        return tree.detach().to(device, dtype)
    if isinstance(tree, tuple):
        items = [cast(t, dtype, device) for t in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, dict):
        return {key: cast(value, dtype, device) for key, value in tree.items()}
    return tree


@dataclass(frozen=True)
class ConvCase:
    """One `conv_bn_act`: the sizes and options that `build` makes tensors for.

    `residual` and `shortcut` are the strides at which they are read, or None; `slack` makes their images that many
    rows and columns smaller than `stride` times the output, as odd sizes do.
    """

    batch: int = 2
    channels: int = 8
    out_channels: int = 12
    size: tuple[int, int] = (7, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = False
    norm: str | None = "affine"
    relu: bool = True
    residual: int | None = None
    shortcut: int | None = None
    shortcut_channels: int = 20  # fewer than 16, at a stride: oneDNN's weight gradient writes past its memory
    slack: int = 0

    def build(self, dtype: torch.dtype, norm_dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments of `functional.conv_bn_act`; norms are fp32 under a narrower dtype unless said otherwise."""
        norm_dtype = norm_dtype or torch.promote_types(dtype, FP32)
        n, k = self.batch, self.out_channels
        filters = (k, self.channels // self.groups, *self.kernel)
        args: dict[str, Any] = {
            "x": image(n, self.channels, *self.size, dtype=dtype),
            "weight": image(*filters, dtype=dtype) / (filters[1] * filters[2] * filters[3]) ** 0.5,
            "bias": torch.randn(k).to(DEVICE, dtype) if self.bias else None,
            "norm": None if self.norm is None else make_norm(k, self.norm, norm_dtype),
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "relu": self.relu,
        }
        meta = {key: cast(value, dtype, "meta") for key, value in args.items()}
        p, q = conv_bn_act_reference(**{**meta, "norm": None}).shape[2:]
        if self.residual is not None:
            t = self.residual
            args["residual"] = image(n, k, p * t - self.slack, q * t - self.slack, dtype=dtype)
            args["residual_stride"] = t
        if self.shortcut is not None:
            t, c = self.shortcut, self.shortcut_channels
            args["shortcut"] = Shortcut(
                image(n, c, p * t - self.slack, q * t - self.slack, dtype=dtype),
                image(k, c, 1, 1, dtype=dtype) / c**0.5,
                torch.randn(k).to(DEVICE, dtype) if self.bias else None,
                None if self.norm is None else make_norm(k, self.norm, norm_dtype),
                t,
            )
        return args


def image(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Random numbers `[N, C, H, W]`, channels_last."""
    return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def normalize(x: Tensor, norm: BatchNorm | None) -> Tensor:
    """Inference batch norm in plain torch."""
    if norm is None:
        return x
    weight = norm.weight
    if weight is None and norm.bias is not None:  # on CUDA torch has no gradient of a bias alone
        weight = torch.ones_like(norm.bias)
    if x.is_cuda and torch._C._functorch.peek_interpreter_stack() is not None:  # cuDNN's has no vmap
        rows = (None if v is None else v[:, None, None] for v in (norm.mean, norm.var, weight, norm.bias))
        mean, var, weight, bias = rows
        z = (x - mean) / (var + norm.eps).sqrt()
        return z if weight is None else z * weight + (0 if bias is None else bias)
    # F.batch_norm of torch 2.11 refuses eps 0
    return torch.batch_norm(x, weight, norm.bias, norm.mean, norm.var, False, 0.0, norm.eps, True)


def conv_bn_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: BatchNorm | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    shortcut: Shortcut | None = None,
    relu: bool = True,
) -> Tensor:
    """`functional.conv_bn_act` in plain torch: what it is measured against."""
    z = normalize(F.conv2d(x, weight, bias, stride, padding, dilation, groups), norm)
    if residual is not None:
        z = z + residual[:, :, ::residual_stride, ::residual_stride]
    if shortcut is not None:
        z = z + normalize(F.conv2d(shortcut.x, shortcut.weight, shortcut.bias, shortcut.stride), shortcut.norm)
    return torch.relu(z) if relu else z


def bn_act_reference(
    x: Tensor,
    norm: BatchNorm | None = None,
    *,
    residual: Tensor | None = None,
    residual_norm: BatchNorm | None = None,
    residual_stride: int = 1,
    relu: bool = True,
) -> Tensor:
    """`functional.bn_act` in plain torch."""
    z = normalize(x, norm)
    if residual is not None:
        z = z + normalize(residual[:, :, ::residual_stride, ::residual_stride], residual_norm)
    return torch.relu(z) if relu else z
