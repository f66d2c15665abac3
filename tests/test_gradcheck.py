"""First and second derivatives of the fused operations against finite differences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FP64, ConvCase, conv_bn_act_reference, image, make_norm, require
from test_gradients import flatten
from torch.autograd import gradcheck, gradgradcheck

from fused_resblock.functional import bn_act, conv_bn_act

SMALL = {"batch": 2, "channels": 4, "out_channels": 4, "size": (3, 3)}
CONVS = [
    pytest.param(ConvCase(**SMALL), id="3x3"),
    pytest.param(ConvCase(**SMALL, bias=True, residual=2, slack=1, stride=2), id="bias strided residual"),
    pytest.param(ConvCase(**SMALL, bias=True, shortcut=2), id="bias shortcut"),
    pytest.param(ConvCase(**SMALL, groups=2, dilation=2, padding=2, relu=False), id="2 groups dilation 2 no relu"),
    pytest.param(ConvCase(**SMALL, norm=None, bias=True, residual=1), id="bias residual no norm"),
    pytest.param(ConvCase(**SMALL, norm="eps0", kernel=(1, 1), padding=0, shortcut=1), id="1x1 shortcut eps 0"),
]
BACKENDS = [pytest.param(name, id=name) for name in ("triton", "eager")]


def as_function_of_leaves(function: Any, args: dict[str, Any], backend: str):
    """`function` of the tensors that take a gradient, and these tensors."""
    leaves = flatten(args)

    def replace(tree: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out = {}
        for key, value in tree.items():
            name = prefix + key
            if hasattr(value, "_asdict"):
                out[key] = type(value)(**replace(value._asdict(), new, name + "."))
            else:
                out[key] = new.get(name, value)
        return out

    def call(*tensors):
        new = dict(zip(leaves, tensors, strict=True))
        return function(**replace(args, new), backend=backend)

    return call, [leaf.requires_grad_() for leaf in leaves.values()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CONVS)
def test_conv_bn_act_first(case, backend):
    require(backend, FP64)
    call, leaves = as_function_of_leaves(conv_bn_act, case.build(FP64), backend)
    assert gradcheck(call, leaves, fast_mode=True, nondet_tol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_entry_of_the_jacobian(backend):
    """The other tests project the Jacobian on random vectors (`fast_mode`); this one takes it entry by entry."""
    require(backend, FP64)
    case = ConvCase(batch=1, channels=2, out_channels=2, size=(2, 3), kernel=(2, 1), padding=0, bias=True, residual=1)
    call, leaves = as_function_of_leaves(conv_bn_act, case.build(FP64), backend)
    assert gradcheck(call, leaves, nondet_tol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CONVS)
def test_conv_bn_act_second(case, backend):
    require(backend, FP64)
    call, leaves = as_function_of_leaves(conv_bn_act, case.build(FP64), backend)
    assert gradgradcheck(call, leaves, fast_mode=True, nondet_tol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [pytest.param(gradcheck, id="first"), pytest.param(gradgradcheck, id="second")])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="both norms"),
        pytest.param({"residual_norm": None, "relu": False}, id="plain residual no relu"),
        pytest.param({"norm": None}, id="no norm"),
    ],
)
def test_bn_act(options, order, backend):
    require(backend, FP64)
    args = {"x": image(2, 3, 4, 3, dtype=FP64), "norm": make_norm(3, dtype=FP64), "residual_stride": 2}
    args |= {"residual": image(2, 3, 7, 6, dtype=FP64), "residual_norm": make_norm(3, dtype=FP64), **options}
    call, leaves = as_function_of_leaves(bn_act, args, backend)
    assert order(call, leaves, fast_mode=True, nondet_tol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bn_act_entry_by_entry(backend):
    """The slow mode changes one entry of a parameter at a time, through `.data`."""
    require(backend, FP64)
    args = {"x": image(1, 4, 2, 3, dtype=FP64), "norm": make_norm(4, dtype=FP64)}
    args |= {"residual": image(1, 4, 2, 3, dtype=FP64), "residual_norm": make_norm(4, dtype=FP64)}
    call, leaves = as_function_of_leaves(bn_act, args, backend)
    assert torch.autograd.gradcheck(call, leaves, nondet_tol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty(backend):
    """The second derivative as it is used: the gradient of |dy/dx|^2 with respect to the weight."""
    require(backend, FP64)
    args = ConvCase(**SMALL, residual=1).build(FP64)
    results = []
    for function, options in ((conv_bn_act, {"backend": backend}), (conv_bn_act_reference, {})):
        x, weight = args["x"].requires_grad_(), args["weight"].requires_grad_()
        y = function(**args, **options)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), weight)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode(backend):
    require(backend, FP64)
    call, leaves = as_function_of_leaves(conv_bn_act, ConvCase(**SMALL, residual=1).build(FP64), backend)
    assert gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_over_reverse(backend):
    require(backend, FP64)
    call, leaves = as_function_of_leaves(conv_bn_act, ConvCase(**SMALL, residual=1).build(FP64), backend)
    forward_only = {"check_fwd_over_rev": True, "check_rev_over_rev": False, "check_undefined_grad": False}
    assert gradgradcheck(call, leaves, fast_mode=True, **forward_only)
