"""`bn_act` on every backend against torch: options, sizes, dtypes, layouts, NaN, repeatability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    DTYPES,
    FP32,
    FP64,
    bn_act_reference,
    cast,
    floor,
    image,
    make_norm,
    require,
    slack_of,
)
from parity import assert_parity

from fused_resblock.functional import BatchNorm, bn_act
from fused_resblock.params import Epilogue

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@dataclass(frozen=True)
class Case:
    """One `bn_act`: sizes and options."""

    batch: int = 2
    channels: int = 10
    size: tuple[int, int] = (7, 5)
    norm: str | None = "affine"
    residual: int | None = None
    residual_norm: str | None = None
    slack: int = 0
    relu: bool = True

    def build(self, dtype: torch.dtype, norm_dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments of `functional.bn_act`."""
        norm_dtype = norm_dtype or torch.promote_types(dtype, FP32)
        h, w = self.size
        args: dict[str, Any] = {"x": image(self.batch, self.channels, h, w, dtype=dtype), "relu": self.relu}
        args["norm"] = None if self.norm is None else make_norm(self.channels, self.norm, norm_dtype)
        if self.residual is not None:
            t = self.residual
            residual = image(self.batch, self.channels, h * t - self.slack, w * t - self.slack, dtype=dtype)
            args |= {"residual": residual, "residual_stride": t}
            if self.residual_norm is not None:
                args["residual_norm"] = make_norm(self.channels, self.residual_norm, norm_dtype)
        return args


CASES = [
    pytest.param(Case(), id="norm relu"),
    pytest.param(Case(relu=False), id="norm"),
    pytest.param(Case(norm=None), id="relu"),
    pytest.param(Case(norm=None, relu=False), id="nothing"),
    pytest.param(Case(norm="plain"), id="norm without gamma and beta"),
    pytest.param(Case(norm="gamma"), id="norm without beta"),
    pytest.param(Case(norm="beta"), id="norm without gamma"),
    pytest.param(Case(norm="eps0"), id="eps 0"),
    pytest.param(Case(residual=1), id="norm residual relu"),
    pytest.param(Case(norm=None, residual=1), id="residual relu"),
    pytest.param(Case(norm=None, residual=1, relu=False), id="residual"),
    pytest.param(Case(residual=1, residual_norm="affine"), id="residual norm"),
    pytest.param(Case(norm=None, residual=1, residual_norm="plain", relu=False), id="residual norm alone"),
    pytest.param(Case(residual=2, residual_norm="eps0"), id="residual stride 2 norm eps 0"),
    pytest.param(Case(residual=2, slack=1), id="residual stride 2 odd size"),
    pytest.param(Case(residual=3, slack=2, relu=False), id="residual stride 3"),
    pytest.param(Case(size=(1, 1), residual=2, slack=1), id="1x1 image"),
    pytest.param(Case(batch=1, channels=1, size=(1, 1), residual=1), id="one number"),
    pytest.param(Case(batch=1, size=(1, 9)), id="one row"),
    pytest.param(Case(channels=1, size=(33, 31)), id="1 channel"),
    pytest.param(Case(channels=150, residual=1), id="channels over a tile"),
    pytest.param(Case(channels=128, size=(9, 9), residual=2), id="pixels over a tile"),
]


def check(args: dict, backend: str) -> torch.Tensor:
    """Parity of one call; returns its result."""
    actual = bn_act(**args, backend=backend)
    exact = bn_act_reference(**cast(args, FP64))
    assert_parity(
        actual,
        bn_act_reference(**args),
        exact,
        what="y",
        floor=floor(actual.dtype),
        slack=slack_of(backend, actual.dtype),
    )
    assert actual.is_contiguous(memory_format=torch.channels_last)
    return actual


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, backend):
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
        pytest.param(Case(), id="norm relu"),
        pytest.param(Case(residual=2, slack=1, residual_norm="affine"), id="residual norm stride 2"),
        pytest.param(Case(norm=None, residual=1), id="residual relu"),
    ],
)
def test_dtype(case, backend, dtype, norm_dtype):
    require(backend, dtype)
    check(case.build(dtype, dtype if norm_dtype else None), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    args = Case(batch=0, residual=2).build(BF16)
    y = bn_act(**args, backend=backend)
    assert y.shape == (0, 10, 7, 5)
    assert y.dtype == BF16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda t: t.contiguous(), id="NCHW"),
        pytest.param(lambda t: torch.cat([t, t], 1)[:, t.shape[1] :], id="channel slice"),
        pytest.param(lambda t: torch.cat([t, t])[t.shape[0] :], id="batch slice"),
        pytest.param(lambda t: torch.nn.functional.pad(t, (2, 1, 1, 3), value=9.0)[:, :, 1:-3, 2:-1], id="crop"),
        pytest.param(lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), id="transposed"),
        pytest.param(lambda t: t[:1].expand(t.shape), id="expanded"),
    ],
)
def test_layouts(layout, backend):
    require(backend)
    args = Case(residual=2, slack=1).build(FP32)
    args = dict(args, x=layout(args["x"]), residual=layout(args["residual"]))
    before = args["x"].clone(), args["residual"].clone()
    check(args, backend)
    assert torch.equal(args["x"], before[0]), "x was written to"
    assert torch.equal(args["residual"], before[1]), "the residual was written to"


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_that_are_columns_of_a_table(backend):
    require(backend)
    args = Case(residual=1, residual_norm="affine").build(FP32)
    for key in ("norm", "residual_norm"):
        columns = torch.stack(args[key][:4], 1).unbind(1)
        args[key] = BatchNorm(*columns, args[key].eps)
    check(args, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [pytest.param(float(v), id=v) for v in ("nan", "inf", "-inf")])
@pytest.mark.parametrize("place", ["x", "residual", "mean", "gamma", "beta"])
@pytest.mark.parametrize("relu", [pytest.param(True, id="relu"), pytest.param(False, id="no relu")])
def test_nan_and_inf_spread_as_in_torch(place, value, relu, backend):
    require(backend)
    args = Case(residual=1, relu=relu).build(FP32)
    norm = args["norm"]
    vectors = {"mean": norm.mean, "gamma": norm.weight, "beta": norm.bias}
    if place in vectors:
        vectors[place][3] = value
    else:
        args[place][1, 2, 3, 4] = value
    expected = bn_act_reference(**args)
    torch.testing.assert_close(bn_act(**args, backend=backend), expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend):
    require(backend)
    args = Case(channels=130, residual=2, residual_norm="affine").build(FP32)
    assert torch.equal(bn_act(**args, backend=backend), bn_act(**args, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_is_a_tensor_of_its_own(backend):
    require(backend)
    x = image(2, 4, 3, 3)
    y = bn_act(x, relu=False, backend=backend)
    assert torch.equal(y, x)
    y.zero_()
    assert x.abs().sum() > 0, "writing to the result changed x"


def test_every_norm_has_its_own_eps():
    """The kernel itself, which the backend gives norms that are formed beforehand, if they are not being trained."""
    require("triton")
    from fused_resblock.kernels.bn_act import bn_act as launch

    x, residual = image(2, 8, 5, 4), image(2, 8, 5, 4)
    norms = make_norm(8)._replace(eps=0.5), make_norm(8)._replace(eps=0.1)
    y = launch(x, norms[0], residual, Epilogue(residual_norm=norms[1]))
    torch.testing.assert_close(y, bn_act_reference(x, norms[0], residual=residual, residual_norm=norms[1]))
