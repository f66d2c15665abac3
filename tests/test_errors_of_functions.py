"""Bad input to the functions: the type and the message of each error, "<argument> must <rule>, got <value>"."""

from __future__ import annotations

import pytest
import torch
from test_errors import W, X, conv, nothing_runs  # noqa: F401, the fixture

from fused_resblock.functional import BatchNorm, Shortcut, bn_act

NORM = BatchNorm(*(torch.ones(12) for _ in range(4)))
RESIDUAL = torch.zeros(2, 12, 5, 3)
SHORTCUT = Shortcut(torch.zeros(2, 6, 5, 3), torch.zeros(12, 6, 1, 1))

# how each message begins -> what is changed in a call that fits
TYPE_ERRORS = {
    "x must be a tensor, got list": {"x": [1.0]},
    "x must be a tensor, got NoneType": {"x": None},
    "x must be floating point, got torch.int32": {"x": X.int()},
    "x must be floating point, got torch.bool": {"x": X.bool()},
    "x must be floating point, got torch.complex64": {"x": X + 0j},
    "x must have elements of 16, 32 or 64 bits, got torch.float8_e5m2": {"x": X.to(torch.float8_e5m2)},
    "stride must be an integer, got 1.5": {"stride": 1.5},
    "stride must be an integer, got 2.0": {"stride": (1, 2.0)},
    "padding must be an integer, got 'same'": {"padding": "same"},
    "dilation must be an integer, got True": {"dilation": True},
    "groups must be an integer, got 1.0": {"groups": 1.0},
    "residual_stride must be an integer, got 1.0": {"residual": RESIDUAL, "residual_stride": 1.0},
    "shortcut.stride must be an integer, got 'a'": {"shortcut": SHORTCUT._replace(stride="a")},
    "norm.eps must be a number, got 'a'": {"norm": NORM._replace(eps="a")},
    "backend must be a string, got ['triton']": {"backend": ["triton"]},
    "weight must be a tensor, got list": {"weight": [1.0]},
    "weight must be floating point, got torch.int64": {"weight": W.long()},
    "bias must be a tensor, got float": {"bias": 1.0},
    "norm.weight must be floating point, got torch.int32": {"norm": NORM._replace(weight=torch.ones(12).int())},
    "norm.mean must be a tensor, got NoneType": {"norm": NORM._replace(mean=None)},
    "norm.var must be a tensor, got NoneType": {"norm": NORM._replace(var=None)},
    "norm must be a BatchNorm, as BatchNorm.of(module) gives it, got BatchNorm2d": {"norm": torch.nn.BatchNorm2d(12)},
    "residual must be floating point, got torch.int32": {"residual": RESIDUAL.int()},
    "relu must be True or False, got 'no'": {"relu": "no"},
    "residual_stride must be an integer, got 'a'": {"residual_stride": "a"},
    "weight must be a dense tensor, got torch.sparse_coo": {"weight": W.to_sparse()},
    "shortcut must be a Shortcut, got tuple": {"shortcut": (SHORTCUT.x, SHORTCUT.weight)},
}
VALUE_ERRORS = {
    "x must have 4 dimensions [N, C, H, W], got shape [8, 7, 5]": {"x": X[0]},
    "x must have 4 dimensions [N, C, H, W], got shape [1, 2, 8, 7, 5]": {"x": X[None]},
    "x must have 8 channels, as weight has, got 6": {"x": X[:, :6]},
    "x must have 16 channels, as weight has, got 8": {"x": X, "groups": 2},
    "x must be no smaller than the filter once padded, got [2, 8, 2, 5]": {"x": X[:, :, :2]},
    "x must be no smaller than the filter once padded, got [2, 8, 0, 5]": {"x": X[:, :, :0]},
    "weight must have 4 dimensions [K, C / groups, R, S], got shape [12, 8]": {"weight": W[:, :, 0, 0]},
    "weight must have x's dtype torch.float32, got torch.float16": {"weight": W.half()},
    "weight must be on x's device cpu, got meta": {"weight": W.to("meta")},
    "weight must be on x's device meta, got cpu": {"x": X.to("meta")},
    "bias must have shape [12], got [8]": {"bias": torch.zeros(8)},
    "bias must have shape [12], got [12, 1]": {"bias": torch.zeros(12, 1)},
    "bias must have x's dtype torch.float32, got torch.float64": {"bias": torch.zeros(12).double()},
    "bias must be on x's device cpu, got meta": {"bias": torch.zeros(12, device="meta")},
    "groups must divide the 12 output channels, got 5": {"groups": 5},
    "groups must divide the 12 output channels, got 0": {"groups": 0},
    "stride must be an integer or a pair of integers, got (1,)": {"stride": (1,)},
    "padding must be an integer or a pair of integers, got [1, 1, 1]": {"padding": [1, 1, 1]},
    "stride must be at least 1, got (0, 0)": {"stride": 0},
    "stride must be at least 1, got (1, -2)": {"stride": (1, -2)},
    "padding must be at least 0, got (-1, -1)": {"padding": -1},
    "dilation must be at least 1, got (0, 1)": {"dilation": (0, 1)},
    "norm.mean must have shape [12], got [8]": {"norm": NORM._replace(mean=torch.ones(8))},
    "norm.var must have shape [12], got [12, 1]": {"norm": NORM._replace(var=torch.ones(12, 1))},
    "norm.bias must be on x's device cpu, got meta": {"norm": NORM._replace(bias=torch.ones(12, device="meta"))},
    "norm.mean and norm.var must not require a gradient": {
        "norm": NORM._replace(mean=torch.ones(12, requires_grad=True))
    },
    "residual must have shape [2, 12, 5, 3], got [2, 12, 5, 4]": {"residual": torch.zeros(2, 12, 5, 4)},
    "residual must have shape [2, 12, 5, 3], got [2, 1, 5, 3]": {"residual": torch.zeros(2, 1, 5, 3)},
    "residual must have shape [2, 12, 5, 3], got [1, 12, 5, 3]": {"residual": torch.zeros(1, 12, 5, 3)},
    "residual must have shape [2, 12, 5, 3] when read at a stride of 2, got [2, 12, 11, 5]": {
        "residual": torch.zeros(2, 12, 11, 5),
        "residual_stride": 2,
    },
    "residual_stride must be at least 1, got 0": {"residual": RESIDUAL, "residual_stride": 0},
    "residual_stride must be 1 without a residual, got 2": {"shortcut": SHORTCUT, "residual_stride": 2},
    "residual_stride must be at least 1, got -3": {"shortcut": SHORTCUT, "residual_stride": -3},
    "weight must have no empty dimension, got shape [0, 8, 3, 3]": {"weight": W[:0]},
    "weight must have no empty dimension, got shape [12, 8, 0, 3]": {"weight": W[:, :, :0]},
    "norm.eps must be finite and at least 0, got -2.0": {"norm": NORM._replace(eps=-2.0)},
    "norm.eps must be finite and at least 0, got nan": {"norm": NORM._replace(eps=float("nan"))},
    "norm.eps must be finite and at least 0, got inf": {"norm": NORM._replace(eps=float("inf"))},
    "norm.mean must be of torch.float32 for such an x, got torch.float16": {
        "norm": NORM._replace(mean=torch.ones(12).half())
    },
    "residual must have 4 dimensions": {"residual": torch.zeros(12, 5, 3)},
    "residual must have x's dtype torch.float32, got torch.float64": {"residual": RESIDUAL.double()},
    "residual must be on x's device cpu, got meta": {"residual": RESIDUAL.to("meta")},
    "residual must be None when a shortcut is given, got both": {"residual": RESIDUAL, "shortcut": SHORTCUT},
    "shortcut must have the output shape [2, 12, 5, 3], got [2, 12, 3, 2]": {"shortcut": SHORTCUT._replace(stride=2)},
    "shortcut.weight must be a 1x1 convolution, got [12, 6, 3, 3]": {
        "shortcut": SHORTCUT._replace(weight=torch.zeros(12, 6, 3, 3))
    },
    "shortcut.stride must be at least 1, got 0": {"shortcut": SHORTCUT._replace(stride=0)},
    "shortcut.x must have 4 dimensions": {"shortcut": SHORTCUT._replace(x=torch.zeros(6, 5, 3))},
    "shortcut.x must have 6 channels": {"shortcut": SHORTCUT._replace(x=torch.zeros(2, 5, 5, 3))},
    "shortcut.x must have x's dtype torch.float32, got torch.float64": {
        "shortcut": SHORTCUT._replace(x=SHORTCUT.x.double())
    },
    "backend must be one of auto, triton, cudnn, onednn, eager, got 'cuda'": {"backend": "cuda"},
}


