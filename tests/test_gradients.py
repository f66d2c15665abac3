"""Gradients of the fused operations: every input and parameter against autograd of the same thing in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    BF16,
    FP32,
    FP64,
    ConvCase,
    bn_act_reference,
    cast,
    conv_bn_act_reference,
    floor,
    image,
    make_norm,
    require,
    slack_of,
)
from parity import assert_parity
from torch import Tensor

from fused_resblock.functional import bn_act, conv_bn_act

CONVS = [
    pytest.param(ConvCase(), id="3x3"),
    pytest.param(ConvCase(kernel=(1, 1), padding=0), id="1x1"),
    pytest.param(ConvCase(norm=None, bias=True, relu=False), id="bias alone"),
    pytest.param(ConvCase(norm=None, bias=True), id="bias relu"),
    pytest.param(ConvCase(bias=True), id="bias norm relu"),
    pytest.param(ConvCase(norm="plain", bias=True), id="norm without gamma and beta"),
    pytest.param(ConvCase(norm="gamma", bias=True, relu=False), id="norm without beta"),
    pytest.param(ConvCase(norm="beta"), id="norm without gamma"),
    pytest.param(ConvCase(norm="eps0"), id="eps 0"),
    pytest.param(ConvCase(stride=2, residual=1), id="stride 2 residual"),
    pytest.param(ConvCase(residual=2), id="residual stride 2 even size"),
    pytest.param(ConvCase(residual=3, slack=2, relu=False), id="residual stride 3 odd size no relu"),
    pytest.param(ConvCase(shortcut=1, bias=True), id="shortcut bias"),
    pytest.param(ConvCase(shortcut=2, slack=1, stride=2), id="shortcut stride 2 odd size"),
    pytest.param(ConvCase(shortcut=2, norm=None, bias=True), id="shortcut no norm"),
    pytest.param(ConvCase(groups=4, stride=2, residual=1), id="4 groups"),
    pytest.param(ConvCase(channels=6, out_channels=6, groups=6, dilation=2, padding=2), id="depthwise dilation 2"),
    pytest.param(ConvCase(kernel=(2, 3), padding=(0, 2), stride=(2, 1), dilation=(1, 2)), id="2x3 uneven"),
    pytest.param(ConvCase(size=(1, 1), batch=1, residual=1), id="one pixel"),
]


def bn_args(dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """Arguments of `bn_act` with everything in it."""
    wide = torch.promote_types(dtype, FP32)
    args = {"x": image(2, 6, 5, 4, dtype=dtype), "norm": make_norm(6, dtype=wide), "residual_stride": 2}
    args |= {"residual": image(2, 6, 10, 7, dtype=dtype), "residual_norm": make_norm(6, dtype=wide), **options}
    if args["residual"] is None:
        del args["residual_norm"], args["residual_stride"]
    return args


def flatten(args: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor that takes a gradient, by name."""
    found = {}
    for key, value in args.items():
        if isinstance(value, Tensor):
            found[key] = value
        elif hasattr(value, "_asdict"):
            inner = {k: v for k, v in value._asdict().items() if k not in ("mean", "var")}
            found |= {f"{key}.{k}": v for k, v in flatten(inner).items()}
    return found


def gradients(function: Callable, args: dict[str, Any], dtype: torch.dtype | None = None, **options: Any) -> dict:
    """The result and, by name, every input's gradient for one fixed upstream gradient; `dtype` casts everything first."""
    args = cast(args, dtype) if dtype else dict(args)
    leaves = flatten(args)
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = function(**args, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream)
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def check(fused: Callable, reference: Callable, args: dict[str, Any], backend: str) -> None:
    """Parity of the result and of every gradient."""
    dtype = args["x"].dtype
    ours, torchs = gradients(fused, args, backend=backend), gradients(reference, args)
    exact = gradients(reference, args, FP64)
    assert ours.keys() == exact.keys()
    for name, grad in ours.items():
        slack = slack_of(backend, dtype)
        if dtype == BF16 and name.endswith("weight"):
            # rounded as the convolution's gradient and again behind the scale: twice at worst, no worse on average
            assert rms(grad, exact[name]) <= 2 * rms(torchs[name], exact[name]), name
            slack = 4.0
        assert_parity(grad, torchs[name], exact[name], what=name, floor=floor(dtype) * 4, slack=slack)


def rms(actual: Tensor, exact: Tensor) -> Tensor:
    """Root mean square error."""
    return (actual.double() - exact).square().mean().sqrt()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CONVS)
def test_conv_bn_act_in_float64(case, backend):
    """Against float64 with no allowance for rounding: the formulas are exact. `onednn` hands float64 to `eager`."""
    if backend == "onednn":
        pytest.skip("oneDNN has no float64")
    require(backend, FP64)
    check(conv_bn_act, conv_bn_act_reference, case.build(FP64), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CONVS)
