"""Models that are changed, fused and explained while other threads use them."""

from __future__ import annotations

import threading

import pytest
import torch
from frozen_networks import CALLS, images, network
from torch import fx, nn

import fused_resblock as frb
from fused_resblock import chain, programs, stem, watch
from fused_resblock.backends.folding import TensorCache
from fused_resblock.reference import BasicBlock
from fused_resblock.tracing import graph_of


def in_thread(work) -> None:
    """Run something in another thread, with its error here."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def other_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t * 1.5 if t.is_floating_point() else t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("module", "name"), [(programs, "bind"), (stem, "_bind")])
def test_weights_that_change_while_a_program_is_bound(module, name, frozen, monkeypatch):
    model, x = frb.fuse(network(), frozen=frozen, stages=module is programs), images()
    bind, changes, other = getattr(module, name), [0], other_state(model)

    def changing(*args, **kwargs):
        bound = bind(*args, **kwargs)
        if not changes[0]:
            changes[0] += 1
            in_thread(lambda: model.load_state_dict(other))
        return bound

    monkeypatch.setattr(module, name, changing)
    with torch.no_grad():
        model(x)
        assert changes == [1]
        model(x)
        torch.testing.assert_close(model(x), frb.unfuse(frb.fuse(model))(x), rtol=1e-4, atol=1e-4)


def test_tensors_that_change_while_something_is_computed_of_them():
    cache, t = TensorCache(), torch.ones(8)

    def compute() -> torch.Tensor:
        value = t.clone()
        t.data.add_(1)
        return value

    for expected in (1, 2, 3):
        assert cache.get((t,), (), compute)[0] == expected


def test_states_that_are_loaded_beside_a_forward(monkeypatch):
    """A forward between the network's own entry and those of its blocks must not be the last that asks."""
    model, x = frb.fuse(network(), frozen=True, heads=False), images()
    with torch.no_grad():
        for _ in range(CALLS):
            model(x)
        other = other_state(model)
        load, runs = nn.Conv2d._load_from_state_dict, [0]

        def beside(self, *args):
            if self is model.layer3[0].conv2:  # the last one that is fused
                runs[0] += 1
                model(x)
            return load(self, *args)

        monkeypatch.setattr(nn.Conv2d, "_load_from_state_dict", beside)
        model.load_state_dict(other)
        assert runs == [1]
        torch.testing.assert_close(model(x), frb.unfuse(frb.fuse(model))(x), rtol=1e-4, atol=1e-4)


class Around(nn.Module):
    """Uses other models in another thread while its forward is recorded."""

    def __init__(self, work) -> None:
        super().__init__()
        self.conv, self.work = nn.Conv2d(3, 3, 1), work

    def forward(self, x):
        in_thread(self.work)
        return self.conv(x)


def test_other_threads_run_while_one_traces():
    plain, model, x = network(), frb.fuse(network()), images()
    with torch.no_grad():
        expected = plain(x), model(x)
    found = []

    def work() -> None:
        with torch.no_grad():
            found.extend([plain(x), model(x), network().fc.weight])

    graph = graph_of(Around(work), training=False)
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not isinstance(found[2], fx.Proxy)


def test_one_traces_after_the_other():
    """Else the call of every module would stay what the first one had put in its place."""
    call = nn.Module.__call__
    entered, leave, other = threading.Event(), threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x):
            entered.set()
            assert leave.wait(10)
            return x

    first = threading.Thread(target=lambda: graph_of(Slow(), training=False))
    second = threading.Thread(target=lambda: (graph_of(nn.ReLU6(), training=False), other.set()))
    first.start()
    assert entered.wait(10)
    second.start()
    assert not other.wait(0.2)
    leave.set()
    first.join()
    second.join()
    assert other.is_set()
    assert nn.Module.__call__ is call


def test_what_is_traced_stays_as_it_is():
    model = network().train()
    seen = []

    class Block(BasicBlock):
        def forward(self, x):
            seen.append({m.training for m in model.modules()})
            return super().forward(x)

    model.layer1[0].__class__ = Block
    frb.fuse(model, inplace=True)
    assert seen
    assert all(modes == {True} for modes in seen)
    assert chain.bind is programs.bind


def test_a_block_that_gets_its_programs_while_another_thread_looks_at_it(monkeypatch):
    """What is kept of a module lies in its own dictionary, which a walk over it then finds changed."""
    fused, x = frb.fuse(nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)).eval()), torch.randn(1, 8, 9, 9)
    is_kept, asked = watch.is_kept, []

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return fused(x)

    def slow(value: object) -> bool:
        asked.append(value)
        if len(asked) == 1:
            in_thread(forward)
        return is_kept(value)

    monkeypatch.setattr(watch, "is_kept", slow)
    assert torch.equal(forward(), forward())
    assert asked
