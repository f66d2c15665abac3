"""The four drop-in blocks against their references: outputs, gradients, training, state, sizes and layouts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import BACKENDS, BF16, DEVICE, FP16, FP32, FP64, floor, require, slack_of
from parity import assert_parity
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock, Bottleneck, PreActBottleneck, ResidualBlock, conv1x1

FUSED = {
    BasicBlock: frb.FusedBasicBlock,
    Bottleneck: frb.FusedBottleneck,
    ResidualBlock: frb.FusedResidualBlock,
    PreActBottleneck: frb.FusedPreActBottleneck,
}


def downsample(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """torchvision's downsample branch."""
    return nn.Sequential(conv1x1(channels, out_channels, stride), nn.BatchNorm2d(out_channels))


def frozen(channels: int) -> nn.Module:
    """torchvision's frozen norm with eps 0, as its COCO detectors have it."""
    return pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(channels, eps=0.0)


# 16 channels: oneDNN's weight gradient of a strided 1x1 of fewer writes past its memory
# name -> (reference class, constructor arguments made anew for each call); all take 16 channels
BLOCKS: dict[str, tuple[type[nn.Module], Callable[[], dict]]] = {
    "BasicBlock": (BasicBlock, lambda: {"inplanes": 16, "planes": 16}),
    "BasicBlock downsample": (BasicBlock, lambda: {"inplanes": 16, "planes": 20, "downsample": downsample(16, 20, 1)}),
    "BasicBlock stride 2": (
        BasicBlock,
        lambda: {"inplanes": 16, "planes": 20, "stride": 2, "downsample": downsample(16, 20, 2)},
    ),
    "Bottleneck": (Bottleneck, lambda: {"inplanes": 16, "planes": 4}),
    "Bottleneck downsample": (Bottleneck, lambda: {"inplanes": 16, "planes": 6, "downsample": downsample(16, 24, 1)}),
    "Bottleneck stride 2": (
        Bottleneck,
        lambda: {"inplanes": 16, "planes": 6, "stride": 2, "downsample": downsample(16, 24, 2)},
    ),
    "Bottleneck groups": (Bottleneck, lambda: {"inplanes": 16, "planes": 4, "groups": 4, "base_width": 128}),
    "Bottleneck dilation": (Bottleneck, lambda: {"inplanes": 16, "planes": 4, "dilation": 2}),
    "Bottleneck frozen": (Bottleneck, lambda: {"inplanes": 16, "planes": 4, "norm_layer": frozen}),
    "ResidualBlock": (ResidualBlock, lambda: {"in_channels": 16, "out_channels": 16}),
    "ResidualBlock channels": (ResidualBlock, lambda: {"in_channels": 16, "out_channels": 20}),
    "ResidualBlock stride 2": (ResidualBlock, lambda: {"in_channels": 16, "out_channels": 20, "stride": 2}),
    "PreAct": (PreActBottleneck, lambda: {"in_channels": 16, "out_channels": 16, "bottleneck_channels": 4}),
    "PreAct channels": (PreActBottleneck, lambda: {"in_channels": 16, "out_channels": 20, "bottleneck_channels": 4}),
    "PreAct stride 2": (
        PreActBottleneck,
        lambda: {"in_channels": 16, "out_channels": 16, "bottleneck_channels": 4, "stride": 2},
    ),
    "PreAct channels stride 2": (
        PreActBottleneck,
        lambda: {"in_channels": 16, "out_channels": 20, "bottleneck_channels": 4, "stride": 2},
    ),
    "PreAct dilation": (
        PreActBottleneck,
        lambda: {"in_channels": 16, "out_channels": 16, "bottleneck_channels": 4, "dilation": 2},
    ),
}
NAMES = [pytest.param(name, id=name) for name in BLOCKS]
ONE_OF_EACH = [
    pytest.param(name, id=name)
    for name in ("BasicBlock stride 2", "Bottleneck", "ResidualBlock stride 2", "PreAct stride 2")
]


def both(name: str, dtype: torch.dtype = FP32, backend: str = "auto") -> tuple[nn.Module, nn.Module]:
    """The reference block and the fused class with the same state, in eval mode."""
    cls, kwargs = BLOCKS[name]
    reference = randomize_norms(cls(**kwargs()))
    for module in reference.modules():
        if type(module).__name__ == "FrozenBatchNorm2d":
            for tensor in module.buffers():
                tensor.uniform_(0.5, 1.5)
    fused = FUSED[cls](**kwargs())
    fused.load_state_dict(reference.state_dict())
    fused = frb.fuse(fused, backend=backend, strict=True)  # sets the backend of a block that is fused already
    return reference.eval().to(DEVICE, dtype), fused.eval().to(DEVICE, dtype)