def test_conv_bn_act_in_float32(case, backend):
    require(backend)
    check(conv_bn_act, conv_bn_act_reference, case.build(FP32), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_dtype", [pytest.param(FP32, id="fp32 norm"), pytest.param(BF16, id="bf16 norm")])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ConvCase(batch=4, relu=False), id="3x3"),
        pytest.param(ConvCase(batch=4, relu=False, bias=True, residual=2), id="bias residual"),
        pytest.param(ConvCase(batch=4, relu=False, shortcut=2), id="shortcut"),
        pytest.param(ConvCase(batch=4, relu=False, groups=2), id="grouped"),
    ],
)
def test_conv_bn_act_in_bfloat16(case, norm_dtype, backend):
    """Without a ReLU, whose mask turns one rounding of y into a whole gradient."""
    require(backend, BF16)
    check(conv_bn_act, conv_bn_act_reference, case.build(BF16, norm_dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (BF16, FP32, FP64)])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="both norms"),
        pytest.param({"relu": False}, id="no relu"),
        pytest.param({"residual_norm": None}, id="plain residual"),
        pytest.param({"norm": None}, id="no norm"),
        pytest.param({"residual": None}, id="no residual"),
        pytest.param({"residual_stride": 1, "residual": "same size"}, id="residual stride 1"),
    ],
)
def test_bn_act(options, dtype, backend):
    require(backend, dtype)
    args = bn_args(dtype, **options)
    if options.get("residual") == "same size":
        args["residual"] = image(2, 6, 5, 4, dtype=dtype)
    if dtype == BF16:
        args["relu"] = False
    check(bn_act, bn_act_reference, args, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "norm.weight", "norm.bias", "residual"])
def test_one_gradient_alone(wanted, backend):
    require(backend)
    args = ConvCase(bias=True, residual=2, stride=2).build(FP32)
    expected = gradients(conv_bn_act_reference, args)[wanted]
    leaf = flatten(args)[wanted].requires_grad_()
    y = conv_bn_act(**args, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    y.backward(upstream)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wanted", ["shortcut.x", "shortcut.weight", "shortcut.bias", "shortcut.norm.weight", "shortcut.norm.bias"]
)
def test_one_gradient_of_the_shortcut_alone(wanted, backend):
    require(backend)
    args = ConvCase(bias=True, shortcut=2).build(FP32)
    expected = {}
    second = args["shortcut"]
    for reference in (True, False):
        leaves = {"shortcut." + k: v for k, v in flatten(second._asdict()).items()}
        leaf = leaves[wanted].requires_grad_()
        y = conv_bn_act_reference(**args) if reference else conv_bn_act(**args, backend=backend)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
        (expected[reference],) = torch.autograd.grad(y, leaf, upstream)
    torch.testing.assert_close(expected[False], expected[True], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", ["expanded", "NCHW", "channel slice"])
def test_upstream_gradient_of_any_layout(upstream, backend):
    require(backend)
    args = ConvCase(residual=1).build(FP32)
    dy = {
        "expanded": lambda: torch.ones(1, 1, 1, 1).expand(2, 12, 7, 5),
        "NCHW": lambda: torch.randn(2, 12, 7, 5),
        "channel slice": lambda: torch.randn(2, 30, 7, 5)[:, 7:19],
    }[upstream]().to(args["x"].device)
    x = args["x"].requires_grad_()
    (ours,) = torch.autograd.grad(conv_bn_act(**args, backend=backend), x, dy)
    (torchs,) = torch.autograd.grad(conv_bn_act_reference(**args), x, dy)
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("joined", [{"residual": 2}, {"shortcut": 2}], ids=["residual", "shortcut"])
def test_empty_batch(joined, backend):
    args = ConvCase(batch=0, bias=True, **joined).build(FP32)
    for name, grad in gradients(conv_bn_act, args, backend=backend).items():
        leaf = flatten(args).get(name)
        assert leaf is None or grad.shape == leaf.shape
        assert not grad.any(), f"{name} must be 0 or empty"


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_in_several_places(backend):
    """x is also the residual, and the weight is that of the shortcut as well: gradients add up."""
    require(backend)
    args = ConvCase(channels=6, out_channels=6, residual=1).build(FP32)
    x = args["x"].requires_grad_()
    args["residual"] = x
    (ours,) = torch.autograd.grad(conv_bn_act(**args, backend=backend).square().sum(), x)
    (torchs,) = torch.autograd.grad(conv_bn_act_reference(**args).square().sum(), x)
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_upstream_reaches_what_it_reaches_in_torch(backend):
    require(backend)
    args = ConvCase(kernel=(1, 1), padding=0, residual=1).build(FP32)
    x = args["x"].requires_grad_()
    dy = torch.ones(2, 12, 7, 5, device=x.device)
    dy[0, :, 2, 2] = float("nan")
    (ours,) = torch.autograd.grad(conv_bn_act(**args, backend=backend), x, dy)
    (torchs,) = torch.autograd.grad(conv_bn_act_reference(**args), x, dy)
    assert torch.equal(ours.isnan(), torchs.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_repeats_bit_for_bit(backend):
    require(backend)
    args = ConvCase(bias=True, shortcut=2).build(FP32)
    first, second = (gradients(conv_bn_act, args, backend=backend) for _ in range(2))
    for name, grad in first.items():
        assert torch.equal(grad, second[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dilated_groups_of_one_image(dtype):
    """In 16 bits, channels_last, torch reads unwritten memory for the weight's gradient."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator).to(dtype) for size in ((1, 16, 40, 40), (16, 1, 3, 3)))
    x, weight = x.contiguous(memory_format=torch.channels_last).requires_grad_(), weight.requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    F.conv2d(*exact, None, 1, 2, 2, 16).square().mean().backward()
    conv_bn_act(x, weight, padding=2, dilation=2, groups=16, relu=False).square().mean().backward()
    for ours, theirs in zip((x, weight), exact, strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 0.02 * theirs.grad.abs().max()
