"""Bad input: the type and the message of each error, "<argument> must <rule>, got <value>", before anything runs."""

from __future__ import annotations

import pytest
import torch
from cases import FP16, FP64

import fused_resblock as frb
from fused_resblock import backends
from fused_resblock.functional import BatchNorm, Shortcut, bn_act, conv_bn_act
from fused_resblock.reference import BasicBlock, Bottleneck, PreActBottleneck, ResidualBlock


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """No backend may be reached."""

    def launched(*args, **kwargs):
        pytest.fail("a backend was called")

    for backend in backends.BACKENDS.values():
        for function in ("conv_bn_act", "bn_act"):
            monkeypatch.setattr(backend, function, launched)


X = torch.zeros(2, 8, 7, 5)
W = torch.zeros(12, 8, 3, 3)
NORM = BatchNorm(*(torch.ones(12) for _ in range(4)))
SHORTCUT = Shortcut(torch.zeros(2, 6, 5, 3), torch.zeros(12, 6, 1, 1))


def conv(**changes) -> None:
    """A call that fits but for the changes."""
    conv_bn_act(**{"x": X, "weight": W, **changes})


CONV_ERRORS = [
    ("x a list", {"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ("x None", {"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ("x of rank 3", {"x": X[0]}, ValueError, "x must have 4 dimensions [N, C, H, W], got shape [8, 7, 5]"),
    ("x of rank 5", {"x": X[None]}, ValueError, "x must have 4 dimensions [N, C, H, W], got shape [1, 2, 8, 7, 5]"),
    ("x of integers", {"x": X.int()}, TypeError, "x must be floating point, got torch.int32"),
    ("x boolean", {"x": X.bool()}, TypeError, "x must be floating point, got torch.bool"),
    ("x complex", {"x": X + 0j}, TypeError, "x must be floating point, got torch.complex64"),
    ("channels", {"x": X[:, :6]}, ValueError, "x must have 8 channels, as weight has, got 6"),
    ("grouped channels", {"x": X, "groups": 2}, ValueError, "x must have 16 channels, as weight has, got 8"),
    (
        "image too small",
        {"x": X[:, :, :2]},
        ValueError,
        "x must be no smaller than the filter once padded, got [2, 8, 2, 5]",
    ),
    ("no pixels", {"x": X[:, :, :0]}, ValueError, "x must be no smaller than the filter once padded, got [2, 8, 0, 5]"),
    ("weight a list", {"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
    ("weight of rank 2", {"weight": W[:, :, 0, 0]}, ValueError, "weight must have 4 dimensions"),
    ("weight of integers", {"weight": W.long()}, TypeError, "weight must be floating point, got torch.int64"),
    ("weight's dtype", {"weight": W.half()}, ValueError, "weight must have x's dtype torch.float32, got torch.float16"),
    ("weight's device", {"weight": W.to("meta")}, ValueError, "weight must be on x's device cpu, got meta"),
    ("x's device", {"x": X.to("meta")}, ValueError, "weight must be on x's device meta, got cpu"),
    ("bias's shape", {"bias": torch.zeros(8)}, ValueError, "bias must have shape [12], got [8]"),
    ("bias's rank", {"bias": torch.zeros(12, 1)}, ValueError, "bias must have shape [12], got [12, 1]"),
    (
        "bias's dtype",
        {"bias": torch.zeros(12).double()},
        ValueError,
        "bias must have x's dtype torch.float32, got torch.float64",
    ),
    ("bias's device", {"bias": torch.zeros(12, device="meta")}, ValueError, "bias must be on x's device cpu, got meta"),
    ("bias a number", {"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    ("groups", {"groups": 5}, ValueError, "groups must divide the 12 output channels, got 5"),
    ("groups 0", {"groups": 0}, ValueError, "groups must divide the 12 output channels, got 0"),
    ("stride 0", {"stride": 0}, ValueError, "stride must be at least 1, got (0, 0)"),
    ("stride pair", {"stride": (1, -2)}, ValueError, "stride must be at least 1, got (1, -2)"),
    ("padding", {"padding": -1}, ValueError, "padding must be at least 0, got (-1, -1)"),
    ("dilation", {"dilation": (0, 1)}, ValueError, "dilation must be at least 1, got (0, 1)"),
    ("norm's mean", {"norm": NORM._replace(mean=torch.ones(8))}, ValueError, "norm.mean must have shape [12], got [8]"),
    (
        "norm's var",
        {"norm": NORM._replace(var=torch.ones(12, 1))},
        ValueError,
        "norm.var must have shape [12], got [12, 1]",
    ),
    (
        "norm of integers",
        {"norm": NORM._replace(weight=torch.ones(12).int())},
        TypeError,
        "norm.weight must be floating point, got torch.int32",
    ),
    (
        "norm's device",
        {"norm": NORM._replace(bias=torch.ones(12, device="meta"))},
        ValueError,
        "norm.bias must be on x's device cpu, got meta",
    ),
    ("norm without mean", {"norm": NORM._replace(mean=None)}, TypeError, "norm.mean must be a tensor, got NoneType"),
    ("norm without var", {"norm": NORM._replace(var=None)}, TypeError, "norm.var must be a tensor, got NoneType"),
    ("norm a module", {"norm": torch.nn.BatchNorm2d(12)}, TypeError, "norm must be a BatchNorm, got BatchNorm2d"),
    (
        "statistics with gradient",
        {"norm": NORM._replace(mean=torch.ones(12, requires_grad=True))},
        ValueError,
        "norm.mean and norm.var must not require a gradient",
    ),
    (
        "residual's shape",
        {"residual": torch.zeros(2, 12, 5, 4)},
        ValueError,
        "residual must have shape [2, 12, 5, 3], got [2, 12, 5, 4]",
    ),
    (
        "residual's channels",
        {"residual": torch.zeros(2, 1, 5, 3)},
        ValueError,
        "residual must have shape [2, 12, 5, 3], got [2, 1, 5, 3]",
    ),
    (
        "residual's batch",
        {"residual": torch.zeros(1, 12, 5, 3)},
        ValueError,
        "residual must have shape [2, 12, 5, 3], got [1, 12, 5, 3]",
    ),
    (
        "strided residual",
        {"residual": torch.zeros(2, 12, 11, 5), "residual_stride": 2},
        ValueError,
        "residual must have shape [2, 12, 5, 3] at every 2th row and column, got [2, 12, 11, 5]",
    ),
    (
        "residual_stride",
        {"residual": torch.zeros(2, 12, 5, 3), "residual_stride": 0},
        ValueError,
        "residual_stride must be at least 1, got 0",
    ),
    ("residual of rank 3", {"residual": torch.zeros(12, 5, 3)}, ValueError, "residual must have 4 dimensions"),
    (
        "residual's dtype",
        {"residual": torch.zeros(2, 12, 5, 3, dtype=FP64)},
        ValueError,
        "residual must have x's dtype torch.float32, got torch.float64",
    ),
    (
        "residual of integers",
        {"residual": torch.zeros(2, 12, 5, 3).int()},
        TypeError,
        "residual must be floating point, got torch.int32",
    ),
    (
        "residual's device",
        {"residual": torch.zeros(2, 12, 5, 3, device="meta")},
        ValueError,
        "residual must be on x's device cpu, got meta",
    ),
    (
        "residual and shortcut",
        {"residual": torch.zeros(2, 12, 5, 3), "shortcut": SHORTCUT},
        ValueError,
        "residual must be None when a shortcut is given, got both",
    ),
    (
        "shortcut's shape",
        {"shortcut": SHORTCUT._replace(stride=2)},
        ValueError,
        "shortcut must have the output shape [2, 12, 5, 3], got [2, 12, 3, 2]",
    ),
    (
        "shortcut's filter",
        {"shortcut": SHORTCUT._replace(weight=torch.zeros(12, 6, 3, 3))},
        ValueError,
        "shortcut.weight must be a 1x1 convolution, got [12, 6, 3, 3]",
    ),
    (
        "shortcut's stride",
        {"shortcut": SHORTCUT._replace(stride=0)},
        ValueError,
        "shortcut.stride must be at least 1, got 0",
    ),
    (
        "shortcut's image",
        {"shortcut": SHORTCUT._replace(x=torch.zeros(6, 5, 3))},
        ValueError,
        "shortcut.x must have 4 dimensions",
    ),
    (
        "shortcut's channels",
        {"shortcut": SHORTCUT._replace(x=torch.zeros(2, 5, 5, 3))},
        ValueError,
        "shortcut.x must have 6 channels",
    ),
    (
        "shortcut's dtype",
        {"shortcut": SHORTCUT._replace(x=SHORTCUT.x.double())},
        ValueError,
        "shortcut.x must have x's dtype torch.float32, got torch.float64",
    ),
    (
        "shortcut a pair",
        {"shortcut": (SHORTCUT.x, SHORTCUT.weight)},
        TypeError,
        "shortcut must be a Shortcut, got tuple",
    ),
    (
        "backend",
        {"backend": "cuda"},
        ValueError,
        "backend must be one of auto, triton, cudnn, onednn, eager, got 'cuda'",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in CONV_ERRORS])
def test_conv_bn_act(changes, error, message):
    with pytest.raises(error) as caught:
        conv(**changes)
    assert str(caught.value).startswith(message)


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
        pytest.param({"residual": X.half()}, ValueError, "residual must have x's dtype torch.float32", id="dtype"),
        pytest.param({"residual": X.to("meta")}, ValueError, "residual must be on x's device cpu", id="device"),
        pytest.param({"backend": "best"}, ValueError, "backend must be one of auto, ", id="backend"),
    ],
)
def test_bn_act(args, error, message):
    with pytest.raises(error) as caught:
        bn_act(**{"x": X, **args})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_checks_hold_where_gradients_are_wanted(grad):
    with pytest.raises(ValueError, match="^x must have 8 channels"):
        conv(x=X[:, :6].clone().requires_grad_(grad))


def test_mixed_dtypes_are_taken_under_autocast():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(pytest.fail.Exception, match="a backend was called"):
        conv(x=X.half())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"^x must be floating point"):
        conv(x=X.int())


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN is available here")
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: conv(backend="cudnn"), id="conv_bn_act"),
        pytest.param(lambda: bn_act(X, backend="cudnn"), id="bn_act"),
        pytest.param(lambda: frb.fuse(BasicBlock(8, 8), backend="cudnn"), id="fuse"),
    ],
)
def test_unavailable_backend(call):
    with pytest.raises(RuntimeError, match=r"^backend must be available on this machine, got 'cudnn': no CUDA device$"):
        call()


