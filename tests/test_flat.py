"""A frozen network as one function: which networks become one, and what that must not change."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from frozen_networks import CALLS, Network, frozen, functions, images, network, run_in
from torch import Tensor

import fused_resblock as frb
from fused_resblock import flat


def test_a_network_is_not_kept_alive(frozen):
    model = frb.fuse(network(), frozen=True)
    run_in(model, images())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_nan_in_the_first_images_keeps_no_network_from_becoming_one_function(frozen):
    model, x = frb.fuse(network(), frozen=True), images()
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        for _ in range(CALLS):
            model(x)
    assert functions(model)
    assert None not in functions(model)


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
        return super().forward(x) if type(x) is Tensor else super().forward(x) + 1


class Failing(Network):
    """Raises where it is not called with a tensor of some size."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if type(x) is Tensor else y.reshape(3, 5, 7)


class Odd(Network):
    """Does another thing with a tensor of an odd batch, and with what records its graph."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if type(x) is Tensor and len(x) % 2 else y


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


def said(model: Network) -> tuple[bool, str]:
    """What `explain` says of the network as one function."""
    (part,) = [part for part in frb.explain(model).parts if part.modules == "the network"]
    return part.fused, part.reason


def test_explain_tells_when_it_is_a_function():
    model = frb.fuse(network(), frozen=True)
    assert said(model) == (False, "frozen: one function from about the fourth call on")
    run_in(model, images())
    assert said(model) == (True, "frozen: one function, nothing is asked again")
    assert said(model.train()) == (False, "frozen: in train mode")
    assert not said(model.eval())[0]


def test_a_network_of_which_nothing_is_fused_stops_learning(monkeypatch):
    model = frb.fuse(network(), frozen=True, filter_fn=lambda name, module: False)
    recorded = []
    recording = flat._tape.recording
    monkeypatch.setattr(flat._tape, "recording", lambda: recorded.append(1) or recording())
    run_in(model, images())
    assert len(recorded) == 3
    assert said(model) == (False, "frozen: its own forward: nothing in it runs fused")


@pytest.mark.parametrize(("cls", "reason"), [(Asking, "another result"), (Failing, "fails: RuntimeError")])
def test_explain_tells_why_it_runs_its_own_forward(cls, reason):
    model = frb.fuse(network(cls=cls), frozen=True)
    run_in(model, images())
    assert not said(model)[0]
    assert said(model)[1].startswith("frozen: its own forward: ")
    assert reason in said(model)[1]


def test_explain_tells_which_inputs_run_the_own_forward():
    model = frb.fuse(network(cls=Odd), frozen=True)
    run_in(model, images(2))
    run_in(model, images(1))
    fused, reason = said(model)
    assert fused
    assert "for 1 of 2 kinds of input" in reason


def test_a_copy_has_no_graph():
    model = copy.deepcopy(frb.fuse(network(), frozen=True))
    run_in(model, images())
    assert said(model) == (False, "frozen: its own forward: its graph is not known until it is fused again")
    frb.fuse(model, frozen=True, inplace=True)
    run_in(model, images())
    assert said(model)[0]


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


def test_more_signatures_than_are_kept(monkeypatch):
    monkeypatch.setattr(flat._Flat, "LIMIT", 2)
    model = frb.fuse(network(), frozen=True)
    for n in (1, 2, 3, 1):
        run_in(model, images(n))
    assert 0 < len(functions(model)) <= 2


class Drawing(Network):
    """Monte Carlo dropout: drops features in eval mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(super().forward(x), 0.5, training=True)


def test_what_is_drawn_while_learning_is_put_back():
    reference = network(cls=Drawing)
    model, x = frb.fuse(reference, frozen=True), images()
    results = []
    for module in (reference, model):
        torch.manual_seed(5)
        with torch.no_grad():
            results.append([module(x) for _ in range(2 * CALLS)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
