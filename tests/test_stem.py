"""Stems: convolution, norm, ReLU and max-pool outside of the blocks as one operation, found by the network's graph."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from cases import BACKENDS, BF16, require
from parity import assert_parity
from stem_networks import Network, network, parts
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fused_resblock as frb
from fused_resblock import stem as stems
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock

SETTINGS = {
    "7x7 and pool": {},
    "3x3": {"kernel": 3},
    "no pool": {"pool": nn.Identity()},
    "average pool": {"pool": nn.AvgPool2d(2)},
    "pool 2 of stride 2": {"pool": nn.MaxPool2d(2)},
    "pool with ceil_mode": {"pool": nn.MaxPool2d(3, 2, 1, ceil_mode=True)},
    "dilated pool": {"pool": nn.MaxPool2d(2, 1, 0, dilation=2)},
    "bias and groups": {"channels": 4, "bias": True, "groups": 2},
    "1 channel": {"channels": 1},
    "16 channels": {"width": 16},
    "16 channels with a bias": {"width": 16, "bias": True, "kernel": 5},
    "same padding": {"stride": 1, "padding": "same"},
}


@pytest.mark.parametrize(("width", "operations"), [(8, 2), (16, 1)])
def test_one_kernel_where_there_is_one(width, operations):
    require("triton")
    fused = frb.fuse(network(width=width), backend="triton")
    with torch.no_grad():
        fused(torch.randn(1, 3, 20, 20))
    (program,) = stems._programs[fused.conv1][1]
    assert len(program._operations) == operations


class Shared(nn.Module):
    """Three convolutions and norms with one ReLU, whose adds make no block."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norms, self.relu = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3)), nn.ReLU()
        self.block = BasicBlock(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.relu(norm(conv(x)))
        return self.block(x)


def test_stems_that_share_a_relu_are_bound_once(monkeypatch):
    reference = randomize_norms(Shared()).eval()
    fused, bound = frb.fuse(reference), []
    bind = stems._bind
    monkeypatch.setattr(stems, "_bind", lambda *args: bound.append(args) or bind(*args))
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-5)
    assert len(bound) == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [pytest.param(s, id=name) for name, s in SETTINGS.items()])
@pytest.mark.parametrize("size", [(2, 9, 14), (1, 8, 8)], ids=["ragged", "small"])
def test_parity(settings, size, backend):
    require(backend)
    reference = network(**copy.deepcopy(settings))
    fused = frb.fuse(reference, backend=backend, strict=True)
    (found,) = parts(fused)
    assert found.startswith("Conv2d + BatchNorm2d + ReLU")
    n, h, w = size
    x = torch.randn(n, settings.get("channels", 3), h, w)
    kept = x.clone()
    with torch.no_grad():
        y, again = fused(x), fused(x)
        assert_parity(y, reference(x), copy.deepcopy(reference).double()(x.double()), what="logits", floor=1e-5)
    assert torch.equal(y, again)
    assert torch.equal(x, kept)
    assert any(module in stems._programs for module in fused.modules())


def data_edit(net: nn.Module) -> None:
    for p in net.conv1.parameters():
        p.data.mul_(1.5)


