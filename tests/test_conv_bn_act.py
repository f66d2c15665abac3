"""`conv_bn_act` on every backend against torch: shapes, options, dtypes, layouts, NaN, repeatability."""

from __future__ import annotations

import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    DEVICE,
    DTYPES,
    FP16,
    FP32,
    FP64,
    ConvCase,
    cast,
    conv_bn_act_reference,
    floor,
    require,
    slack_of,
)
from conv_cases import EPILOGUES, GEOMETRIES, named
from parity import assert_parity

from fused_resblock.functional import conv_bn_act

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def check(args: dict, backend: str) -> torch.Tensor:
    """Parity of one call; returns its result."""
    actual = conv_bn_act(**args, backend=backend)
    exact = conv_bn_act_reference(**cast(args, FP64))
    assert_parity(
        actual,
        conv_bn_act_reference(**args),
        exact,
        what="y",
        floor=floor(actual.dtype),
        slack=slack_of(backend, actual.dtype),
    )
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert not actual.requires_grad
    return actual


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", named(GEOMETRIES))
def test_geometry(case, backend):
    require(backend)
    check(case.build(FP32), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", named(EPILOGUES))
def test_epilogue(case, backend):
    require(backend)
    check(case.build(FP32), backend)


@pytest.mark.parametrize(
    "norm_dtype", [pytest.param(None, id="fp32 norm"), pytest.param("same", id="norm of x's dtype")]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ConvCase(kernel=(1, 1), padding=0, channels=40), id="1x1"),
        pytest.param(ConvCase(stride=2, bias=True, residual=2, slack=1), id="3x3 stride 2 residual"),
        pytest.param(ConvCase(groups=2, residual=1), id="grouped residual"),
        pytest.param(ConvCase(shortcut=2), id="shortcut"),
        pytest.param(ConvCase(norm=None, relu=False), id="conv"),
    ],
)
def test_dtype(case, backend, dtype, norm_dtype):
    require(backend, dtype)
    check(case.build(dtype, dtype if norm_dtype else None), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(ConvCase(batch=0), FP32, id="3x3"),
        pytest.param(ConvCase(batch=0, stride=2, shortcut=2), BF16, id="shortcut bf16"),
        pytest.param(ConvCase(batch=0, residual=2, groups=2), FP32, id="residual"),
    ],
)
def test_empty_batch(case, dtype, backend):
    args = case.build(dtype)
    y = conv_bn_act(**args, backend=backend)
    assert y.shape == conv_bn_act_reference(**args).shape
    assert y.dtype == dtype


FOLDING = ("onednn", "cudnn")  # they multiply gamma / sqrt(var + eps) into the weight
SPECIALS = [
    pytest.param(float("nan"), id="nan"),
    pytest.param(float("inf"), id="inf"),
    pytest.param(-float("inf"), id="-inf"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", SPECIALS)
@pytest.mark.parametrize("place", ["x", "weight", "residual", "mean", "beta", "gamma", "shortcut"])
@pytest.mark.parametrize("relu", [pytest.param(True, id="relu"), pytest.param(False, id="no relu")])
def test_nan_and_inf_spread_as_in_torch(place, value, relu, backend):
    require(backend)
    joined = {"shortcut": 1} if place == "shortcut" else {"residual": 1}
    args = ConvCase(kernel=(1, 1), padding=0, relu=relu, **joined).build(FP32)
    norm = args["norm"]
    vectors = {"mean": norm.mean, "beta": norm.bias, "gamma": norm.weight}
    if place in vectors:
        vectors[place][3] = value
    else:
        tensor = args["shortcut"].x if place == "shortcut" else args[place]
        tensor[1, 2, 0, 0] = value
    actual, expected = conv_bn_act(**args, backend=backend), conv_bn_act_reference(**args)
    assert not torch.isfinite(conv_bn_act_reference(**{**args, "relu": False})).all(), "the case is void"
    if backend in FOLDING and place == "gamma" and value == value:
        actual[:, 3] = expected[:, 3]  # an infinite folded weight: terms may cancel to NaN
    if backend == "onednn" and relu:
        actual, expected = (y[~expected.isnan()] for y in (actual, expected))  # as documented, it does not keep NaN
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_x_reaches_its_neighbours_only(backend):
    require(backend)
    args = ConvCase(residual=1, relu=backend != "onednn").build(FP32)  # oneDNN's fused ReLU makes NaN 0
    args["x"][1, 2, 3, 3] = float("nan")
    y = conv_bn_act(**args, backend=backend)
    hit = torch.zeros(2, 12, 7, 5, dtype=torch.bool, device=DEVICE)
    hit[1, :, 2:5, 2:5] = True
    assert torch.equal(y.isnan(), hit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [pytest.param(FP16, id="float16"), pytest.param(BF16, id="bfloat16")])
def test_overflow_gives_inf_as_in_torch(dtype, backend):
    require(backend, dtype)
    args = ConvCase(kernel=(1, 1), padding=0, norm=None).build(dtype)
    args["x"][:] = torch.finfo(dtype).max
    args["weight"][:] = 2
    assert conv_bn_act(**args, backend=backend).isposinf().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_variance_and_zero_eps_give_what_torch_gives(backend):
    require(backend)
    args = ConvCase(norm="eps0").build(FP32)
    args["norm"].var[2] = 0
    args["norm"].var[5] = 1e-30
    actual, expected = conv_bn_act(**args, backend=backend), conv_bn_act_reference(**args)
    if backend in FOLDING:
        actual[:, 2] = expected[:, 2]  # an infinite folded weight: terms may cancel to NaN
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit(dtype, backend):
    require(backend, dtype)
    args = ConvCase(stride=2, channels=40, residual=2, bias=True).build(dtype)
    assert torch.equal(conv_bn_act(**args, backend=backend), conv_bn_act(**args, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean_keeps_its_digits(backend):
    """A norm whose mean dwarfs its deviation: scale and shift of low precision would lose the signal."""
    require(backend, BF16)
    args = ConvCase(kernel=(1, 1), padding=0, relu=False).build(BF16)
    norm = args["norm"]
    args["norm"] = norm._replace(mean=norm.mean + 3, var=norm.var / 10)
    check(args, backend)
