"""Nothing goes stale: whatever is done to a fused block behind `fuse`, its next forward is that of its own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fused_resblock as frb
from fused_resblock.models import randomize_norms
from fused_resblock.reference import Bottleneck, ResidualBlock

BACKENDS = [pytest.param(name, id=name) for name in ("auto", "triton", "eager")]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def no_grad(change: Callable) -> Callable:
    """The change with gradients off."""
    return torch.no_grad()(change)


def setting(path: str, value) -> Callable[[nn.Module], None]:
    """Sets one attribute."""

    def change(block: nn.Module) -> None:
        parent, _, last = path.rpartition(".")
        setattr(block.get_submodule(parent), last, value() if callable(value) else value)

    return change


def optimise(block: nn.Module) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        block(torch.ones(1, 8, 5, 5)).square().mean().backward()
        optimizer.step()


def train_a_step(block: nn.Module) -> None:
    block.train()
    block(torch.linspace(-1, 2, 2 * 8 * 25).view(2, 8, 5, 5))
    block.eval()


def load(block: nn.Module, **options) -> None:
    block.load_state_dict(randomize_norms(Bottleneck(8, 2), seed=7).state_dict(), **options)


def to_bf16_and_back(block: nn.Module) -> None:
    block.bfloat16()
    block.float()  # rounded weights, perhaps at the old addresses and with the old version numbers


def data_of_all(block: nn.Module) -> None:
    for p in block.parameters():
        p.data = p.data * 1.5


def data_in_place(block: nn.Module) -> None:
    """As old moving averages do it; PyTorch records no edit."""
    for p in block.parameters():
        p.data.mul_(1.5)


def vector_to_parameters(block: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(block.parameters()) * 0.5
    nn.utils.vector_to_parameters(vector, block.parameters())


def swap(block: nn.Module) -> None:
    torch.utils.swap_tensors(block.conv1.weight, nn.Parameter(block.conv1.weight.detach() * 2))


def forget_statistics(block: nn.Module) -> None:
    """Test-time adaptation: norms use the statistics of the batch in eval mode as well."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None


def parameter_becomes_buffer(block: nn.Module) -> None:
    weight = block.bn2.weight.detach() * 2
    del block.bn2.weight
    block.bn2.register_buffer("weight", weight)


def prune_and_make_permanent(block: nn.Module) -> None:
    prune.l1_unstructured(block.conv2, "weight", 0.5)
    prune.remove(block.conv2, "weight")


CHANGES = {
    "load_state_dict": load,
    "load_state_dict assign": lambda b: load(b, assign=True),
    "optimiser steps": optimise,
    "a step in train mode": train_a_step,
    "weight in place": no_grad(lambda b: b.conv2.weight.mul_(2)),
    "one weight in place": no_grad(lambda b: b.conv2.weight[0, 0, 1, 1].add_(3)),
    "running mean in place": no_grad(lambda b: b.bn2.running_mean.add_(1)),
    "running variance in place": no_grad(lambda b: b.bn2.running_var.mul_(2)),
    "gamma in place": no_grad(lambda b: b.bn3.weight.mul_(2)),
    "beta in place": no_grad(lambda b: b.bn1.bias.sub_(1)),
    "reset_running_stats": lambda b: b.bn1.reset_running_stats(),
    "reset_parameters": lambda b: b.conv1.reset_parameters(),
    "eps": setting("bn1.eps", 0.5),
    "eps of every norm": lambda b: [setattr(m, "eps", 0.25) for m in b.modules() if hasattr(m, "eps")],
    "new parameter": setting("conv1.weight", lambda: nn.Parameter(torch.ones(2, 8, 1, 1))),
    "new buffer": setting("bn1.running_mean", lambda: torch.ones(2)),
    "bias added": setting("conv3.bias", lambda: nn.Parameter(torch.ones(8))),
    "gamma removed": setting("bn2.weight", None),
    "data replaced": data_of_all,
    "data edited": data_in_place,
    "vector_to_parameters": vector_to_parameters,
    "swap_tensors": swap,
    "bf16 and back": to_bf16_and_back,
    "channels_last": lambda b: b.to(memory_format=torch.channels_last),
    "requires_grad off": lambda b: b.requires_grad_(False),
    "parameter becomes a buffer": parameter_becomes_buffer,
    "statistics forgotten": forget_statistics,
    "pruned for good": prune_and_make_permanent,
    "dilation and padding": lambda b: vars(b.conv2).update(dilation=(2, 2), padding=(2, 2)),
    "padding mode": lambda b: vars(b.conv2).update(padding_mode="circular", _reversed_padding_repeated_twice=[1] * 4),
    "module replaced": setting("bn2", lambda: nn.GroupNorm(1, 2)),
    "convolution replaced": setting("conv2", lambda: nn.Conv2d(2, 2, 5, padding=2)),
    "ReLU replaced": setting("relu", nn.SiLU),
    "norm replaced by Identity": setting("bn2", nn.Identity),
    "downsample added": setting("downsample", lambda: nn.Conv2d(8, 8, 1)),
    "BN replaced by SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "class of an inner module": lambda b: setattr(b.relu, "__class__", nn.Sigmoid),
    "activation in place": setting("relu.inplace", False),
    "inner forward overridden": lambda b: setattr(b.bn2, "forward", lambda x: x * 2),
    "own forward overridden": lambda b: setattr(b, "forward", lambda x: x * 2),
    "forward hook": lambda b: b.conv2.register_forward_hook(lambda m, a, y: y * 2),
    "forward pre-hook": lambda b: b.conv2.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "parametrization": lambda b: parametrize.register_parametrization(b.conv2, "weight", Doubled()),
    "pruned": lambda b: prune.l1_unstructured(b.conv2, "weight", 0.5),
}