CHANGES = {
    "weight in place": lambda n: n.conv1.weight.mul_(2),
    "weight through data": data_edit,
    "new weight": lambda n: setattr(n.conv1, "weight", nn.Parameter(torch.ones_like(n.conv1.weight) * 0.1)),
    "bias added": lambda n: setattr(n.conv1, "bias", nn.Parameter(torch.ones(8))),
    "mean in place": lambda n: n.bn1.running_mean.add_(1),
    "gamma in place": lambda n: n.bn1.weight.mul_(-1),
    "eps": lambda n: setattr(n.bn1, "eps", 0.5),
    "statistics forgotten": lambda n: (
        vars(n.bn1).update(track_running_stats=False) or n.bn1._buffers.update(running_mean=None, running_var=None)
    ),
    "norm in train mode": lambda n: n.bn1.train(),
    "all in train mode": lambda n: n.train(),
    "norm replaced": lambda n: setattr(n, "bn1", nn.GroupNorm(2, 8)),
    "norm of another stem": lambda n: setattr(n, "bn1", frb.fuse(randomize_norms(Network(), seed=9)).eval().bn1),
    "ReLU replaced": lambda n: setattr(n, "relu", nn.SiLU()),
    "pool replaced": lambda n: setattr(n, "maxpool", nn.AvgPool2d(2)),
    "pool removed": lambda n: setattr(n, "maxpool", nn.Identity()),
    "convolution replaced": lambda n: setattr(n, "conv1", nn.Conv2d(3, 8, 5, 2, 2)),
    "pool's kernel": lambda n: setattr(n.maxpool, "kernel_size", 2),
    "pool's stride": lambda n: setattr(n.maxpool, "stride", 1),
    "convolution's stride": lambda n: setattr(n.conv1, "stride", (1, 1)),
    "padding mode": lambda n: vars(n.conv1).update(padding_mode="reflect", _reversed_padding_repeated_twice=[3] * 4),
    "hook on the convolution": lambda n: n.conv1.register_forward_hook(lambda m, a, y: y * 2),
    "hook on the norm": lambda n: n.bn1.register_forward_hook(lambda m, a, y: y * 2),
    "pre-hook on the ReLU": lambda n: n.relu.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    "hook on the pool": lambda n: n.maxpool.register_forward_hook(lambda m, a, y: y * 2),
    "forward of the convolution": lambda n: setattr(
        n.conv1, "forward", lambda x: n.conv1._conv_forward(x, n.conv1.weight * 2, None)
    ),
    "_conv_forward of the convolution": lambda n: setattr(
        n.conv1, "_conv_forward", lambda x, w, b: torch.conv2d(x, w * 2, b, 2, 3)
    ),
    "forward of the norm": lambda n: setattr(n.bn1, "forward", lambda x: x * 2),
    "forward of the network": lambda n: setattr(n, "forward", lambda x: n.bn1(n.conv1(x)) * 2),
    "parametrization": lambda n: parametrize.register_parametrization(n.conv1, "weight", Doubled()),
    "another model's weights": lambda n: n.load_state_dict(randomize_norms(Network(), seed=9).state_dict()),
    "double": lambda n: n.double(),
}


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_change(change):
    reference = network()
    fused = frb.fuse(reference, strict=True)
    x = torch.randn(2, 3, 19, 22)
    results = []
    with torch.no_grad():
        fused(x), fused(x)
        for model in (fused, reference):
            torch.manual_seed(4)
            change(model)
            results.append([model(x.to(model.fc.weight.dtype)) for _ in range(2)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_parametrized_weight_that_changes_again():
    reference = network()
    fused = frb.fuse(reference)
    x = torch.randn(1, 3, 19, 22)
    with torch.no_grad():
        for model in (fused, reference):
            parametrize.register_parametrization(model.conv1, "weight", Doubled())
        fused(x)
        for model in (fused, reference):
            model.conv1.parametrizations.weight.original.mul_(3)
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_training_is_the_references_to_the_bit(training):
    reference = network().train(training)
    fused = frb.fuse(reference, stages=False)
    for block in fused.layer1:
        frb.unfuse(block)
    x = torch.randn(2, 3, 19, 22)
    grads = []
    for model in (fused, reference):
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(2, 4, 19, 22), id="channels"),
        pytest.param(torch.randn(2, 3, 19, 22).double(), id="dtype"),
        pytest.param(torch.ones(2, 3, 19, 22, dtype=torch.int64), id="integers"),
        pytest.param(torch.randn(3, 19), id="rank"),
        pytest.param([1.0], id="list"),
        pytest.param(None, id="nothing"),
    ],
)
def test_wrong_input_raises_what_torch_raises(x):
    reference = network()
    fused = frb.fuse(reference)
    with torch.no_grad():
        with pytest.raises(Exception) as theirs:  # noqa: PT011, whatever torch raises
            reference(x)
        with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value)[:20])):
            fused(x)


def test_unbatched_image_and_empty_batch():
    reference = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), BasicBlock(8, 8)).eval()
    fused = frb.fuse(reference)
    assert len(frb.explain(fused).parts) == 1
    with torch.no_grad():
        assert fused(torch.randn(0, 3, 9, 9)).shape == (0, 8, 7, 7)
        torch.testing.assert_close(fused[0](torch.randn(3, 9, 9)).shape, torch.Size([8, 7, 7]))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copier):
    fused = frb.fuse(network())
    x = torch.randn(1, 3, 19, 22)
    with torch.no_grad():
        expected = fused(x)
        again = copier(fused)
        assert torch.equal(again(x), expected)
        again.conv1.weight.mul_(2)
        assert not torch.equal(again(x), expected)
        assert torch.equal(fused(x), expected)


def test_traced_and_compiled():
    reference = network()
    fused = frb.fuse(reference)
    x = torch.randn(2, 3, 19, 22)
    with torch.no_grad():
        expected = reference(x)
        graph = torch.fx.symbolic_trace(fused)
        torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(fused, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)


def test_autocast():
    reference = network()
    fused = frb.fuse(reference)
    x = torch.randn(2, 3, 19, 22)
    with torch.no_grad():
        with torch.autocast("cpu", BF16):
            ours, theirs = fused(x), reference(x)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-5)


def test_hook_sees_real_values():
    reference = network()
    fused = frb.fuse(reference)
    x = torch.randn(1, 3, 19, 22)
    seen = []
    for model in (fused, reference):
        model.bn1.register_forward_hook(lambda m, a, y: seen.append((a[0].clone(), y.clone())))
    with torch.no_grad():
        fused(x), reference(x)
    for ours, theirs in zip(*seen, strict=True):
        assert type(ours) is Tensor
        torch.testing.assert_close(ours, theirs)


def test_global_hook_sees_every_module():
    fused = frb.fuse(network())
    called = []
    with torch.no_grad(), nn.modules.module.register_module_forward_hook(lambda m, a, y: called.append(type(y))):
        fused(torch.randn(1, 3, 19, 22))
    assert stems.Pending not in called
