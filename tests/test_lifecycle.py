"""What happens to fused models besides forward: copies, pickles, replicas, tracing, averaging, garbage collection."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn, optim
from torch.utils.checkpoint import checkpoint

import fused_resblock as frb
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock, Bottleneck, ResidualBlock


def made() -> nn.Module:
    """A reference model in eval mode: a drop-in class and a class of a user's own."""
    return randomize_norms(nn.Sequential(BasicBlock(8, 8), zoo.PooledShortcut(), ResidualBlock(12, 8))).eval()


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The reference, its fused copy which has run once, and an input."""
    reference = made()
    fused = frb.fuse(reference, strict=True)
    x = torch.randn(2, 8, 7, 6)
    with torch.no_grad():
        fused(x)
    return reference, fused, x


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """fp32 results of different summation orders."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("protocol", [2, 4, pickle.HIGHEST_PROTOCOL])
def test_pickle(pair, protocol):
    reference, fused, x = pair
    again = pickle.loads(pickle.dumps(fused, protocol))
    assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]
    assert torch.equal(again(x), fused(x))
    assert [r[:4] for r in frb.explain(again)] == [r[:4] for r in frb.explain(fused)]
    frb.unfuse(again)
    assert torch.equal(again(x), reference(x))


def test_deepcopy_is_independent(pair):
    _, fused, x = pair
    before = fused(x)
    again = copy.deepcopy(fused)
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1)
    assert torch.equal(fused(x), before)
    assert not torch.allclose(again(x), before)
    assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]


def test_torch_save_and_load(pair):
    _, fused, x = pair
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), fused(x))


