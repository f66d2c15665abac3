"""What users do to a fused model's weights and layers, and how they differentiate it: always as the original does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

import fused_resblock as frb
from fused_resblock.watch import Guard

X = torch.randn(2, 8, 8, 8)


def small() -> nn.Sequential:
    """Two blocks of which the first one has a downsample branch."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    blocks = frb.reference.BasicBlock(8, 16, 2, down), frb.reference.BasicBlock(16, 16)
    return nn.Sequential(*blocks).eval().to(memory_format=torch.channels_last)


def agree(model: nn.Module, fused: nn.Module, x: Tensor = X) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def pair(**options) -> tuple[nn.Module, nn.Module]:
    model = small()
    fused = frb.fuse(model, **options)
    agree(model, fused)
    return model, fused


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("0.conv1", "weight"),
        ("0.downsample.0", "weight"),
        ("1.bn2", "bias"),
        ("1.bn1", "running_mean"),
        ("0.bn1", "running_var"),
    ],
)
def test_a_weight_that_is_a_plain_attribute_and_is_assigned_again(layer, name):
    """As hypernetworks and hand-written fast weights do it."""
    model, fused = pair()
    for factor in (1.0, 2.0, 3.0):
        for network in (model, fused):
            module = network.get_submodule(layer)
            before = getattr(module, name).detach().clone()
            if name in module._parameters or name in module._buffers:
                delattr(module, name)
            setattr(module, name, before * factor + 0.1)
        agree(model, fused)


@pytest.mark.parametrize("layer", ["conv1", "bn1"])
def test_likewise_in_a_stem(layer):
    model = frb.models.ResNet(frb.reference.BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    fused, x = frb.fuse(model), torch.randn(1, 3, 32, 32)
    for factor in (1.0, 2.0, 3.0):
        for network in (model, fused):
            module = network.get_submodule(layer)
            before = module.weight.detach().clone()
            if "weight" in module._parameters:
                del module.weight
            module.weight = before * factor
        agree(model, fused, x)


def test_channels_pruned_in_place_after_a_call():
    model, fused = pair()
    for network in (model, fused):
        for conv in (network[0].conv1, network[0].downsample[0]):
            conv.weight = nn.Parameter(conv.weight[:, :4].detach().clone())
            conv.in_channels = 4
    agree(model, fused, X[:, :4])
    torch.testing.assert_close(fused(X[:, :4]), model(X[:, :4]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="^x must have 4 channels"):
        fused(X)


@pytest.mark.parametrize(("name", "value"), [("padding", (1,)), ("stride", (1,))])
def test_a_setting_in_a_tuple_of_one(name, value):
    model, fused = pair()
    for network in (model, fused):
        setattr(network[1].conv1, name, value)
    agree(model, fused)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_batched_gradients_through_a_strided_branch(backend):
    model, fused = pair(backend=backend)
    model.requires_grad_(False)
    fused.requires_grad_(False)

    def jacobian(network: nn.Module) -> Tensor:
        return torch.autograd.functional.jacobian(lambda x: network(x).mean((2, 3)), X[:1], vectorize=True)

    torch.testing.assert_close(jacobian(fused), jacobian(model), rtol=1e-4, atol=1e-6)


def test_a_tangent_of_the_gradient_that_comes_in():
    tangents = []
    for network in pair():
        x = X.clone().requires_grad_()
        y = network.requires_grad_(False)(x)
        with forward_ad.dual_level():
            (grad,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))
            tangents.append(forward_ad.unpack_dual(grad).tangent)
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-4, atol=1e-5)


def test_compiled_whole_with_a_backend_asked_for():
    model, fused = pair(backend="onednn")
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    agree(model, compiled)


class Scaled(Tensor):
    """A weight that knows torch's operations alone, as quantized ones do."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Scaled(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace != "aten":
            raise NotImplementedError(function)
        plain = tree_map(lambda t: t.inner if isinstance(t, Scaled) else t, (args, kwargs or {}))
        result = function(*plain[0], **plain[1])
        return Scaled(result) if function is torch.ops.aten.detach.default else result


def test_weights_that_become_tensors_of_another_class():
    model, fused = pair()
    for network in (model, fused):
        conv = network[1].conv1
        conv.weight = nn.Parameter(Scaled(conv.weight.detach()), requires_grad=False)
    agree(model, fused)
    torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-5)
    assert "weights of a tensor subclass" in str(frb.explain(fused))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_none_is_no_image(grad, frozen):
    fused = frb.fuse(small(), frozen=frozen)
    for network in (fused, fused[0]):
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="^x must be a tensor, got NoneType"):
            network(None)


def test_a_guard_of_a_layer_that_has_nothing_to_watch():
    assert Guard([nn.ReLU()], [], True).holds() is True