def photo(*size: int, dtype: torch.dtype = FP32) -> Tensor:
    """Random numbers, channels_last."""
    return torch.randn(size).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def check(reference: nn.Module, fused: nn.Module, x: Tensor, backend: str) -> None:
    """Parity of the output against the reference in float64."""
    with torch.no_grad():
        expected, actual = reference(x), fused(x)
        exact = copy.deepcopy(reference).double()(x.double())
    assert_parity(actual, expected, exact, what="y", floor=floor(x.dtype), slack=slack_of(backend, x.dtype))
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (FP16, BF16, FP32, FP64)])
@pytest.mark.parametrize("name", NAMES)
def test_forward(name, dtype, backend):
    require(backend, dtype)
    reference, fused = both(name, dtype, backend)
    assert fused.reference_reason() is None
    check(reference, fused, photo(2, 16, 7, 6, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, backend):
    """Of the input and of every parameter, with frozen statistics."""
    require(backend)
    reference, fused = both(name, FP32, backend)
    exact = copy.deepcopy(reference).double()
    x = photo(2, 16, 7, 6)
    found = []
    for block in (fused, reference, exact):
        leaf = x.clone().to(next(block.parameters()).dtype).requires_grad_()
        y = block(leaf)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
        found.append({"x": leaf.grad, **{n: p.grad for n, p in block.named_parameters()}})
    assert found[0].keys() == found[2].keys()
    for key in found[2]:
        assert_parity(found[0][key], found[1][key], found[2][key], what=key, floor=1e-5)


@pytest.mark.parametrize("name", [p for p in NAMES if p.id != "Bottleneck frozen"])
def test_training_is_the_reference_to_the_bit(name):
    reference, fused = both(name)
    reference.train(), fused.train()
    for _ in range(2):
        x = photo(4, 16, 5, 6)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = fused(ours), reference(theirs)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(ours.grad, theirs.grad)
    state, expected_state = fused.state_dict(), reference.state_dict()
    for key, value in expected_state.items():
        assert torch.equal(state[key], value), key
    for (key, p), q in zip(fused.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_frozen_norms_in_a_training_model(name, backend):
    """`bn.eval()` inside `model.train()`: fused, with gradients, and the statistics stay."""
    require(backend)
    reference, fused = both(name, FP32, backend)
    for block in (reference, fused):
        block.train()
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    assert fused.reference_reason() is None
    before = copy.deepcopy(fused.state_dict())
    x = photo(2, 16, 7, 6)
    y, expected = fused(x), reference(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    expected.sum().backward()
    for (key, p), q in zip(fused.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
    for key, value in fused.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_some_norms_frozen_is_the_reference_to_the_bit(name):
    reference, fused = both(name)
    for block in (reference, fused):
        block.train()
        block.get_submodule("block.1" if "Residual" in name else "bn1").eval()
    x = photo(2, 16, 7, 6)
    assert torch.equal(fused(x), reference(x))
    for (key, ours), theirs in zip(fused.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "size",
    [
        pytest.param((1, 16, 1, 1), id="one pixel"),
        pytest.param((2, 16, 1, 5), id="one row"),
        pytest.param((1, 16, 8, 8), id="even"),
        pytest.param((3, 16, 9, 2), id="odd by even"),
    ],
)
def test_sizes(name, size, backend):
    require(backend)
    check(*both(name, FP32, backend), photo(*size), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda t: t.contiguous(), id="NCHW"),
        pytest.param(lambda t: torch.cat([t, t], 1)[:, 16:], id="channel slice"),
        pytest.param(lambda t: torch.cat([t, t])[t.shape[0] :], id="batch slice"),
        pytest.param(lambda t: nn.functional.pad(t, (2, 1, 3, 2), value=50.0)[:, :, 3:-2, 2:-1], id="crop"),
        pytest.param(lambda t: t[:1].expand(2, -1, -1, -1), id="expanded"),
        pytest.param(lambda t: t.transpose(2, 3), id="transposed"),
    ],
)
def test_layouts(name, layout, backend):
    require(backend)
    x = layout(photo(2, 16, 7, 6))
    before = x.clone()
    check(*both(name, FP32, backend), x, backend)
    assert torch.equal(x, before), "x was written to"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name, backend):
    reference, fused = both(name, FP32, backend)
    x = photo(0, 16, 7, 6).requires_grad_()
    y = fused(x)
    assert y.shape == reference(x).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in fused.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_goes_both_ways(name):
    reference, fused = both(name)
    assert list(fused.state_dict()) == list(reference.state_dict())
    other = BLOCKS[name][0](**BLOCKS[name][1]())
    other.load_state_dict(fused.state_dict())
    x = photo(2, 16, 5, 5).cpu()
    assert torch.equal(other.eval()(x), reference.cpu()(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_autocast(name, backend):
    require(backend, BF16)
    reference, fused = both(name, FP32, backend)
    x = photo(2, 16, 7, 6, dtype=BF16)  # as behind an autocast stem
    results = []
    for block in (fused, reference):
        with torch.autocast(DEVICE, BF16):
            y = block(x)
        y.float().square().sum().backward()
        results.append((y, {n: p.grad for n, p in block.named_parameters()}))
    (y, grads), (expected, expected_grads) = results
    assert y.dtype == expected.dtype == BF16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.1)
    for key, grad in grads.items():
        assert grad.dtype == FP32
        close = (grad - expected_grads[key]).norm() <= 0.05 * expected_grads[key].norm() + 1e-3
        assert close, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: BasicBlock(16, 20), id="channels"),
        pytest.param(lambda: BasicBlock(16, 16, stride=2), id="stride"),
        pytest.param(lambda: BasicBlock(16, 1), id="broadcast in torch"),
        pytest.param(lambda: BasicBlock(16, 16, downsample=nn.AvgPool2d((5, 5))), id="pixel broadcast in torch"),
        pytest.param(lambda: ResidualBlock(16, 16, 1).requires_grad_(False), id="fits"),
    ],
)
def test_identity_of_another_shape(make, backend):
    """torch raises, or broadcasts; the fused block does the same and never reads what is not there."""
    require(backend)
    reference = make().eval().to(DEVICE)
    fused, x = frb.fuse(reference, backend=backend), photo(2, 16, 5, 5)
    with torch.no_grad():
        try:
            expected = reference(x)
        except RuntimeError:
            with pytest.raises((RuntimeError, ValueError)):
                fused(x)
        else:
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