def test_load_in_another_process(pair, tmp_path):
    """Where no block of that class was ever fused."""
    _, fused, x = pair
    torch.save((fused, x, fused(x).detach()), tmp_path / "model.pt")
    script = (
        "import sys, torch; fused, x, y = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.allclose(fused(x), y, rtol=1e-4, atol=1e-5); "
        "print(*(type(m).__name__ for m in fused))"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=here.parent,
        env={"PATH": "", "PYTHONPATH": f"{here}:{here.parent}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["FusedBasicBlock", "FusedPooledShortcut", "FusedResidualBlock"]


def test_moving_average(pair):
    reference, fused, x = pair
    average = optim.swa_utils.AveragedModel(fused, avg_fn=lambda old, new, n: 0.5 * old + 0.5 * new, use_buffers=True)
    expected = copy.deepcopy(reference)
    average.update_parameters(fused)
    with torch.no_grad():
        average(x)
        for p in fused.parameters():
            p.mul_(2)
        for e, p in zip(expected.parameters(), fused.parameters(), strict=True):
            e.copy_(0.5 * e + 0.5 * p)
    average.update_parameters(fused)
    close(average(x), expected(x))


def test_data_parallel_replica(pair):
    """What `nn.DataParallel` does to each device's copy, by hand: parameters become plain tensors."""
    reference, fused, x = pair
    modules = list(fused.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in copies.items():
        for key, child in module._modules.items():
            setattr(replica, key, None if child is None else copies[child])
        for key, p in module._parameters.items():
            if p is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, p.clone())
        for key, b in module._buffers.items():
            setattr(replica, key, b)
    replica = copies[fused]
    assert type(replica[0]) is type(fused[0])
    close(replica(x), reference(x))
    replica(x).sum().backward()
    reference(x).sum().backward()
    for p, q in zip(fused.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
    close(fused(x), reference(x))


def test_symbolic_trace(pair):
    reference, fused, x = pair
    graph = torch.fx.symbolic_trace(fused)
    assert torch.equal(graph(x), reference(x))
    assert any("conv1" in str(node.target) for node in graph.graph.nodes)


def test_a_graph_of_a_network_is_explained_as_one():
    """Its modules are shells that only hold layers."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), BasicBlock(8, 8), BasicBlock(8, 8)).eval()
    traced = torch.fx.symbolic_trace(network)
    (report,) = frb.explain(frb.fuse(traced))
    assert not report.fused
    assert report.reason == "it was traced by torch.fx, which leaves no modules that are blocks"


def test_blocks_whose_layers_are_those_of_a_fused_graph():
    reference = made()
    x = torch.randn(2, 8, 7, 6)
    frb.fuse(torch.fx.symbolic_trace(shared := copy.deepcopy(reference)), inplace=True)
    fused = frb.fuse(shared, strict=True)
    with torch.no_grad():
        close(fused(x), reference(x))
        close(fused(x), reference(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(pair):
    reference, fused, x = pair
    traced = torch.jit.trace(fused, x)
    other = torch.randn(1, 8, 4, 5)
    assert torch.equal(traced(other), reference(other))
    assert "aten::_convolution" in str(traced.inlined_graph)


def test_feature_extraction(pair):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    reference, fused, x = pair
    ours, theirs = (extraction.create_feature_extractor(m, {"0.bn1": "a", "2": "b"})(x) for m in (fused, reference))
    assert torch.equal(ours["a"], theirs["a"])
    close(ours["b"], theirs["b"])


def test_modes_switch_back_and_forth(pair):
    reference, fused, x = pair
    for training in (True, False, True, False):
        for module in (reference, fused):
            module.train(training)
        close(fused(x), reference(x))
    for ours, theirs in zip(fused.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(pair, reentrant):
    reference, fused, x = pair
    grads = []
    for module in (fused, reference):
        leaf = x.clone().requires_grad_()
        checkpoint(module, leaf, use_reentrant=reentrant).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_training_goes_on_behind_inference_mode(pair):
    """What inference mode cached must not get in the way of autograd."""
    reference, fused, x = pair
    frb.clear_caches()
    with torch.inference_mode():
        close(fused(x), reference(x))
    for requires_grad in (True, False):
        fused.requires_grad_(requires_grad), reference.requires_grad_(requires_grad)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        fused(ours).sum().backward()
        reference(theirs).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_model_made_in_inference_mode():
    with torch.inference_mode():
        reference = made()
        fused = frb.fuse(reference)
        x = torch.randn(2, 8, 5, 5)
        close(fused(x), reference(x))
        for module in (reference, fused):
            for p in module.parameters():
                p.mul_(1.5)  # no version counter records this
        close(fused(x), reference(x))


def test_the_copy_made_in_inference_mode_is_an_ordinary_model():
    """Of an inference tensor nothing tells when it changes: its folded weights would be made at every call."""
    reference = made()
    with torch.inference_mode():
        fused = frb.fuse(reference)
    assert not any(t.is_inference() for t in (*fused.parameters(), *fused.buffers()))


def test_threads(pair):
    from concurrent.futures import ThreadPoolExecutor

    _, fused, x = pair
    frb.clear_caches()
    with torch.no_grad():
        expected = fused(x)
        frb.clear_caches()

    def work(i: int) -> torch.Tensor:
        with torch.no_grad():
            return fused(x)

    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(work, range(32)))


def test_bottleneck_subclass_defined_later_is_fused():
    class Mine(Bottleneck):
        """torchvision users derive from the block and keep its forward."""

    block = randomize_norms(Mine(8, 2)).eval()
    fused = frb.fuse(block, strict=True)
    assert type(fused).__name__ == "FusedMine"
    assert isinstance(fused, Mine)
    x = torch.randn(1, 8, 4, 4)
    close(fused(x), block(x))


@pytest.mark.parametrize("fresh", [False, True], ids=["known size", "new size"])
def test_call_with_other_parameters_in_between(fresh):
    """What is bound while others' parameters are in place is not used once they are gone."""
    reference = made()
    fused = frb.fuse(reference)
    other = {name: t * 1.5 for name, t in reference.state_dict().items() if t.is_floating_point()}
    x, y = torch.randn(2, 8, 5, 5), torch.randn(3, 8, 5, 5)
    with torch.no_grad():
        fused(x)
        if not fresh:
            fused(y)
        close(torch.func.functional_call(fused, other, (y,)), torch.func.functional_call(reference, other, (y,)))
        close(fused(y), reference(y))
        close(fused(x), reference(x))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_feature_extractor_is_joined(pair, frozen, inplace):
    """It has no modules for its blocks: convolution, norm and ReLU in a row are one operation each.

    A copy of it comes in train mode, unless somebody sees to it.
    """
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    reference, _, x = pair
    theirs = extraction.create_feature_extractor(reference, {"0.bn1": "a", "2": "b"}).eval()
    ours = extraction.create_feature_extractor(copy.deepcopy(reference), {"0.bn1": "a", "2": "b"}).eval()
    ours = frb.fuse(ours, inplace=inplace, frozen=frozen)
    assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]
    assert str(ours.graph) == str(ours.eval_graph)
    assert ours.graph is ours.eval_graph
    parts = [part for part in frb.explain(ours).parts if part.fused and part.modules.startswith("Conv2d + ")]
    assert len(parts) >= 4
    with torch.no_grad():
        for _ in range(4):
            for name, y in ours(x).items():
                close(y, theirs(x)[name])
