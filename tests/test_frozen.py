"""`fuse(frozen=True)`: nothing is asked again, the network becomes one function, and what ends that does end it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from cases import BACKENDS, BF16, FP16, require
from parity import assert_parity
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import flat, watch
from fused_resblock.frozen import generation
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock, Bottleneck

CALLS = 4  # until a network is one function


class Network(nn.Module):
    """A ResNet of eight channels."""

    def __init__(self, block: type[nn.Module] = BasicBlock) -> None:
        super().__init__()
        wide = 8 * block.expansion
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        first = nn.Sequential(nn.Conv2d(8, wide, 1, bias=False), nn.BatchNorm2d(wide)) if wide > 8 else None
        second = nn.Sequential(nn.Conv2d(wide, 2 * wide, 1, 2, bias=False), nn.BatchNorm2d(2 * wide))
        self.layer1 = nn.Sequential(block(8, 8, downsample=first), block(wide, 8))
        self.layer2 = nn.Sequential(block(wide, 16, 2, second), block(2 * wide, 16))
        self.layer3 = nn.Sequential(block(2 * wide, 16))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * wide, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def network(block=BasicBlock, cls=Network) -> Network:
    torch.manual_seed(0)
    return randomize_norms(cls(block)).eval().to(memory_format=torch.channels_last)


def images(n: int = 2, size: int = 20, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def functions(model: nn.Module) -> list:
    """The functions that a network has become, one for each signature; None where it runs its own forward."""
    known = flat._flats.get(model)
    old = known is None or known.generation != generation()
    return [] if old else list(known.functions.values())


def run_in(model: nn.Module, x: Tensor) -> Tensor:
    """The last of several results, which are all the same."""
    with torch.no_grad():
        first = model(x)
        for _ in range(CALLS):
            y = model(x)
            assert torch.equal(y, first)
    return y


@pytest.fixture
def frozen() -> nn.Module:
    """A frozen network that has become a function."""
    model = frb.fuse(network(), frozen=True)
    run_in(model, images())
    assert functions(model) != [None]
    assert len(functions(model)) == 1
    return model


@pytest.fixture
def nobody_asks(monkeypatch):
    """Call it, and from then on a question whether something has changed fails the test."""

    def begin():
        monkeypatch.setattr(watch.Guard, "holds", lambda self: pytest.fail("it was asked"))

    return begin


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


def double_weights(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)


def other_state(model: nn.Module) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in state:
        if name.endswith("weight"):
            state[name] *= 1.5
    return state


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


def test_a_network_is_not_kept_alive(frozen):
    model = frb.fuse(network(), frozen=True)
    run_in(model, images())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Features(Network):
    """Gives a dictionary."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        fine = self.layer1(x)
        return {"fine": fine, "coarse": self.layer3(self.layer2(fine))}


class Viewed(Network):
    """Reads its pooled features twice, as networks did before there was `flatten`."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        x = self.avgpool(self.layer3(self.layer2(x)))
        return self.fc(x.view(x.size(0), -1))


class Twice(Network):
    """Runs a stage two times, the second time behind another one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(self.layer1(x) + x)
        return self.fc(torch.flatten(self.avgpool(self.layer3(self.layer2(x))), 1))


class Scaled(Network):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


class Counting(Network):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Asking(Network):
    """Does one thing with a tensor and another with what records its graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if isinstance(x, Tensor) else super().forward(x) + 1


class Failing(Network):
    """Raises where it is not called with a tensor of some size."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if isinstance(x, Tensor) else y.reshape(3, 5, 7)


class BySize(Network):
    """Its way depends on the image's size."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.shape[-1] > 20 else -y


class Noisy(Network):
    """Gives another result at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


@pytest.mark.parametrize("cls", [Features, Viewed, Twice, Scaled])
def test_networks_that_become_a_function(cls):
    reference = network(cls=cls)
    model = frb.fuse(reference, frozen=True)
    apart = frb.fuse(reference)
    for _ in range(CALLS):
        x, same = images(), images()
        with torch.no_grad():
            torch.testing.assert_close(model(x), apart(same), rtol=0, atol=0)
        assert torch.equal(x, same)
    (function,) = functions(model)
    assert function is not None


