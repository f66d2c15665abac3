"""Properties of the fused operations over problems that hypothesis makes up, against float64 and against autograd.

The problems are the same on every run (`derandomize`). Beside `assert_parity`'s own rule there is one rounding of the
dtype at the size of the terms before they cancel: an output of few numbers may be exact in torch by luck.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    DEVICE,
    FP32,
    FP64,
    HERE,
    ConvCase,
    bn_act_reference,
    cast,
    conv_bn_act_reference,
    slack_of,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parity import assert_parity
from test_bn_act import Case as BnCase
from test_gradients import gradients
from torch import Tensor

from fused_resblock import backends
from fused_resblock.functional import BatchNorm, bn_act, conv_bn_act
from fused_resblock.params import output_size

NORMS = [None, "affine", "plain", "gamma", "beta", "wide eps"]
LAYOUTS = {
    "channels_last": lambda t: t,
    "NCHW": lambda t: t.contiguous(),
    "channel slice": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "crop": lambda t: torch.nn.functional.pad(t, (1, 2, 2, 1), value=1e4)[:, :, 2:-1, 1:-2],
    "every second": lambda t: t.repeat_interleave(2, 0).repeat_interleave(2, 3)[::2, :, :, ::2],
}


PHASES = [Phase.explicit, Phase.generate, Phase.shrink]


def bounded(max_examples: int) -> settings:
    """Few problems, the same ones each time, and no limit on the time of one."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=checks,
        phases=PHASES,
    )


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


def joins(draw: st.DrawFn) -> tuple[int | None, int]:
    """The stride at which a residual or shortcut is read, and how many rows and columns its image lacks."""
    stride = draw(st.integers(1, 3))
    return stride, draw(st.integers(0, stride - 1))


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    """A convolution that has an output, of any geometry and epilogue."""
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 2), (3, 1), (5, 2)]))
    stride, padding, dilation = draw(pairs(1, 3)), draw(pairs(0, 3)), draw(pairs(1, 3))
    if kernel == (1, 1) and draw(st.booleans()):
        stride, padding = (stride[0], stride[0]), (0, 0)  # the kernel's pointwise path
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in (0, 1)]
    height, width = (least[i] + draw(st.integers(0, 8)) for i in (0, 1))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    join = draw(st.sampled_from([None, "residual", "shortcut"]))
    step, slack = joins(draw) if join else (None, 0)
    case = ConvCase(
        batch=draw(st.integers(1, 3)),
        channels=groups * draw(st.sampled_from([1, 2, 5, 17, 40])),
        out_channels=groups * draw(st.sampled_from([1, 3, 8, 33])),
        size=(height, width),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        norm=draw(st.sampled_from(NORMS)),
        relu=draw(st.booleans()),
        residual=step if join == "residual" else None,
        shortcut=step if join == "shortcut" else None,
        slack=slack,
    )
    assert min(output_size(height, width, *kernel, stride, padding, dilation)) >= 1
    return case


@st.composite
def bn_cases(draw: st.DrawFn) -> BnCase:
    """An elementwise problem of any epilogue."""
    step, slack = joins(draw) if draw(st.booleans()) else (None, 0)
    return BnCase(
        batch=draw(st.integers(1, 3)),
        channels=draw(st.sampled_from([1, 3, 8, 33, 130])),
        size=draw(pairs(1, 9)),
        norm=draw(st.sampled_from(NORMS)),
        residual=step,
        residual_norm=draw(st.sampled_from(NORMS)) if step else None,
        slack=slack,
        relu=draw(st.booleans()),
    )