def check(make: Callable[[], nn.Module], change: Callable[[nn.Module], None], backend: str, x: Tensor) -> None:
    """The same change to a block and to its fused copy, which has run before: outputs and gradients agree."""
    block = randomize_norms(make()).eval()
    fused = frb.fuse(block, backend=backend, strict=True)
    with torch.no_grad():
        fused(x), fused(x)
    results = []
    for module in (fused, block):
        torch.manual_seed(11)
        change(module)
        with torch.no_grad():
            y = module(x)
        leaf = x.clone().requires_grad_()
        module(leaf).sum().backward()
        results.append((y, leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_change(change, backend):
    check(lambda: Bottleneck(8, 2), change, backend, torch.randn(2, 8, 5, 5))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda b: b.block.__setitem__(2, nn.SiLU()), id="replaced"),
        pytest.param(lambda b: b.block.append(nn.ReLU()), id="appended"),
        pytest.param(lambda b: b.block.__delitem__(2), id="deleted"),
        pytest.param(lambda b: b.skip.insert(1, nn.Tanh()), id="inserted"),
        pytest.param(lambda b: b.block.add_module("2", nn.Sigmoid()), id="add_module"),
        pytest.param(lambda b: b.block[1].register_forward_hook(lambda m, a, y: -y), id="hook"),
        pytest.param(lambda b: setattr(b, "skip", nn.Conv2d(16, 12, 1, 2)), id="branch replaced"),
        pytest.param(lambda b: b._modules.update(skip=nn.Conv2d(16, 12, 1, 2)), id="replaced behind the scenes"),
        pytest.param(lambda b: setattr(b.block, "__class__", Backwards), id="class of the Sequential"),
        pytest.param(
            lambda b: (vars(b.block[0]).update(stride=(1, 1)), vars(b.skip[0]).update(stride=(1, 1))), id="strides"
        ),
    ],
)
def test_change_deep_inside(change):
    check(lambda: ResidualBlock(16, 12, 2), change, "auto", torch.randn(2, 16, 5, 5))


class Backwards(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def test_flag_that_the_forward_asks():
    """A block whose own attribute decides what it computes."""

    class Flagged(zoo.Base):
        final_relu = True

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x
            return torch.relu(out) if self.final_relu else out

    check(Flagged, lambda b: setattr(b, "final_relu", False), "auto", torch.randn(2, 8, 5, 5))


def test_hook_removed_again():
    block = Bottleneck(8, 2).eval()
    fused = frb.fuse(block)
    handle = fused.bn1.register_forward_hook(lambda m, a, y: y * 0)
    x = torch.randn(2, 8, 5, 5)
    assert fused.reference_reason() == "hooks on inner modules"
    fused(x)
    handle.remove()
    assert fused.reference_reason() is None
    torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-5)


def test_global_hook():
    fused = frb.fuse(Bottleneck(8, 2).eval())
    called = []
    with nn.modules.module.register_module_forward_hook(lambda m, a, y: called.append(type(m).__name__)):
        fused(torch.randn(1, 8, 3, 3))
    assert called.count("Conv2d") == 3
    assert called.count("FusedBottleneck") == 1


def test_to_another_dtype():
    block = randomize_norms(Bottleneck(8, 2)).eval()
    fused = frb.fuse(block)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32):
            for module in (fused, block):
                module.to(dtype)
            torch.testing.assert_close(fused(x.to(dtype)), block(x.to(dtype)), rtol=0.05, atol=0.05)
            assert fused(x.to(dtype)).dtype == dtype


def test_two_blocks_that_share_parameters():
    first = randomize_norms(Bottleneck(8, 2)).eval()
    second = randomize_norms(Bottleneck(8, 2), seed=1).eval()
    second.conv1.weight = first.conv1.weight
    model = nn.Sequential(first, second)
    fused = frb.fuse(model)
    assert fused[0].conv1.weight is fused[1].conv1.weight
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_clear_caches_after_an_edit_that_cannot_be_seen():
    block = randomize_norms(Bottleneck(8, 2)).eval()
    fused = frb.fuse(block)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        fused(x)
        for module in (fused, block):
            module.conv2.weight.data[1, 1, 1, 1] += 5
        frb.clear_caches()
        torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-5)
    assert copy.deepcopy(fused)(x).equal(fused(x))


def test_a_pool_that_was_a_strided_view_and_is_none_any_more():
    block = zoo.MaxPooledShortcut().eval()
    fused = frb.fuse(block)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-5)
        for module in (fused, block):
            module.subsample.kernel_size, module.subsample.padding = 3, 1
        torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-5)
