"""Bad input: the type and the message of each error, "<argument> must <rule>, got <value>", before anything runs."""

from __future__ import annotations

import pytest
import torch
from cases import FP16

import fused_resblock as frb
from fused_resblock import backends
from fused_resblock.functional import bn_act, conv_bn_act
from fused_resblock.reference import BasicBlock, Bottleneck, PreActBottleneck, ResidualBlock


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """No backend may be reached."""

    def launched(*args, **kwargs):
        pytest.fail("a backend was called")

    for backend in backends.BACKENDS.values():
        for function in ("bind_conv_bn_act", "bind_bn_act"):
            monkeypatch.setattr(backend, function, launched)


X = torch.zeros(2, 8, 7, 5)
W = torch.zeros(12, 8, 3, 3)


def conv(**changes) -> None:
    """A call that fits but for the changes."""
    conv_bn_act(**{"x": X, "weight": W, **changes})


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
