"""`torch.func` transforms of the fused operations and of a fused block: right values, never silent zeros."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BACKENDS, FP64, ConvCase, bn_act_reference, conv_bn_act_reference, image, make_norm, require
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import fused_resblock as frb
from fused_resblock.backends import eager
from fused_resblock.functional import bn_act, conv_bn_act

SMALL = ConvCase(batch=1, channels=2, out_channels=2, size=(3, 3), residual=1)


def both(backend, case=SMALL, dtype=FP64):
    """The fused operation and the reference as functions of x and weight, and their arguments."""
    args = case.build(dtype)
    x, weight = args.pop("x"), args.pop("weight")

    def fused(x, weight):
        return conv_bn_act(x, weight, **args, backend=backend)

    def reference(x, weight):
        return conv_bn_act_reference(x, weight, **args)

    return fused, reference, (x, weight)


def scalar(function):
    """The sum of squares of a function's result."""
    return lambda *args: function(*args).square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda f, a: grad(scalar(f), (0, 1))(*a), id="grad"),
        pytest.param(lambda f, a: vjp(f, *a)[1](torch.ones_like(f(*a))), id="vjp"),
        pytest.param(lambda f, a: jvp(f, a, tuple(torch.ones_like(t) for t in a)), id="jvp"),
        pytest.param(lambda f, a: jacrev(f, 0)(*a), id="jacrev"),
        pytest.param(lambda f, a: jacfwd(f, 1)(*a), id="jacfwd"),
        pytest.param(lambda f, a: grad(lambda *b: grad(scalar(f))(*b).square().sum(), 1)(*a), id="grad of grad"),
        pytest.param(lambda f, a: hessian(scalar(f))(*a), id="hessian"),
        pytest.param(
            lambda f, a: jvp(lambda x: grad(scalar(f))(x, a[1]), (a[0],), (torch.ones_like(a[0]),)), id="jvp of grad"
        ),
        pytest.param(
            lambda f, a: grad(lambda x: jvp(scalar(f), (x, a[1]), (torch.ones_like(x), a[1]))[1])(a[0]),
            id="grad of jvp",
        ),
        pytest.param(lambda f, a: vmap(f, (0, None))(torch.stack([a[0], 2 * a[0]]), a[1]), id="vmap over x"),
        pytest.param(lambda f, a: vmap(f, (None, 0))(a[0], torch.stack([a[1], -a[1]])), id="vmap over weight"),
        pytest.param(lambda f, a: vmap(f)(torch.stack([a[0], -a[0]]), torch.stack([a[1], -a[1]])), id="vmap over both"),
        pytest.param(
            lambda f, a: vmap(grad(scalar(f), 1), (0, None))(torch.stack([a[0], -a[0]]), a[1]),
            id="gradients per sample",
        ),
        pytest.param(
            lambda f, a: vmap(lambda t: jvp(lambda x: f(x, a[1]), (a[0],), (t,))[1])(torch.stack([a[0], -a[0]])),
            id="vmap of jvp",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_conv_bn_act(transform, backend):
    require(backend, FP64 if backend == "triton" else torch.float32)
    fused, reference, args = both(backend)
    torch.testing.assert_close(transform(fused, args), transform(reference, args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda f, x: grad(scalar(f))(x), id="grad"),
        pytest.param(lambda f, x: jvp(f, (x,), (x + 1,)), id="jvp"),
        pytest.param(lambda f, x: jvp(grad(scalar(f)), (x,), (x + 1,)), id="jvp of grad"),
        pytest.param(lambda f, x: vmap(f)(torch.stack([x, -x])), id="vmap"),
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_bn_act(transform, backend):
    require(backend, FP64 if backend == "triton" else torch.float32)
    norm = make_norm(3, dtype=FP64)
    x = image(2, 3, 4, 3, dtype=FP64)
    fused = transform(lambda x: bn_act(x, norm, residual=x, backend=backend), x)
    torch.testing.assert_close(fused, transform(lambda x: bn_act_reference(x, norm, residual=x), x))


@pytest.mark.parametrize("kind", ["affine", "gamma", "beta", "plain", "eps0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_norm_by_hand_is_torchs(kind, dtype):
    """What stands in for torch's in a function transform on a GPU."""
    norm, x = make_norm(5, kind, torch.promote_types(dtype, torch.float32)), image(2, 5, 4, 3, dtype=dtype)
    by_hand = eager._by_hand(x, norm)
    assert by_hand.dtype == dtype
    torch.testing.assert_close(by_hand, eager.normalize(x, norm))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dual_numbers_outside_of_a_transform(backend):
    require(backend, FP64 if backend == "triton" else torch.float32)
    fused, reference, (x, weight) = both(backend)
    with torch.autograd.forward_ad.dual_level():
        x, weight = (torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in (x, weight))
        ours, theirs = (torch.autograd.forward_ad.unpack_dual(f(x, weight)) for f in (fused, reference))
    torch.testing.assert_close(ours.tangent, theirs.tangent)
    torch.testing.assert_close(ours.primal, theirs.primal)


@pytest.fixture
def pair_of_blocks():
    """A reference block and its fused copy, in eval mode."""
    reference = frb.models.randomize_norms(frb.reference.Bottleneck(8, 2)).eval().to(FP64)
    return reference, frb.fuse(copy.deepcopy(reference), backend="triton")


def test_functional_call_uses_the_given_parameters(pair_of_blocks):
    reference, fused = pair_of_blocks
    state = {name: torch.randn_like(p) for name, p in reference.named_parameters()}
    x = image(1, 8, 3, 3, dtype=FP64).cpu()
    torch.testing.assert_close(functional_call(fused, state, x), functional_call(reference, state, x))
    torch.testing.assert_close(fused(x), reference(x))

    def loss(block):
        return lambda state: functional_call(block, state, x).square().sum()

    torch.testing.assert_close(grad(loss(fused))(state), grad(loss(reference))(state))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_ensemble_by_vmap(pair_of_blocks):
    reference, fused = pair_of_blocks
    members = [copy.deepcopy(reference) for _ in range(2)]
    for seed, member in enumerate(members):
        frb.models.randomize_norms(member, seed)
    state = stack_module_state(members)
    x = image(1, 8, 3, 3, dtype=FP64).cpu()
    ours, theirs = (
        vmap(lambda p, b, x, m=m: functional_call(m, (p, b), x), (0, 0, None))(*state, x) for m in (fused, reference)
    )
    torch.testing.assert_close(ours, theirs)


def test_jvp_of_a_block(pair_of_blocks):
    reference, fused = pair_of_blocks
    x = image(1, 8, 3, 3, dtype=FP64).cpu()
    torch.testing.assert_close(jvp(fused, (x,), (x + 1,)), jvp(reference, (x,), (x + 1,)))
    torch.testing.assert_close(hessian(scalar(fused))(x[:, :, :1, :1]), hessian(scalar(reference))(x[:, :, :1, :1]))
