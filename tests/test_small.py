"""Convolutions that are too small for oneDNN run as torch's own on folded weights, with the same results."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import assert_parity
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import backends
from fused_resblock.backends import eager, small
from fused_resblock.models import randomize_norms
from fused_resblock.params import BatchNorm, Conv, Epilogue
from fused_resblock.reference import BasicBlock, Bottleneck

GENERATOR = torch.Generator().manual_seed(0)


def random(*size: int) -> Tensor:
    return torch.randn(size, generator=GENERATOR).contiguous(memory_format=torch.channels_last)


def conv(c: int, k: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> Conv:
    """A convolution with a bias and a norm."""
    norm = BatchNorm.of(randomize_norms(nn.BatchNorm2d(k)).eval())
    norm = norm._replace(**{name: getattr(norm, name).detach() for name in ("weight", "bias")})
    pairs = ((n, n) for n in (stride, padding, dilation))
    return Conv(random(k, c // groups, kernel, kernel) / kernel, torch.randn(k), norm, *pairs, groups)


def double(operation: Conv) -> Conv:
    norm = operation.norm._replace(**{name: getattr(operation.norm, name).double() for name in BatchNorm._fields[:4]})
    return operation._replace(weight=operation.weight.double(), bias=operation.bias.double(), norm=norm)


@pytest.fixture
def calls(monkeypatch) -> list[object]:
    """Every binding of a small convolution."""
    found: list[object] = []
    bind = small.bind
    monkeypatch.setattr(small, "bind", lambda *args: found.append(args) or bind(*args))
    return found


CONVS = {
    "1x1": conv(8, 16, 1),
    "3x3": conv(8, 16, 3, padding=1),
    "strided": conv(8, 16, 3, 2, 1),
    "strided 1x1": conv(8, 16, 1, 2),
    "dilated": conv(8, 16, 3, padding=2, dilation=2),
}
OTHERS = ("none", "residual", "strided residual", "shortcut", "large shortcut")


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("operation", [pytest.param(made, id=name) for name, made in CONVS.items()])
def test_parity(operation, relu, other, calls):
    x = random(1, 8, 9, 7)
    _, k, p, q = operation.output_shape(x)
    residual, epilogue, exact = None, Epilogue(relu=relu), Epilogue(relu=relu)
    if other == "residual":
        residual = random(1, k, p, q)
    elif other == "strided residual":
        residual = random(1, k, 2 * p - 1, 2 * q)
        epilogue = exact = Epilogue(residual_stride=2, relu=relu)
    elif "shortcut" in other:
        channels = 2048 if "large" in other else 8
        residual, branch = random(1, channels, p, q) / channels**0.5, conv(channels, k, 1)
        epilogue, exact = (Epilogue(shortcut=made, relu=relu) for made in (branch, double(branch)))
    wide = None if residual is None else residual.double()
    before = None if residual is None else residual.clone()
    run = backends.bind_conv_bn_act(x, operation, residual, epilogue, backend="onednn")
    y = run(x, residual)
    expected = eager.conv_bn_act(x.double(), double(operation), wide, exact)
    assert_parity(y, eager.conv_bn_act(x, operation, residual, epilogue), expected, what="y", floor=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert residual is None or torch.equal(residual, before)
    assert len(calls) == 1 + (other == "shortcut")


@pytest.mark.parametrize(
    ("x", "operation"),
    [
        pytest.param(random(2, 8, 5, 5), conv(8, 8, 1), id="two images"),
        pytest.param(random(1, 8, 5, 5).double(), conv(8, 8, 1), id="fp64"),
        pytest.param(random(1, 8, 5, 5).bfloat16(), conv(8, 8, 1), id="bf16"),
        pytest.param(random(1, 8, 5, 5), conv(8, 8, 1, groups=2), id="groups"),
        pytest.param(random(1, 8, 9, 9), conv(8, 8, 5), id="5x5"),
        pytest.param(random(1, 8, 60, 60), conv(8, 8, 1), id="large image"),
        pytest.param(random(1, 64, 16, 16), conv(64, 512, 1), id="many products"),
        pytest.param(random(1, 8, 1, 1), conv(8, 8, 3, padding=1), id="padding alone"),
    ],
)
def test_what_is_not_small(x, operation):
    assert not small.is_small(x, operation)


@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_changed_weights(block, frozen, calls):
    reference = randomize_norms(nn.Sequential(block(8, 8 // block.expansion), block(8, 8 // block.expansion))).eval()
    fused = frb.fuse(reference, frozen=frozen)
    for seed in range(3):
        for size in ((1, 8, 6, 5), (2, 8, 6, 5), (1, 8, 60, 60)):
            x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                exact = copy.deepcopy(reference).double()(x.double())
                assert_parity(fused(x), reference(x), exact, what="y", floor=1e-5)
        state = {name: t * 1.1 for name, t in reference.state_dict().items() if t.is_floating_point()}
        for model in (reference, fused):
            model.load_state_dict(state, strict=False)
    assert calls