def dtypes_of(backend: str) -> list[torch.dtype]:
    """The dtypes that the backend does not hand to `eager`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = (torch.float16, torch.bfloat16, FP32, FP64)
    return [d for d in wanted if backends.refusal(backend, backends.Problem(device, d)) is None]


calls = st.fixed_dictionaries(
    {"layout": st.sampled_from(sorted(LAYOUTS)), "same": st.booleans(), "seed": st.integers(0, 2**31)}
)


def sizes(tree: Any) -> Any:
    """The arguments of the same operation whose result bounds every term of the sum: nothing cancels."""
    if isinstance(tree, BatchNorm):
        gamma, beta = (None if t is None else t.abs() for t in tree[2:4])
        return BatchNorm(-tree.mean.abs(), tree.var, gamma, beta, tree.eps)
    if isinstance(tree, Tensor):
        return tree.abs()
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(sizes, tree))
    return {key: sizes(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def check(function: Any, reference: Any, case: Any, backend: str, dtype: torch.dtype, call: dict[str, Any]) -> None:
    """Parity with torch and with itself, bit for bit; the inputs are left as they were."""
    torch.manual_seed(call["seed"])
    if dtype.itemsize == 2 and DEVICE == "cpu" and isinstance(case, ConvCase):
        case = replace(case, dilation=1)  # torch 2.13's own conv2d may crash: oneDNN, 16 bits, dilation, padding
    args = case.build(dtype, dtype if call["same"] else None)
    layout = LAYOUTS[call["layout"]]
    for key in ("x", "weight", "residual"):
        if args.get(key) is not None:
            args[key] = layout(args[key])
    wide = cast(args, FP64)
    actual, exact = function(**args, backend=backend), reference(**wide)
    terms = reference(**{**sizes(wide), "relu": False}).max()
    share = (
        torch.finfo(dtype).eps
        * (8 if dtype in (FP32, FP64) else 1)
        * float(terms / exact.abs().max().clamp_min(1e-300))
    )
    if exact.any():
        assert_parity(actual, reference(**args), exact, what="y", floor=share, slack=slack_of(backend, dtype))
    else:
        assert actual.abs().max() <= 4 * torch.finfo(dtype).eps * terms
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(actual, function(**args, backend=backend)), "a second call gave other bits"
    for key in ("x", "weight", "residual"):
        assert args.get(key) is None or torch.equal(args[key].double(), wide[key]), f"{key} was written to"


@pytest.mark.parametrize("backend", BACKENDS)
@bounded(40)
@given(case=conv_cases(), call=calls, data=st.data())
def test_conv_bn_act(backend, case, call, data):
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    check(conv_bn_act, conv_bn_act_reference, case, backend, dtype, call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_norm_has_its_own_eps(backend):
    args = ConvCase(shortcut=2).build(FP32)
    args["shortcut"] = args["shortcut"]._replace(norm=args["shortcut"].norm._replace(eps=0.5))
    torch.testing.assert_close(conv_bn_act(**args, backend=backend), conv_bn_act_reference(**args))
    args = BnCase(residual=2, residual_norm="affine").build(FP32)
    args["residual_norm"] = args["residual_norm"]._replace(eps=0.5)
    torch.testing.assert_close(bn_act(**args, backend=backend), bn_act_reference(**args))


@pytest.mark.parametrize("backend", BACKENDS)
@bounded(30)
@given(case=bn_cases(), call=calls, data=st.data())
def test_bn_act(backend, case, call, data):
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    check(bn_act, bn_act_reference, case, backend, dtype, call)


def check_gradients(function: Any, reference: Any, case: Any, backend: str, seed: int) -> None:
    """Every gradient in float64, where the formulas must agree with autograd's to rounding."""
    torch.manual_seed(seed)
    args = case.build(FP64)
    ours, torchs = gradients(function, args, backend=backend), gradients(reference, args)
    assert ours.keys() == torchs.keys()
    for name, grad in ours.items():
        largest = float(torchs[name].abs().max())
        torch.testing.assert_close(
            grad, torchs[name], rtol=1e-9, atol=1e-10 * (1 + largest), msg=lambda m, n=name: f"{n}: {m}"
        )


FLOAT64 = [pytest.param(name, id=name) for name in HERE if FP64 in dtypes_of(name)]


@pytest.mark.parametrize("backend", FLOAT64)
@bounded(25)
@given(case=conv_cases(), seed=st.integers(0, 2**31))
def test_gradients_of_conv_bn_act(backend, case, seed):
    check_gradients(conv_bn_act, conv_bn_act_reference, case, backend, seed)


@pytest.mark.parametrize("backend", FLOAT64)
@bounded(20)
@given(case=bn_cases(), seed=st.integers(0, 2**31))
def test_gradients_of_bn_act(backend, case, seed):
    check_gradients(bn_act, bn_act_reference, case, backend, seed)