@pytest.mark.parametrize("cls", [Counting, Asking, Failing, BySize])
def test_networks_that_run_their_own_forward(cls):
    reference = network(cls=cls)
    model, apart = frb.fuse(reference, frozen=True), frb.fuse(reference)
    for size in (20, 28):
        run_in(model, images(size=size))
        with torch.no_grad():
            assert torch.equal(model(images(size=size)), apart(images(size=size)))
    assert not any(functions(model))
    if cls is Counting:
        assert model.calls == 2 * (CALLS + 2)


def test_random_numbers_stay_random():
    model = frb.fuse(network(cls=Noisy), frozen=True)
    with torch.no_grad():
        results = [model(images())[0, 0].item() for _ in range(CALLS + 2)]
    assert len(set(results)) == len(results)


@pytest.mark.parametrize("path", ["conv1", "relu", "layer1", "layer2.0", "layer3.0.conv1", "avgpool", "fc"])
def test_hooks_from_before_run(path):
    reference = network()
    reference.get_submodule(path).register_forward_hook(lambda m, args, y: y * 1.5)
    model = frb.fuse(reference, frozen=True)
    x = images()
    y = run_in(model, x)
    with torch.no_grad():
        torch.testing.assert_close(y, reference(x))
    assert functions(model) == [None]


def test_hooks_of_the_network_run(frozen):
    seen = []
    frozen.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    with torch.no_grad():
        frozen(images())
    assert len(seen) == 1


def test_keywords_and_other_inputs(frozen):
    x = images()
    y = run_in(frozen, x)
    with torch.no_grad():
        assert torch.equal(frozen(x=x), y)
        assert torch.equal(frozen(x.contiguous(memory_format=torch.channels_last)), y)
        assert frozen(x[:0]).shape == (0, 7)
        for bad in (x[:, :2], x[0, 0], x.double()):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                frozen(bad)
        assert torch.equal(frozen(x), y)


def test_gradients(frozen):
    x, reference = images(), network()
    frozen(x).sum().backward()
    reference(x).sum().backward()
    torch.testing.assert_close(frozen.conv1.weight.grad, reference.conv1.weight.grad, rtol=1e-3, atol=1e-3)


def test_compiled_and_exported(frozen):
    x = images()
    with torch.no_grad():
        expected = frozen(x)
        exported = torch.export.export(frozen, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        compiled = torch.compile(frozen, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


def test_threads():
    model = frb.fuse(network(), frozen=True)
    x = images()
    with torch.no_grad():
        expected = frb.fuse(network())(x)
    wrong: list[object] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(10):
                try:
                    wrong.extend(() if torch.equal(model(x), expected) else ["another result"])
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_blocks_and_stages_alone(nobody_asks):
    block = frb.fuse(randomize_norms(BasicBlock(8, 8)).eval(), frozen=True)
    stage = frb.fuse(nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)).eval(), frozen=True)
    x = torch.randn(1, 8, 6, 6)
    results = run_in(block, x), run_in(stage, x)
    nobody_asks()
    with torch.no_grad():
        assert torch.equal(block(x), results[0])
        assert torch.equal(stage(x), results[1])


def test_more_signatures_than_are_kept(monkeypatch):
    monkeypatch.setattr(flat._Flat, "LIMIT", 2)
    model = frb.fuse(network(), frozen=True)
    for n in (1, 2, 3, 1):
        run_in(model, images(n))
    assert 0 < len(functions(model)) <= 2


@pytest.mark.parametrize("value", [1, "yes", None])
def test_frozen_must_be_a_bool(value):
    with pytest.raises(TypeError, match="frozen must be True or False, got"):
        frb.fuse(network(), frozen=value)


def test_explained(frozen):
    (part,) = [p for p in frb.explain(frozen).parts if p.modules == "the network"]
    assert part == ("", "the network", True, "frozen: one function, nothing is asked again")
    frozen.train()
    (part,) = [p for p in frb.explain(frozen).parts if p.modules == "the network"]
    assert part == ("", "the network", False, "frozen, but in train mode")
    assert not [p for p in frb.explain(frb.fuse(network())).parts if p.modules == "the network"]
