"""Blocks with something inside that runs only when modules are called, or that no backend computes: kept, and why."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused_resblock as frb
from fused_resblock.models import randomize_norms
from fused_resblock.reference import Bottleneck, ResidualBlock


class OwnConv(nn.Conv2d):
    """Weight-standardised convolution: a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class OwnConvForward(nn.Conv2d):
    """A convolution that changes torch's inner method."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class ScaledWeight(nn.Conv2d):
    """Equalised learning rate: the weight that a caller reads is not the parameter."""

    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"] * 3

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.register_parameter("weight", value)


class MereSubclass(nn.Conv2d):
    """Computes what its base does."""


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def replaced(name: str, make):
    """A spoiler that puts another module in the place of one."""

    def spoil(block: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, make())

    return spoil


def same_conv(cls: type[nn.Conv2d], **kwargs):
    """A maker of a convolution like Bottleneck's second."""
    return lambda: cls(2, 2, 3, bias=False, **{"padding": 1, **kwargs})


def hook(register: str, name: str = "conv2"):
    """A spoiler that registers a hook which changes something."""

    def spoil(block: nn.Module) -> None:
        module = block.get_submodule(name)
        if register == "register_forward_pre_hook":
            module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        elif register == "register_forward_hook":
            module.register_forward_hook(lambda m, args, y: y * 2)
        elif register == "register_full_backward_pre_hook":
            module.register_full_backward_pre_hook(lambda m, dy: (dy[0] * 2,))
        else:
            module.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 2,))

    return spoil


def override_forward(block: nn.Module) -> None:
    original = block.conv2.forward
    block.conv2.forward = lambda x: original(x) * 2


def override_own_forward(block: nn.Module) -> None:
    original = block.forward
    block.forward = lambda x: original(x) * 2


SPOILED = [
    pytest.param(hook("register_forward_pre_hook"), "hooks on conv2", id="forward pre-hook"),
    pytest.param(hook("register_forward_hook"), "hooks on conv2", id="forward hook"),
    pytest.param(hook("register_forward_hook", "relu"), "hooks on relu", id="forward hook on the ReLU"),
    pytest.param(hook("register_full_backward_pre_hook"), "hooks on conv2", id="backward pre-hook"),
    pytest.param(hook("register_full_backward_hook"), "hooks on conv2", id="backward hook"),
    pytest.param(override_forward, "forward of conv2", id="inner forward overridden"),
    pytest.param(override_own_forward, "overridden on the instance", id="own forward overridden"),
    pytest.param(lambda b: parametrizations.weight_norm(b.conv2), "parametrization on conv2", id="weight_norm"),
    pytest.param(lambda b: parametrizations.spectral_norm(b.conv2), "parametrization", id="spectral_norm"),
    pytest.param(
        lambda b: parametrize.register_parametrization(b.conv2, "weight", Doubled()),
        "parametrization",
        id="parametrization",
    ),
    pytest.param(
        lambda b: parametrize.register_parametrization(b.bn2, "bias", Doubled()),
        "parametrization on bn2",
        id="of a norm",
    ),
    pytest.param(lambda b: torch.nn.utils.weight_norm(b.conv2), "hooks on conv2", id="old weight_norm"),
    pytest.param(lambda b: torch.nn.utils.spectral_norm(b.conv2), "hooks on conv2", id="old spectral_norm"),
    pytest.param(lambda b: prune.random_unstructured(b.conv2, "weight", 0.5), "hooks on conv2", id="pruned"),
    pytest.param(replaced("bn2", lambda: nn.GroupNorm(1, 2)), "GroupNorm", id="GroupNorm"),
    pytest.param(replaced("bn2", lambda: nn.InstanceNorm2d(2)), "InstanceNorm2d", id="InstanceNorm"),
    pytest.param(replaced("bn2", lambda: OwnNorm(2)), "OwnNorm", id="norm with a forward of its own"),
    pytest.param(
        replaced("bn2", lambda: nn.BatchNorm2d(2, track_running_stats=False)), "running statistics", id="no statistics"
    ),
    pytest.param(replaced("relu", nn.SiLU), "SiLU", id="SiLU"),
    pytest.param(replaced("relu", nn.ReLU6), "ReLU6", id="ReLU6"),
    pytest.param(replaced("relu", lambda: nn.LeakyReLU(0.1)), "LeakyReLU", id="LeakyReLU"),
    pytest.param(
        replaced("conv2", same_conv(nn.Conv2d, padding_mode="reflect")), "padding mode 'reflect'", id="reflect"
    ),
    pytest.param(replaced("conv2", same_conv(nn.Conv2d, padding_mode="circular")), "padding mode", id="circular"),
    pytest.param(replaced("conv2", lambda: nn.Conv2d(2, 2, 2, padding="same")), "uneven", id="uneven same padding"),
    pytest.param(replaced("conv2", same_conv(OwnConv)), "OwnConv is not nn.Conv2d", id="conv with its own forward"),
    pytest.param(
        replaced("conv2", same_conv(OwnConvForward)), "OwnConvForward is not", id="conv with its own inner forward"
    ),
    pytest.param(replaced("conv2", lambda: nn.ConvTranspose2d(2, 2, 3, padding=1)), "ConvTranspose2d", id="transposed"),
    pytest.param(
        replaced("conv2", lambda: torch.jit.script(nn.Conv2d(2, 2, 3, padding=1))),
        "ScriptModule|not a conv",
        id="script",
    ),
    pytest.param(
        replaced("conv2", lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Sigmoid())), "Sigmoid", id="Sigmoid"
    ),
    pytest.param(
        replaced("conv2", lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.PReLU())), "PReLU", id="PReLU"
    ),
]


