"""`fuse(frozen=True)`: nothing is asked again, and what ends that does end it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import BACKENDS, BF16, FP16, require
from frozen_networks import CALLS, double_weights, frozen, functions, images, network, nobody_asks, other_state, run_in
from parity import assert_parity
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.frozen import generation
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock, Bottleneck


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_parity(block, backend):
    require(backend)
    reference = network(block)
    model = frb.fuse(reference, backend=backend, frozen=True, strict=True)
    apart = frb.fuse(reference, backend=backend)
    inputs = [images(1, 8)] if backend == "triton" else [images(), images(1, 28), images(seed=2)]
    for x in inputs:
        y = run_in(model, x)
        with torch.no_grad():
            assert torch.equal(y, apart(x))
            assert_parity(y, reference(x), copy.deepcopy(reference).double()(x.double()), what="logits", floor=1e-5)
    assert len(functions(model)) == min(len(inputs), 2)
    assert None not in functions(model)


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_sixteen_bits_and_autocast(dtype, nobody_asks):
    require("onednn", dtype)
    reference = network()
    model, apart = frb.fuse(reference, frozen=True), frb.fuse(reference)
    with torch.autocast("cpu", dtype):
        assert torch.equal(run_in(model, images()), run_in(apart, images()))
    model.to(dtype), apart.to(dtype)
    x = images().to(dtype)
    expected = run_in(apart, x)
    assert torch.equal(run_in(model, x), expected)
    (function,) = functions(model)
    assert function is not None
    nobody_asks()
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_nothing_is_asked(frozen, nobody_asks, monkeypatch):
    nobody_asks()
    monkeypatch.setattr(type(frozen.layer1), "forward", lambda self, x: pytest.fail("it was called"))
    with torch.no_grad():
        frozen(images(seed=3))


def test_without_the_promise_everything_is(nobody_asks):
    model = frb.fuse(network())
    run_in(model, images())
    nobody_asks()
    with torch.no_grad(), pytest.raises(pytest.fail.Exception, match="it was asked"):
        model(images())


def train_step(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model(images()).square().mean().backward()
    optimiser.step()
    optimiser.zero_grad()


def train_step_in_train_mode(model: nn.Module) -> None:
    model.train()
    train_step(model)
    model.eval()


def statistics(model: nn.Module) -> None:
    model.train()
    with torch.no_grad():
        model(images() * 3)
    model.eval()


def edit_between_modes(model: nn.Module) -> None:
    model.train()
    double_weights(model.layer2)
    model.eval()


def new_classifier(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.fc = nn.Linear(model.fc.in_features, 3)


def new_convolution(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.layer1[0].conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)


def new_weight_of_the_stem(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.conv1.weight = nn.Parameter(torch.randn(8, 3, 7, 7) / 7)


NOTICED = {
    "load_state_dict": lambda m: m.load_state_dict(other_state(m)),
    "load_state_dict assigns": lambda m: m.load_state_dict(other_state(m), assign=True),
    "load_state_dict of a stage": lambda m: m.layer3.load_state_dict(other_state(m.layer3)),
    "load_state_dict of a block": lambda m: m.layer2[1].load_state_dict(other_state(m.layer2[1])),
    "load_state_dict of the stem": lambda m: m.conv1.load_state_dict(other_state(m.conv1)),
    "load_state_dict of the classifier": lambda m: m.fc.load_state_dict(other_state(m.fc)),
    "through bf16": lambda m: m.bfloat16().float(),
    "a stage through bf16": lambda m: m.layer2.bfloat16().float(),
    "a step": train_step,
    "a step in train mode": train_step_in_train_mode,
    "statistics": statistics,
    "edit between modes": edit_between_modes,
    "new classifier": new_classifier,
    "new convolution": new_convolution,
    "new weight of the stem": new_weight_of_the_stem,
}


@pytest.mark.parametrize("change", [pytest.param(c, id=name) for name, c in NOTICED.items()])
def test_what_ends_the_promise(change):
    reference = network()
    model = frb.fuse(reference, frozen=True)
    before = run_in(model, images())
    change(model)
    change(reference)
    model.eval(), reference.eval()
    x = images()
    with torch.no_grad():
        exact = copy.deepcopy(reference).double()(x.double())
        assert before.shape != exact.shape or not torch.allclose(before.double(), exact, rtol=1e-4, atol=1e-4)
        for _ in range(CALLS):
            assert_parity(model(x), reference(x), exact, what="logits", floor=1e-5)
    assert len(functions(model)) == 1


def test_other_edits_do_not_until_it_is_fused_again(frozen):
    before = run_in(frozen, images())
    double_weights(frozen.layer1)
    assert torch.equal(run_in(frozen, images()), before)
    frb.fuse(frozen, inplace=True, frozen=True)
    assert not torch.equal(run_in(frozen, images()), before)


def test_the_promise_is_given_back(frozen):
    x = images()
    before = run_in(frozen, x)
    frb.fuse(frozen, inplace=True)
    assert functions(frozen) == []
    double_weights(frozen.layer1)
    assert not torch.equal(run_in(frozen, x), before)
    assert functions(frozen) == []


def test_unfuse(frozen):
    x = images()
    expected = run_in(frozen, x)
    plain = frb.unfuse(frozen)
    assert not any("_fused_frozen" in m.__dict__ for m in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(plain(x), expected)


def test_in_train_mode_everything_is_asked(frozen):
    x = images()
    expected = run_in(frozen, x)
    frozen.train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert torch.equal(run_in(frozen, x), expected)
    double_weights(frozen.layer1)
    assert not torch.equal(run_in(frozen, x), expected)


def test_eval_again_keeps_the_function(frozen):
    (function,) = functions(frozen)
    frozen.eval()
    assert functions(frozen) == [function]
    frozen.train()
    assert functions(frozen) == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_frozen_too(frozen, duplicate):
    expected = run_in(frozen, images())
    other = duplicate(frozen)
    assert torch.equal(run_in(other, images()), expected)
    assert functions(other) == [None]  # only `fuse` knows the graph
    assert torch.equal(run_in(frb.fuse(other, inplace=True, frozen=True), images()), expected)
    assert None not in functions(other)
    other.load_state_dict(other_state(other))
    assert not torch.equal(run_in(other, images()), expected)
    assert torch.equal(run_in(frozen, images()), expected)


def test_saved_state_is_that_of_the_reference(frozen):
    file = io.BytesIO()
    torch.save(frozen.state_dict(), file)
    file.seek(0)
    network().load_state_dict(torch.load(file))


def test_gradients(frozen):
    x, reference = images(), network()
    frozen(x).sum().backward()
    reference(x).sum().backward()
    torch.testing.assert_close(frozen.conv1.weight.grad, reference.conv1.weight.grad, rtol=1e-3, atol=1e-3)


def test_blocks_and_stages_alone(nobody_asks):
    block = frb.fuse(randomize_norms(BasicBlock(8, 8)).eval(), frozen=True)
    stage = frb.fuse(nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)).eval(), frozen=True)
    x = torch.randn(1, 8, 6, 6)
    results = run_in(block, x), run_in(stage, x)
    nobody_asks()
    with torch.no_grad():
        assert torch.equal(block(x), results[0])
        assert torch.equal(stage(x), results[1])


@pytest.mark.parametrize("value", [1, "yes", None])
def test_frozen_must_be_a_bool(value):
    with pytest.raises(TypeError, match="frozen must be True or False, got"):
        frb.fuse(network(), frozen=value)


def test_explained(frozen):
    run_in(frozen, images())
    before = generation()
    explained = frb.explain(frozen)
    assert generation() == before
    assert [part.reason for part in explained.parts if part.modules == "2 blocks"] == ["one chain; frozen"] * 2
    assert all(report.reason.endswith("; frozen") for report in explained)
    assert "; frozen" not in str(frb.explain(frozen.train()))
    assert "frozen" not in str(frb.explain(frb.fuse(network())))


def test_an_edit_before_the_promise():
    """Programs that were bound before it have not been asked since."""
    reference = network()
    fused, x = frb.fuse(reference), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        fused(x)
        for model in (reference, fused):
            for weight in (model.conv1.weight, model.layer1[0].conv1.weight, model.layer1[1].bn2.weight):
                weight.mul_(1.7)
        frb.fuse(fused, inplace=True, frozen=True)
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


def test_a_forward_that_makes_a_tensor_of_numbers():
    class Normalises(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward((x - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)) / 0.2)

    model = frb.fuse(Normalises(nn.Conv2d(3, 8, 1), BasicBlock(8, 8)).eval(), frozen=True)
    run_in(model, images())
    (part,) = (part for part in frb.explain(model).parts if part.modules == "the network")
    assert part.reason == "frozen: its own forward: its forward makes a tensor of numbers"


class Scaling(frb.FusedBasicBlock):
    """Does more than its block, so that it stays a module of the network's function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.0


def test_a_block_within_a_forward_of_its_own_ends_no_promise():
    model = frb.fuse(network(Scaling), frozen=True)
    run_in(model, images())
    before = generation()
    run_in(model, images())
    assert generation() == before
