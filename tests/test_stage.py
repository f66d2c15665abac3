"""A chain of blocks gives what the blocks give one by one, whatever is done to one of them, and touches nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import zoo
from cases import BACKENDS, FP32, FP64, require
from parity import assert_parity
from test_late_changes import CHANGES
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import stage as stages
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock, Bottleneck, PreActBottleneck, ResidualBlock
from fused_resblock.stage import FusedStage


def first_of_a_stage(planes: int = 4, stride: int = 2) -> Bottleneck:
    """A bottleneck that changes 8 channels to 4 * planes."""
    downsample = nn.Sequential(nn.Conv2d(8, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))
    return Bottleneck(8, planes, stride, downsample)


CHAINS = {
    "identity blocks": lambda: [Bottleneck(8, 2), Bottleneck(8, 2), Bottleneck(8, 2)],
    "downsample first": lambda: [first_of_a_stage(), Bottleneck(16, 4), Bottleneck(16, 4)],
    "basic": lambda: [BasicBlock(8, 8), BasicBlock(8, 8)],
    "grouped": lambda: [Bottleneck(8, 2, groups=2), Bottleneck(8, 2, groups=2)],
    "pre-activation": lambda: [PreActBottleneck(8, 8, 4, 2), PreActBottleneck(8, 8, 4), PreActBottleneck(8, 16, 4)],
    "mixed kinds": lambda: [zoo.PooledShortcut(), ResidualBlock(12, 16, 2), Bottleneck(16, 4)],
    "own classes": lambda: [zoo.NoNorm(), zoo.NormBehindAdd(), zoo.NormTwice(), zoo.NormOnShortcut(), zoo.ReluTwice()],
}


def chain(name: str) -> nn.Sequential:
    """The reference chain of that name, in eval mode."""
    return randomize_norms(nn.Sequential(*CHAINS[name]())).eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("size", [(2, 8, 7, 6), (1, 8, 1, 1), (0, 8, 4, 4)], ids=["ragged", "one pixel", "empty"])
def test_parity(name, size, backend):
    require(backend)
    reference = chain(name)
    fused = frb.fuse(reference, backend=backend, strict=True)
    assert isinstance(fused, FusedStage)
    x = torch.randn(size).contiguous(memory_format=torch.channels_last)  # else the chain has a copy of its own
    kept = x.clone()
    with torch.no_grad():
        first, again = fused(x), fused(x)
        assert_parity(first, reference(x), copy.deepcopy(reference).double()(x.double()), what=name)
    assert torch.equal(first, again)
    assert torch.equal(x, kept), "x was written to"
    assert fused in stages._programs, "the chain did not run as one"


@pytest.mark.parametrize("backend", [pytest.param(b, id=b) for b in ("auto", "triton")])
def test_results_are_nobody_elses_memory(backend):
    fused = frb.fuse(chain("identity blocks"), backend=backend)
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    with torch.no_grad():
        first = fused(x)
        kept = first.clone()
        fused(x + 1)
        fused(first)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first block", "middle block", "last block"])
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_change_of_one_block(change, place):
    reference = chain("identity blocks")
    fused = frb.fuse(reference, strict=True)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        fused(x), fused(x)
        results = []
        for module in (fused, reference):
            torch.manual_seed(3)
            with torch.enable_grad():
                change(module[place])
            results.append(module(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


STAGE_CHANGES = {
    "block appended": lambda s: s.append(Bottleneck(8, 2).eval()),
    "block deleted": lambda s: s.__delitem__(1),
    "block replaced by another": lambda s: s.__setitem__(1, randomize_norms(Bottleneck(8, 2), seed=5).eval()),
    "block replaced by another module": lambda s: s.__setitem__(1, Own()),
    "blocks swapped": lambda s: s._modules.update({"0": s[2], "2": s[0]}),
    "hook on a block": lambda s: s[1].register_forward_hook(lambda m, a, y: y * 2),
    "pre-hook on a block": lambda s: s[0].register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "forward of a block overridden": lambda s: setattr(s[1], "forward", lambda x: x * 3),
    "forward of the chain overridden": lambda s: setattr(s, "forward", lambda x: x * 3),
    "hook on the chain": lambda s: s.register_forward_hook(lambda m, a, y: y * 2),
    "class of a block": lambda s: setattr(s[1], "__class__", Own),
    "one block in train mode": lambda s: s[1].train(),
    "all in train mode": lambda s: s.train(),
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in STAGE_CHANGES.items()])
def test_change_of_the_chain(change):
    reference = chain("identity blocks")
    fused = frb.fuse(reference, strict=True)
    x = torch.randn(2, 8, 5, 5)
    results = []
    with torch.no_grad():
        fused(x), fused(x)
        for module in (fused, reference):
            torch.manual_seed(3)
            change(module)
            results.append([module(x), module(x)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_backend_of_one_block_is_changed_afterwards():
    fused = frb.fuse(chain("identity blocks"), backend="eager")
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        fused(x)
        frb.fuse(fused[1], backend="onednn", inplace=True)
        fused(x)
    assert [r.backend for r in frb.explain(fused)] == ["eager", "onednn", "eager"]
    operations = next(iter(stages._programs[fused]))._operations
    kinds = [operation.run.__module__.rsplit(".", 1)[1] for operation in operations]
    assert kinds == ["eager"] * 3 + ["onednn"] * 3 + ["eager"] * 3


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_the_same_block_twice(backend):
    block, other = Bottleneck(8, 2), Bottleneck(8, 2)
    reference = randomize_norms(nn.Sequential(block, other, block)).eval()
    x = torch.randn(2, 8, 5, 5)
    fused = frb.fuse(reference, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-5)


def test_calls_alone_and_slices():
    reference = chain("identity blocks")
    fused = frb.fuse(reference)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(fused[1](x), reference[1](x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused[:2](x), reference[:2](x), rtol=1e-4, atol=1e-5)
        assert isinstance(fused[1:], FusedStage)


def test_gradients_go_block_by_block():
    reference = chain("downsample first").double()
    fused = frb.fuse(reference)
    grads = []
    for module in (fused, reference):
        x = torch.linspace(-1, 1, 2 * 8 * 25, dtype=FP64).view(2, 8, 5, 5).requires_grad_()
        module(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_chains_of_their_own(copier):
    fused = frb.fuse(chain("basic"))
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        expected = fused(x)
        again = copier(fused)
        assert isinstance(again, FusedStage)
        for p in again.parameters():
            p.mul_(2)
        assert not torch.allclose(again(x), expected)
        assert torch.equal(fused(x), expected)


def test_unfuse_and_fuse_without_stages():
    reference = chain("basic")
    fused = frb.fuse(reference)
    assert type(frb.unfuse(fused)) is nn.Sequential
    assert type(frb.fuse(reference, stages=False)) is nn.Sequential
    assert frb.fuse(fused, inplace=True) is fused
    assert isinstance(fused, FusedStage)


def test_not_a_chain():
    """A single block, a block among other modules, a Sequential with a forward of its own."""

    class Doubling(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    one = nn.Sequential(BasicBlock(8, 8))
    among = nn.Sequential(BasicBlock(8, 8), nn.Dropout2d(), BasicBlock(8, 8))
    own = Doubling(BasicBlock(8, 8), BasicBlock(8, 8))
    for model in (one, among, own):
        fused = frb.fuse(model.eval())
        assert not isinstance(fused, FusedStage)
        x = torch.randn(1, 8, 4, 4)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_explain_lists_chains_and_why_they_are_apart():
    fused = frb.fuse(nn.Sequential(chain("basic"), chain("identity blocks")))
    assert [tuple(p) for p in frb.explain(fused).parts] == [
        ("0", "2 blocks", True, "one chain"),
        ("1", "3 blocks", True, "one chain"),
    ]
    fused[0][1].register_forward_hook(print)
    fused[1].train()
    reasons = [p.reason for p in frb.explain(fused).parts]
    assert reasons == ["hooks on 1", "0: batch statistics (train mode)"]
    assert "apart" in str(frb.explain(fused))


def test_wrong_input_raises_as_a_block_does():
    fused = frb.fuse(chain("basic"))
    with torch.no_grad():
        with pytest.raises(ValueError, match="^x must have 8 channels, as the block has, got 6$"):
            fused(torch.randn(1, 6, 4, 4))
        with pytest.raises(ValueError, match="^x must have the weights' dtype torch.float32, got torch.float64$"):
            fused(torch.randn(1, 8, 4, 4, dtype=FP64))
        with pytest.raises(TypeError, match="^x must be a tensor, got list$"):
            fused([1.0])
        fused(torch.randn(1, 8, 4, 4, dtype=FP32))
        with pytest.raises(ValueError, match="4 dimensions"):
            fused(torch.randn(8, 4, 4))


def test_blocks_that_do_not_fit_each_other():
    fused = frb.fuse(nn.Sequential(BasicBlock(8, 8), BasicBlock(6, 6)).eval())
    with torch.no_grad(), pytest.raises(ValueError, match="^x must have 6 channels, as the block has, got 8$"):
        fused(torch.randn(1, 8, 4, 4))


def test_autocast():
    reference = chain("identity blocks")
    fused = frb.fuse(reference)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        plain = fused(x)
        with torch.autocast("cpu", torch.bfloat16):
            ours = fused(x)
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours.float(), reference(x).float(), rtol=0.1, atol=0.1)
        assert torch.equal(fused(x), plain)