@pytest.mark.parametrize("backend", ["fast", "Eager"])
def test_unknown_backend_of_fuse(backend):
    with pytest.raises(ValueError, match=rf"^backend must be one of auto, .* got '{backend}'$"):
        frb.fuse(BasicBlock(8, 8), backend=backend)


BLOCKS = [
    pytest.param(lambda: BasicBlock(8, 8), id="BasicBlock"),
    pytest.param(lambda: Bottleneck(8, 2), id="Bottleneck"),
    pytest.param(lambda: ResidualBlock(8, 12, 2), id="ResidualBlock"),
    pytest.param(lambda: PreActBottleneck(8, 8, 4), id="PreActBottleneck"),
]


@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        pytest.param(X[:, :6], ValueError, "x must have 8 channels, as the block has, got 6", id="channels"),
        pytest.param(X[0], ValueError, "x must have 4 dimensions", id="rank"),
        pytest.param(X.int(), TypeError, "x must be floating point, got torch.int32", id="integers"),
        pytest.param(
            X.double(), ValueError, "x must have the weights' dtype torch.float32, got torch.float64", id="dtype"
        ),
        pytest.param(
            X.to(FP16), ValueError, "x must have the weights' dtype torch.float32, got torch.float16", id="half"
        ),
        pytest.param(X.to("meta"), ValueError, "x must be on the weights' device cpu, got meta", id="device"),
        pytest.param("photo", TypeError, "x must be a tensor, got str", id="no tensor"),
    ],
)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_blocks(make, x, error, message, grad):
    fused = frb.fuse(make().eval())
    with torch.set_grad_enabled(grad), pytest.raises(error) as caught:
        fused(x)
    assert str(caught.value).startswith(message)


def test_block_on_another_device_than_its_input():
    fused = frb.fuse(BasicBlock(8, 8).eval()).to("meta")
    with pytest.raises(ValueError, match="^x must be on the weights' device meta, got cpu$"):
        fused(X)


def test_checkpoint_that_does_not_fit():
    fused = frb.fuse(BasicBlock(8, 8))
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch for conv1.weight"):
        fused.load_state_dict(BasicBlock(8, 8).state_dict() | {"conv1.weight": torch.zeros(4, 4, 3, 3)})
    with pytest.raises(RuntimeError, match="Missing key"):
        fused.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fused.load_state_dict({**before, "head.weight": torch.zeros(1)})
