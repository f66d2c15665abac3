"""The `torch.library` ops: schema, fake and gradient registrations, exact strides, fake tensors, autocast."""

from __future__ import annotations

import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    DEVICE,
    FP32,
    ConvCase,
    bn_act_reference,
    conv_bn_act_reference,
    image,
    make_norm,
    require,
)
from test_gradients import flatten
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fused_resblock import ops
from fused_resblock.functional import bn_act, conv_bn_act
from fused_resblock.params import pair

OPS = torch.ops.fused_resblock


def flat_conv(case: ConvCase, backend: str = "auto", grad: bool = True, dtype: torch.dtype = FP32) -> tuple:
    """The op's flat arguments for a case."""
    args = case.build(dtype)
    for leaf in flatten(args).values():
        leaf.requires_grad_(grad)
    second = args.get("shortcut")
    return (
        args["x"],
        args["weight"],
        args["bias"],
        *ops._flat(args["norm"]),
        *(pair(args[key]) for key in ("stride", "padding", "dilation")),
        args["groups"],
        args.get("residual"),
        args.get("residual_stride", 1),
        *((None, None, None) if second is None else second[:3]),
        *ops._flat(None if second is None else second.norm),
        1 if second is None else second.stride,
        args["relu"],
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "grad"),
    [
        pytest.param(ConvCase(norm=None, relu=False), True, id="conv"),
        pytest.param(ConvCase(stride=2, bias=True, residual=2, slack=1), True, id="everything with a residual"),
        pytest.param(ConvCase(stride=(2, 1), dilation=2, shortcut=2, bias=True), True, id="everything with a shortcut"),
        pytest.param(ConvCase(groups=4, norm="plain"), True, id="grouped, no gamma and beta"),
        pytest.param(ConvCase(residual=1), False, id="no gradient"),
        pytest.param(ConvCase(size=(1, 1), channels=1, batch=1), True, id="one number"),
        pytest.param(ConvCase(batch=0, residual=1), True, id="empty batch"),
    ],
)
def test_opcheck_conv_bn_act(case, grad, backend):
    require(backend)
    opcheck(OPS.conv_bn_act.default, flat_conv(case, backend, grad))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("norm", "residual", "relu"),
    [
        pytest.param(True, 2, True, id="everything"),
        pytest.param(False, None, False, id="nothing"),
        pytest.param(False, 1, True, id="residual relu"),
    ],
)
def test_opcheck_bn_act(norm, residual, relu, backend):
    require(backend)
    x = image(2, 4, 5, 3).requires_grad_()
    first = ops._flat(make_norm(4) if norm else None)
    other = None if residual is None else image(2, 4, 5 * residual, 3 * residual).requires_grad_()
    second = ops._flat(make_norm(4) if norm and residual else None)
    opcheck(OPS.bn_act.default, (x, *first, other, *second, residual or 1, relu, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_relu", [pytest.param(True, id="relu"), pytest.param(False, id="no relu")])
def test_opcheck_relu_backward(with_relu, backend):
    require(backend)
    y = image(2, 4, 5, 3).relu() if with_relu else None
    opcheck(OPS.relu_backward.default, (image(2, 4, 5, 3).requires_grad_(), y, backend))


SIZES = [
    pytest.param((2, 3, 5, 4), id="plain"),
    pytest.param((1, 3, 5, 4), id="batch 1"),
    pytest.param((2, 1, 5, 4), id="1 channel"),
    pytest.param((2, 3, 1, 1), id="1x1 image"),
    pytest.param((2, 1, 1, 1), id="1 channel, 1x1 image"),
    pytest.param((1, 1, 1, 1), id="one number"),
    pytest.param((2, 3, 1, 4), id="one row"),
    pytest.param((2, 3, 5, 1), id="one column"),
    pytest.param((0, 3, 5, 4), id="empty batch"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nchw", [pytest.param(False, id="channels_last"), pytest.param(True, id="NCHW")])
@pytest.mark.parametrize("size", SIZES)
def test_fake_strides_are_the_real_ones(size, nchw, backend):
    require(backend)
    n, c, h, w = size
    for out_channels in (1, 5):
        x, weight = image(*size), image(out_channels, c, 3, 3)
        x = x.contiguous() if nchw else x
        dy = image(n, out_channels, h, w).contiguous()
        with FakeTensorMode() as mode:
            fake_x, fake_weight, fake_dy = (mode.from_tensor(t) for t in (x, weight, dy))
            fakes = [
                conv_bn_act(fake_x, fake_weight, padding=1, backend=backend),
                bn_act(fake_x, backend=backend),
                bn_act(fake_x, relu=False, backend=backend),
                *OPS.relu_backward(fake_dy, fake_dy, backend),
                *OPS.relu_backward(fake_dy, None, backend),
            ]
        x.requires_grad_()  # through the op, not straight to the backend
        reals = [
            conv_bn_act(x, weight, padding=1, backend=backend),
            bn_act(x, backend=backend),
            bn_act(x, relu=False, backend=backend),
            *OPS.relu_backward(dy, dy, backend),
            *OPS.relu_backward(dy, None, backend),
        ]
        for fake, real in zip(fakes, reals, strict=True):
            assert fake.shape == real.shape
            assert fake.stride() == real.stride()
            assert fake.dtype == real.dtype
            assert fake.device == real.device


def test_fake_knows_every_geometry():
    for case in (
        ConvCase(stride=(2, 1), padding=(0, 2), dilation=(1, 3), kernel=(2, 3)),
        ConvCase(kernel=(1, 1), padding=0, stride=2, residual=3, slack=1),
        ConvCase(groups=4, shortcut=2),
    ):
        real = flat_conv(case, "eager", grad=False)
        with FakeTensorMode() as mode:
            fake = OPS.conv_bn_act(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in real))
        y = OPS.conv_bn_act(*real)
        assert (fake.shape, fake.stride()) == (y.shape, y.stride())


@pytest.mark.parametrize("function", ["conv_bn_act", "bn_act"])
def test_meta_tensors(function):
    if function == "conv_bn_act":
        y = conv_bn_act(torch.empty(2, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta"), stride=2)
        assert y.shape == (2, 4, 3, 3)
    else:
        y = bn_act(torch.empty(2, 3, 8, 8, device="meta"))
        assert y.shape == (2, 3, 8, 8)
    assert y.device.type == "meta"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("joined", [{"residual": 2}, {"shortcut": 2}], ids=["residual", "shortcut"])
def test_autocast_forward_and_backward(joined, backend):
    """Under autocast to bf16, fp32 arguments give what bf16 ones give with fp32 norms, and fp32 gradients."""
    require(backend, BF16)
    args = ConvCase(batch=4, **joined).build(FP32)
    leaves = flatten(args)
    for leaf in leaves.values():
        leaf.requires_grad_()
    with torch.autocast(DEVICE, BF16):
        y = conv_bn_act(**args, backend=backend)
        expected = conv_bn_act_reference(**args)
        with torch.no_grad():
            assert torch.equal(y, conv_bn_act(**args, backend=backend)), "the op and the direct call differ"
    assert y.dtype == BF16
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.05)
    upstream = torch.randn_like(y).where(y > 0.1, 0)
    ours = torch.autograd.grad(y, list(leaves.values()), upstream)
    torchs = torch.autograd.grad(expected, list(leaves.values()), upstream.to(expected.dtype))
    for name, mine, torchs_own in zip(leaves, ours, torchs, strict=True):
        assert mine.dtype == FP32
        scale = torchs_own.abs().max().item()
        torch.testing.assert_close(mine, torchs_own, rtol=0.05, atol=0.02 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_bn_act_in_its_dtype(backend):
    require(backend)
    x, norm = image(2, 4, 3, 3), make_norm(4)
    with torch.autocast(DEVICE, BF16):
        y = bn_act(x, norm, residual=x.to(BF16), backend=backend)
    torch.testing.assert_close(y, bn_act_reference(x, norm, residual=x.to(BF16).float()))


def test_autocast_leaves_float64_alone():
    args = ConvCase(residual=1).build(torch.float64)
    with torch.autocast(DEVICE, BF16):
        expected = conv_bn_act_reference(**args)
        y = conv_bn_act(**args)
    assert expected.dtype == torch.float64, "torch's autocast takes no float64"
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_subclass_of_tensor(backend):
    require(backend)

    class Photo(torch.Tensor):
        pass

    args = ConvCase(residual=1).build(FP32)
    expected = conv_bn_act(**args, backend=backend)
    y = conv_bn_act(**dict(args, x=args["x"].as_subclass(Photo)), backend=backend)
    assert torch.equal(y.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", ["conv_bn_act", "bn_act"])
def test_result_may_be_changed_in_place(function, backend):
    """Where a gradient is wanted, too: the result is a tensor of its own, not a view."""
    require(backend)
    grads = []
    for ours in (True, False):
        torch.manual_seed(2)
        args = ConvCase(relu=False).build(FP32)
        x = args["x"].requires_grad_()
        if function == "conv_bn_act":
            y = conv_bn_act(**args, backend=backend) if ours else conv_bn_act_reference(**args)
        else:
            norm = make_norm(8)
            y = bn_act(x, norm, relu=False, backend=backend) if ours else bn_act_reference(x, norm, relu=False)
        y.mul_(2).relu_()
        y.sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_bn_act_without_norms_keeps_no_activation_that_its_gradient_does_not_read(residual):
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    other = torch.randn(2, 4, 3, 3, requires_grad=True) if residual else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = bn_act(x, residual=other)
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]
    y.sum().backward()
    assert torch.equal(x.grad, (y > 0).float())
    assert other is None or torch.equal(other.grad, x.grad)