@pytest.mark.parametrize(("message", "changes"), [pytest.param(*item, id=item[0]) for item in TYPE_ERRORS.items()])
def test_type_errors_of_conv_bn_act(message, changes):
    with pytest.raises(TypeError) as caught:
        conv(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("message", "changes"), [pytest.param(*item, id=item[0]) for item in VALUE_ERRORS.items()])
def test_value_errors_of_conv_bn_act(message, changes):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is compared as text
        conv(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "module", [None, 3, torch.nn.GroupNorm(2, 8), torch.nn.BatchNorm2d(8, track_running_stats=False)]
)
def test_norms_without_running_statistics(module):
    with pytest.raises(TypeError, match="^module must be a batch norm with running statistics, got"):
        BatchNorm.of(module)


def norm(**changes) -> BatchNorm:
    """A norm of 8 channels."""
    return BatchNorm(*(torch.ones(8) for _ in range(4)))._replace(**changes)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        pytest.param({"x": 3}, TypeError, "x must be a tensor, got int", id="x"),
        pytest.param({"x": X[0]}, ValueError, "x must have 4 dimensions", id="rank"),
        pytest.param({"x": X.long()}, TypeError, "x must be floating point, got torch.int64", id="integers"),
        pytest.param(
            {"norm": norm(var=torch.ones(7))}, ValueError, "norm.var must have shape [8], got [7]", id="norm's shape"
        ),
        pytest.param({"residual": X[:, :, 1:]}, ValueError, "residual must have shape [2, 8, 7, 5]", id="residual"),
        pytest.param(
            {"residual": X, "residual_stride": 2}, ValueError, "residual must have shape [2, 8, 7, 5]", id="stride"
        ),
        pytest.param(
            {"residual": X, "residual_norm": norm(bias=torch.ones(1))},
            ValueError,
            "residual_norm.bias must",
            id="norm 2",
        ),
        pytest.param(
            {"residual_norm": norm()}, ValueError, "residual_norm must be None without a residual", id="norm alone"
        ),
        pytest.param({"residual_stride": 3}, ValueError, "residual_stride must be 1 without a residual", id="stride"),
        pytest.param({"residual": X.half()}, ValueError, "residual must have x's dtype torch.float32", id="dtype"),
        pytest.param({"residual": X.to("meta")}, ValueError, "residual must be on x's device cpu", id="device"),
        pytest.param({"backend": "best"}, ValueError, "backend must be one of auto, ", id="backend"),
    ],
)
def test_bn_act(args, error, message):
    with pytest.raises(error) as caught:
        bn_act(**{"x": X, **args})
    assert str(caught.value).startswith(message)
