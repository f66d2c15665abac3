"""`bn_act` and `relu_backward` against float64, and that a ReLU keeps NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fused_resblock.backends import eager
from fused_resblock.kernels.bn_act import bn_act
from fused_resblock.kernels.relu_backward import relu_backward
from fused_resblock.params import BatchNorm, Epilogue

from ..harness import parity
from .context import Context
from .device import Broken, error_line, is_broken
from .operations import DTYPES, poisoned
from .records import Records

#: channels and pixels a side: every stage's output, and sizes that fill no block
SIZES = ((64, 56), (256, 56), (128, 28), (512, 28), (1024, 14), (2048, 7), (512, 7), (67, 9), (1, 1))
Judgement = tuple[str | None, float, float]


def _normal(generator: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    t = torch.randn(size, generator=generator, device=generator.device).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if len(size) == 4 else t


def _norm(generator: torch.Generator, dtype: torch.dtype, c: int) -> BatchNorm:
    mean, var, gamma, beta = (_normal(generator, torch.float32, c) for _ in range(4))
    return BatchNorm(*(v.to(dtype) for v in (mean, var.abs() + 0.5, gamma, beta)))


def _double(norm: BatchNorm | None) -> BatchNorm | None:
    return None if norm is None else BatchNorm(*(None if v is None else v.double() for v in norm[:4]), norm.eps)


def judge_bn_act(generator: torch.Generator, dtype: torch.dtype, c: int, size: int, epilogue: str) -> Judgement:
    """The norm alone, with a residual, and with a strided residual that has a norm of its own."""
    x, norm = _normal(generator, dtype, 3, c, size, size), _norm(generator, dtype, c)
    stride = 2 if epilogue == "strided" else 1
    residual = None if epilogue == "plain" else _normal(generator, dtype, 3, c, size * stride, size * stride)
    second = _norm(generator, dtype, c) if epilogue == "strided" else None
    end = Epilogue(stride, second)
    with poisoned():
        y = bn_act(x, norm, residual, end)
    same = eager.bn_act(x, norm, residual, end)
    wide = None if residual is None else residual.double()
    exact = eager.bn_act(x.double(), _double(norm), wide, Epilogue(stride, _double(second)))
    broken = x.clone()
    broken[0, 0, 0, 0] = float("nan")
    kept = bn_act(broken, norm, residual, end)
    if not bool(kept[0, 0, 0, 0].isnan()):
        return "the ReLU drops NaN", float("nan"), float("nan")
    failure, error, bound = parity(y, same, exact)
    # among few values torch can be lucky: one of the two nearest numbers of the dtype is right
    ulp = torch.finfo(dtype).eps * exact.abs() + 1e-6 * exact.abs().max()
    if failure is not None and bool(((y.double() - exact).abs() <= ulp).all()):
        failure = None
    return failure, error, bound


def judge_relu_backward(generator: torch.Generator, dtype: torch.dtype, c: int, size: int, epilogue: str) -> Judgement:
    """The masked gradient, which must be torch's own to the bit, and its sums."""
    dy, y = (_normal(generator, dtype, 3, c, size, size) for _ in range(2))
    with poisoned():
        dz, total = relu_backward(dy, y if epilogue == "relu" else None)
    expected = torch.ops.aten.threshold_backward(dy, y, 0) if epilogue == "relu" else dy
    if not torch.equal(dz, expected):
        return "the gradient is not torch's", float("nan"), float("nan")
    same = expected.sum((0, 2, 3), dtype=torch.float32)
    # the order of a sum is free: allow for what reordering fp32 additions of these magnitudes can do
    exact, share = expected.double().sum((0, 2, 3)), 1e-6 * expected.double().abs().sum((0, 2, 3)).max().item()
    error, bound = (total.double() - exact).abs().max().item(), 2 * (same.double() - exact).abs().max().item() + share
    return (None if error <= bound else f"max error {error:.2e} exceeds {bound:.2e}"), error, bound


def cases(context: Context) -> Iterator[tuple[str, str, str, Callable[[torch.Generator, torch.dtype], Judgement]]]:
    """Kernel, dtype name, case, and what judges it."""
    sizes = SIZES[-2:] if context.quick else SIZES
    for dtype in (name for name in DTYPES if name != "ieee"):  # without products TF32 and IEEE are the same
        for c, size in sizes:
            for kernel, judge, epilogues in (
                ("bn_act", judge_bn_act, ("plain", "residual", "strided")),
                ("relu_backward", judge_relu_backward, ("relu", "identity")),
            ):
                for epilogue in epilogues:

                    def case(generator, kind, judge=judge, c=c, size=size, epilogue=epilogue) -> Judgement:
                        return judge(generator, kind, c, size, epilogue)

                    yield kernel, dtype, f"{c}.{size}px.{epilogue}", case


@torch.no_grad()
def check_elementwise(context: Context, table: Records) -> None:
    """Check both kernels at every size that is not on record."""
    for kernel, dtype, case, judge in cases(context):
        if table.done(kernel, dtype, case, ""):
            continue
        if not context.deadline.allows():
            return
        row: dict[str, object] = {"kernel": kernel, "dtype": dtype, "case": case, "tile": ""}
        try:
            generator = torch.Generator(context.device.torch_name).manual_seed(0)
            failure, error, bound = judge(generator, DTYPES[dtype][0])
            verdict = {"status": "wrong" if failure else "ok", "max_error": error, "error_bound": bound}
            table.add(**row, **verdict, note=failure or "")
        except Exception as error:  # a kernel may fail to compile, to load and to run
            table.add(**row, status="crash" if is_broken(error) else "failed", note=error_line(error))
            if is_broken(error):
                raise Broken(error_line(error)) from error