def observe(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients; random parts repeat."""
    torch.manual_seed(5)
    leaf = x.clone().requires_grad_()
    y = block(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in block.parameters())]


@pytest.mark.filterwarnings("ignore:.*(weight_norm|torch.jit).*", "ignore:Using padding='same'")
@pytest.mark.parametrize(("spoil", "reason"), SPOILED)
def test_kept(spoil, reason):
    blocks = []
    for _ in range(2):  # made twice: not every one of them can be copied
        torch.manual_seed(0)
        blocks.append(randomize_norms(Bottleneck(8, 2)).eval())
        spoil(blocks[-1])
    block, other = blocks
    fused = frb.fuse(other, inplace=True)
    (report,) = frb.explain(fused)
    assert not report.fused
    assert report.cls == "Bottleneck"
    assert re.search(reason, report.reason), report.reason
    x = torch.randn(2, 8, 5, 5)
    for ours, theirs in zip(observe(fused, x), observe(block, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_subclass_without_a_forward_of_its_own_is_fused():
    block = Bottleneck(8, 2).eval()
    block.conv2 = MereSubclass(2, 2, 3, padding=1)
    assert frb.explain(frb.fuse(block, strict=True))[0].fused


def test_weight_that_is_a_property():
    block = randomize_norms(Bottleneck(8, 2)).eval()
    scaled = ScaledWeight.__new__(ScaledWeight)
    vars(scaled).update(vars(block.conv2))
    block.conv2 = scaled
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(frb.fuse(block)(x), block(x), rtol=1e-4, atol=1e-5)


def test_hooks_that_do_not_run_in_forward_do_not_matter():
    block = Bottleneck(8, 2).eval()
    block.conv2.register_state_dict_pre_hook(lambda *args: None)
    block.conv2.weight.register_hook(lambda grad: grad * 3)
    fused = frb.fuse(block, strict=True, inplace=True)
    x = torch.randn(2, 8, 5, 5)
    fused(x).sum().backward()
    reference = frb.unfuse(copy.deepcopy(block))
    reference.zero_grad()
    reference(x).sum().backward()
    torch.testing.assert_close(fused.conv2.weight.grad, reference.conv2.weight.grad * 3, rtol=1e-4, atol=1e-5)


def test_blocks_of_other_dimensions_are_left_alone():
    class Block(nn.Module):
        def __init__(self, conv: type, norm: type) -> None:
            super().__init__()
            self.conv1, self.bn1, self.conv2 = conv(4, 4, 1), norm(4), conv(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv2(self.bn1(self.conv1(x))) + x)

    for dims, conv, norm in ((1, nn.Conv1d, nn.BatchNorm1d), (3, nn.Conv3d, nn.BatchNorm3d)):
        block = Block(conv, norm).eval()
        fused = frb.fuse(block)
        assert type(fused) is Block
        assert not any(r.fused for r in frb.explain(fused))
        x = torch.randn(2, 4, *[3] * dims)
        assert torch.equal(fused(x), block(x))


def test_whole_script_module_is_left_alone():
    with pytest.warns((DeprecationWarning, FutureWarning)):
        scripted = torch.jit.script(ResidualBlock(4, 4).eval())
    fused = frb.fuse(scripted, inplace=True)
    assert isinstance(fused, torch.jit.ScriptModule)
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(fused(x), scripted(x))


def test_block_inside_of_a_compiled_module_is_found():
    model = torch.compile(nn.Sequential(ResidualBlock(4, 4)).eval(), backend="eager")
    fused = frb.fuse(model)
    assert [r.fused for r in frb.explain(fused)] == [True]
    x = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["dropout", "block"])
def test_dropout_that_is_active_alone(which):
    """Monte-Carlo dropout: the model is in eval mode but for its dropout layers."""
    block = randomize_norms(zoo.WithDropout()).eval()
    fused = frb.fuse(block)
    x = torch.randn(2, 8, 5, 5)
    outputs = []
    for module in (block, fused):
        (module.dropout if which == "dropout" else module).train()
        if which == "block":
            module.bn1.eval(), module.bn2.eval()
        torch.manual_seed(1)
        outputs.append(module(x))
    torch.testing.assert_close(*outputs)


def test_drop_path_that_is_active_alone():
    drop = pytest.importorskip("timm.layers").DropPath(0.5)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.drop_path = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), drop

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(self.conv2(torch.relu(self.conv1(x))))

    block = Block().eval()
    fused = frb.fuse(block, strict=True)
    x = torch.randn(8, 4, 3, 3)
    for mode in (lambda m: m.eval(), lambda m: m.train(), lambda m: m.eval().drop_path.train()):
        outputs = []
        for module in (block, fused):
            mode(module)
            torch.manual_seed(1)
            outputs.append(module(x))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_child_wrapped_by_fsdp_is_named():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.forward = self._fsdp_wrapped_module = module

    block = Bottleneck(8, 8).eval()
    block.conv1, block.conv2 = Wrapper(block.conv1), Wrapper(block.conv2)
    assert "sharded by FSDP" in frb.explain(nn.Sequential(block))[0].reason
