"""`torch.compile` and `torch.export` of the fused operations and of fused blocks: one graph, the same values."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import BF16, FP32, ConvCase, conv_bn_act_reference, image
from test_gradients import gradients
from torch import nn

import fused_resblock as frb
from fused_resblock.functional import conv_bn_act
from fused_resblock.reference import BasicBlock, Bottleneck, PreActBottleneck, ResidualBlock

BLOCKS = [
    pytest.param(lambda: BasicBlock(16, 16), id="BasicBlock"),
    pytest.param(lambda: Bottleneck(16, 4), id="Bottleneck"),
    pytest.param(lambda: ResidualBlock(16, 12, 2), id="ResidualBlock"),
    pytest.param(lambda: PreActBottleneck(16, 12, 4, 2), id="PreActBottleneck"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles from nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both(make) -> tuple[nn.Module, nn.Module]:
    """A reference block in eval mode and its fused copy."""
    reference = frb.models.randomize_norms(make()).eval()
    return reference, frb.fuse(reference, strict=True)


@pytest.mark.parametrize("joined", [{"residual": 2}, {"shortcut": 2}], ids=["residual", "shortcut"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_function_forward_and_backward(joined, dynamic):
    compiled = torch.compile(conv_bn_act, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        args = ConvCase(batch=batch, bias=True, **joined).build(FP32)
        ours, expected = gradients(compiled, args), gradients(conv_bn_act_reference, args)
        for name in expected:
            torch.testing.assert_close(
                ours[name], expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("make", BLOCKS)
def test_block_forward_and_backward(make):
    reference, fused = both(make)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = image(2, 16, 5, 6).cpu()
    upstream = torch.randn(reference(x).shape)
    for block in (reference, compiled):
        block(x.requires_grad_()).backward(upstream)
    grads = {name: p.grad for name, p in fused.named_parameters()}
    for name, p in reference.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", BLOCKS)
def test_graph_holds_the_fused_operations(make):
    _, fused = both(make)
    targets = []

    def spy(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        torch.compile(fused, backend=spy, fullgraph=True)(image(2, 16, 5, 6).cpu())
    assert targets
    assert all("fused_resblock" in target for target in targets), targets


def test_inductor():
    reference, fused = both(lambda: Bottleneck(16, 4))
    x = image(2, 16, 5, 6).cpu()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fused, fullgraph=True)(x), reference(x), rtol=1e-4, atol=1e-5)


def test_training_mode_updates_statistics():
    reference, fused = both(lambda: BasicBlock(16, 16))
    reference.train(), fused.train()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = image(4, 16, 5, 6).cpu()
    torch.testing.assert_close(compiled(x), reference(x))
    for (name, ours), theirs in zip(fused.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")


def test_mode_switch_after_compilation():
    reference, fused = both(lambda: BasicBlock(16, 16))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = image(4, 16, 5, 6).cpu()
    with torch.no_grad():
        for training in (False, True, False):
            reference.train(training), fused.train(training)
            torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-5)


def test_autocast():
    reference, fused = both(lambda: Bottleneck(16, 4))
    x = image(2, 16, 5, 6).cpu().to(BF16)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        y = torch.compile(fused, backend="aot_eager", fullgraph=True)(x)
        expected = reference(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_hook_on_an_inner_module_fires():
    """Registered after fusing, before compiling: it must keep its effect."""
    reference, fused = both(lambda: Bottleneck(16, 4))
    for block in (reference, fused):
        block.bn1.register_forward_hook(lambda module, args, y: y * 3)
    x = image(2, 16, 5, 6).cpu()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fused, backend="aot_eager")(x), reference(x), rtol=1e-4, atol=1e-5)


def test_module_replaced_deep_inside():
    reference, fused = both(lambda: ResidualBlock(16, 12, 2))
    for block in (reference, fused):
        block.block[2] = nn.SiLU()
    x = image(2, 16, 5, 6).cpu()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fused, backend="aot_eager")(x), reference(x), rtol=1e-4, atol=1e-5)


def test_weights_changed_after_compilation():
    reference, fused = both(lambda: Bottleneck(16, 4))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = image(2, 16, 5, 6).cpu()
    with torch.no_grad():
        compiled(x)
        for block in (reference, fused):
            block.conv2.weight.mul_(2)
            block.bn2.running_mean.add_(1)
        torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def small_network() -> nn.Module:
    """A fused network of one block a stage, in eval mode."""
    model = frb.models.ResNet(frb.FusedBottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=16)
    return frb.models.randomize_norms(model).eval()


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_of_a_network(small_network, strict):
    x = torch.randn(2, 3, 33, 40)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(small_network, (x,), dynamic_shapes=({0: batch},), strict=strict)
    held = [str(node.target) for node in program.graph.nodes]
    assert sum("fused_resblock.conv_bn_act" in target for target in held) == 12
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        for n in (2, 5):
            x = torch.randn(n, 3, 33, 40)
            torch.testing.assert_close(loaded(x), small_network(x), rtol=1e-4, atol=1e-5)


def test_compiled_network_equals_reference(small_network):
    reference = frb.unfuse(copy.deepcopy(small_network))
    compiled = torch.compile(small_network, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 33, 40)
    torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-4)
