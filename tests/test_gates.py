"""Blocks with squeeze-and-excitation and the like: fused around their gates, which run as they are."""

from __future__ import annotations

import copy
import pickle

import gated_blocks
import pytest
import timm
import torch
import torchvision
from test_recognize import assert_same, made, put_in_mode
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.gates import gates

GATED = [pytest.param(cls, id=name) for name, cls in gated_blocks.GATED.items()]
X = torch.randn(2, 8, 7, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cls", GATED)
def test_recognised(cls):
    fused = frb.fuse(made(cls), strict=True)
    (report,) = frb.explain(fused)
    assert report.fused
    assert "runs as it is" in report.reason


@pytest.mark.parametrize("cls", GATED)
@pytest.mark.parametrize("mode", ["eval", "frozen", "train"])
def test_same_results_and_gradients(cls, mode):
    block = made(cls)
    fused = frb.fuse(block)
    put_in_mode(mode, block, fused)
    assert_same(block, fused, X, grad=True)


@pytest.mark.parametrize("cls", GATED)
@pytest.mark.parametrize("backend", ["auto", "triton", "eager"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_same_without_gradients(cls, backend, memory_format):
    block = made(cls)
    x = X.contiguous(memory_format=memory_format)
    with torch.no_grad():
        expected = block(X)
        for frozen in (False, True):
            fused = frb.fuse(block, backend=backend, frozen=frozen)
            for _ in range(3):
                torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [gated_blocks.Normed, gated_blocks.Inside])
def test_a_gate_s_norm_in_train_mode_is_the_block_s_own_business(cls):
    """The gate's statistics are updated once, also where the block's own norms are frozen."""
    block = made(cls)
    fused = frb.fuse(block)
    for module in (block, fused):
        module.gate.train()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fused(X), block(X))
    torch.testing.assert_close(fused.gate.norm.running_mean, block.gate.norm.running_mean)
    assert fused.gate.norm.num_batches_tracked == 3
    assert not frb.explain(fused)[0].fused


@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
def test_changes_of_a_gate_are_seen(frozen):
    block = made(gated_blocks.Plain)
    fused = frb.fuse(block, frozen=frozen)
    with torch.no_grad():
        fused(X), fused(X)
        for module in (block, fused):  # not folded: also a frozen model sees it
            module.gate.fc[2].weight.mul_(3)
            module.gate.fc[2].bias.data.add_(1)
        torch.testing.assert_close(fused(X), block(X), rtol=1e-4, atol=1e-4)
        for module in (block, fused):
            module.gate = nn.Identity()
        frb.fuse(fused, frozen=frozen, inplace=True)
        torch.testing.assert_close(fused(X), block(X), rtol=1e-4, atol=1e-4)
        assert "as it is" not in frb.explain(fused)[0].reason


def test_hooks_on_a_gate():
    block = made(gated_blocks.Plain)
    fused, calls = frb.fuse(block), []
    with torch.no_grad():
        fused(X), fused(X)
        fused.gate.fc.register_forward_hook(lambda module, args, y: calls.append(1) or y * 0)
        block.gate.fc.register_forward_hook(lambda module, args, y: y * 0)
        torch.testing.assert_close(fused(X), block(X), rtol=1e-4, atol=1e-4)
    assert calls == [1]
    assert "hooks" in frb.explain(fused)[0].reason


@pytest.mark.parametrize("cls", gated_blocks.NO_GATES, ids=lambda cls: cls.__name__)
def test_what_is_no_gate(cls):
    block = gated_blocks.gated(cls()).eval()
    assert not gates(block)
    fused = frb.fuse(block)
    assert not isinstance(fused, frb.FusedBlock)
    with torch.no_grad():
        assert torch.equal(fused(X), block(X))


def test_gates_are_found_by_what_they_compute():
    assert list(gates(made(gated_blocks.Behind))) == ["gate", "first"]
    assert list(gates(made(gated_blocks.Twice))) == ["gate"]
    assert not gates(frb.reference.Bottleneck(8, 2))


def test_plans_of_other_blocks_hold_no_gates():
    """A product that is part of a plan anyhow, as a timm norm, is not looked for."""
    fused = frb.fuse(frb.models.resnet18().eval())
    assert all(
        step.module is None
        for block in fused.modules()
        if isinstance(block, frb.FusedBlock)
        for step in block._fused_plan.steps
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(dtype):
    block = made(gated_blocks.Plain)
    fused = frb.fuse(block)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        for _ in range(2):
            ours, expected = fused(X), block(X)
            torch.testing.assert_close(ours.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_a_gate_in_another_dtype():
    """A product that widens its result is followed by an add that does: no fused operation."""

    class Widens(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.float().sigmoid()

    block = frb.models.randomize_norms(gated_blocks.gated(Widens())).eval().bfloat16()
    fused, x = frb.fuse(block), X.bfloat16()
    with torch.no_grad():
        assert fused(x).dtype == block(x).dtype
        torch.testing.assert_close(fused(x), block(x))
    assert torch.equal(fused(x), block(x))


def test_a_chain_of_gated_blocks():
    blocks = nn.Sequential(*(made(cls) for cls in (gated_blocks.Plain, gated_blocks.Twice, gated_blocks.Normed)))
    with torch.no_grad():
        for frozen in (False, True):
            fused = frb.fuse(blocks, frozen=frozen)
            assert [part.fused for part in frb.explain(fused).parts][:1] == [True]
            for _ in range(3):
                torch.testing.assert_close(fused(X), blocks(X), rtol=1e-4, atol=1e-4)


def test_copies():
    fused = frb.fuse(made(gated_blocks.Normed))
    with torch.no_grad():
        expected = fused(X)
        assert torch.equal(copy.deepcopy(fused)(X), expected)
        assert torch.equal(pickle.loads(pickle.dumps(fused))(X), expected)


@pytest.mark.parametrize("cls", [gated_blocks.Plain, gated_blocks.Inside])
def test_compile_and_export(cls):
    torch._dynamo.reset()
    block = made(cls)
    fused = frb.fuse(block)
    with torch.no_grad():
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), block(X), rtol=1e-4, atol=1e-4)
        exported = torch.export.export(fused, (X,)).module()
        torch.testing.assert_close(exported(X), block(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["legacy_seresnet18", "ecaresnet26t", "regnety_002"])
def test_networks_of_timm(name):
    networks(timm.create_model(name))


def test_network_of_torchvision():
    networks(torchvision.models.regnet_y_400mf())


def networks(model: nn.Module) -> None:
    """Every block is fused, and the network computes the same."""
    reference = frb.models.randomize_norms(model).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = reference(x)
        for frozen in (False, True):
            fused = frb.fuse(reference, strict=True, frozen=frozen)
            for _ in range(3):
                torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


class Widening(nn.Module):
    """A gate makes eight channels of one, and the first convolution reads those."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = gated_blocks.Broadcast()
        self.conv, self.down = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(1, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(self.gate(x)) + self.down(x))


def test_a_gate_that_widens_its_input():
    reference = Widening().eval()
    fused, x = frb.fuse(reference, strict=True), X[:, :1]
    torch.testing.assert_close(fused(x), reference(x))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x))
    with pytest.raises(ValueError, match="^x must have the weights' dtype"):
        fused(x.double())
