"""Chains of blocks that wait for whoever reads the last one: which do, and what dies early by it."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from waiting_networks import Network, both, count, equal, images, stage, usual

import fused_resblock as frb
from fused_resblock import handover, pending, waiting
from fused_resblock.reference import BasicBlock
from fused_resblock.waiting import PendingChain


@pytest.fixture(autouse=True)
def _even_small_ones(monkeypatch):
    monkeypatch.setattr(waiting, "WORTH", 0)


def test_chains_wait(monkeypatch):
    _, fused = both()
    made = count(monkeypatch)
    with torch.no_grad():
        fused(images())
    assert made == [fused.layer1, fused.layer2, fused.layer3]


def test_an_input_dies_when_it_was_read_for_the_last_time(monkeypatch):
    """The chain before has nothing any more when the second block of the next one runs."""
    _, fused = both()
    inputs, alive = [], []
    run = handover.run

    def spied(stage, program, x):
        inputs.append(weakref.ref(x[0]))
        *first, last = program._operations
        seen = inputs[-1]
        watched = last._replace(run=lambda a, b: (alive.append(seen() is not None), last.run(a, b))[1])
        monkeypatch.setattr(program, "_operations", [*first, watched])
        return run(stage, program, x)

    monkeypatch.setattr(handover, "run", spied)
    with torch.no_grad():
        fused(images())
    assert alive == [False, False, False]


def peak(call) -> int:
    """The most bytes that a call holds at once, besides what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most


def test_a_forward_takes_less_memory(monkeypatch):
    """A second block that takes the most runs without the first one's input; in a frozen network of any size."""
    network = Network(usual)
    shortcut = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32))
    network.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 32, 1, shortcut))
    network.layer2 = stage(32, 16, 2)
    network.eval()
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    used = {}
    for name, least, frozen in (("at once", 1 << 40, False), ("waiting", 0, False), ("frozen", 1 << 40, True)):
        monkeypatch.setattr(waiting, "WORTH", least)
        fused = frb.fuse(network, frozen=frozen)
        with torch.no_grad():
            for _ in range(5):
                fused(x)
            used[name] = peak(lambda fused=fused: fused(x))
    assert used["waiting"] <= used["at once"] - 4 * 8 * 16 * 16 * 4
    assert used["frozen"] <= used["waiting"]


def test_small_inputs_do_not_wait(monkeypatch):
    monkeypatch.setattr(waiting, "WORTH", 2 * 8 * 8 * 8 * 4 + 1)
    _, fused = both()
    made = count(monkeypatch)
    with torch.no_grad():
        fused(images())
        assert made == []
        monkeypatch.setattr(waiting, "WORTH", 2 * 8 * 8 * 8 * 4)
        fused(images())
    assert made == [fused.layer1, fused.layer2, fused.layer3]


def test_outside_of_the_network_nothing_waits():
    _, fused = both()
    with torch.no_grad():
        x = fused.stem(images())
        for module in (fused.layer1, fused.layer2, fused.layer3):
            x = module(x)
            assert type(x) is Tensor
    assert not pending.allowed()


@pytest.mark.parametrize("where", ["layer1", "layer2", "everywhere"])
def test_hooks_see_values(where):
    """A chain with hooks does not wait, and nothing does for a pool with hooks."""
    reference, fused = both()
    seen: list[list[Tensor]] = []
    for network in (reference, fused):
        found: list[Tensor] = []
        seen.append(found)

        def hook(module, args, y, network=network, found=found):
            if module is getattr(network, "layer1" if where == "everywhere" else where):
                assert type(y) is Tensor
                found.append(y.clone())

        if where == "everywhere":
            handle = nn.modules.module.register_module_forward_hook(hook)
        else:
            handle = getattr(network, where).register_forward_hook(hook)
        with handle if where == "everywhere" else nullcontext(), torch.no_grad():
            network(images())
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    assert len(seen[1]) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_who_looks_at_the_pool_s_input_sees_values(monkeypatch, compiled):
    _, fused = both()
    seen: list[Tensor] = []
    if compiled:
        fused.pool.compile(backend=lambda graph, inputs: graph)
    else:
        fused.pool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    made = count(monkeypatch)
    with torch.no_grad():
        fused(images())
    assert made == []
    assert [type(x) for x in seen] == [Tensor] * (not compiled)


def test_what_leaves_the_network_is_computed():
    kept: list[Tensor] = []

    def use(net: Network, x: Tensor) -> Tensor:
        kept[:] = [net.layer1(net.stem(x))]
        return net.layer2(kept[0])

    reference, fused = both(use)
    with torch.no_grad():
        reference(images())
        theirs = kept[0]
        assert type(fused(images())) is Tensor
        assert isinstance(kept[0], PendingChain)
        assert type(kept[0].computed) is Tensor
        torch.testing.assert_close(kept[0] + 0, theirs, rtol=1e-4, atol=1e-4)


def test_input_changed_before_the_output_was_used():
    def use(net: Network, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = net.layer1(x)
        x.mul_(2)
        return net.layer2(y)

    _, fused = both(use)
    with torch.no_grad(), pytest.raises(RuntimeError, match="must stay as it is until its output has been used, got a"):
        fused(images())
    assert not pending.allowed()


def test_an_error_within_is_raised_where_values_are_asked_for(monkeypatch):
    """And again whenever they are asked for: what the chain began with is gone."""
    errors = []

    def use(net: Network, x: Tensor) -> Tensor:
        y = net.layer2(net.layer1(net.stem(x)))
        for _ in range(2):
            with pytest.raises(RuntimeError) as error:
                y.sum()
            errors.append(str(error.value))
        return x

    _, fused = both(use)

    def failing(*args):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(handover, "run", failing)
    with torch.no_grad(), pytest.raises(RuntimeError, match="got an error while it was used"):
        fused(images())
    assert errors[0] == "no memory left"
    assert "got an error while it was used" in errors[1]
    assert not pending.allowed()


def test_weights_change_between_two_forwards():
    reference, fused = both()
    with torch.no_grad():
        for network in (reference, fused):
            network.layer2[1].conv1.weight.mul_(1.5)
            network.layer1[0].bn1.running_mean.add_(0.5)
        equal(fused(images()), reference(images()), rtol=1e-4, atol=1e-4)


def test_a_chain_in_train_mode_behind_one_that_waits():
    reference, fused = both()
    for network in (reference, fused):
        network.layer2.train()
    with torch.no_grad():
        equal(fused(images()), reference(images()), rtol=1e-4, atol=1e-4)
    equal(fused.layer2.state_dict(), reference.layer2.state_dict(), rtol=1e-4, atol=1e-4)


def test_results_are_of_the_mode_of_the_call():
    def use(net: Network, x: Tensor) -> Tensor:
        y = net.layer1(net.stem(x))
        with torch.inference_mode():
            y.sum()
        return y

    _, fused = both(use)
    with torch.no_grad():
        assert not fused(images()).is_inference()
    with torch.inference_mode():
        assert fused(images()).is_inference()


def test_unfuse_forgets_it():
    _, fused = both()
    assert fused._fused_lines
    frb.unfuse(fused)
    assert not [name for module in fused.modules() for name in module.__dict__ if name.startswith("_fused_")]


def test_nothing_outlives_a_forward():
    _, fused = both()
    with torch.no_grad():
        y = weakref.ref(fused(images()))
    gc.collect()
    assert y() is None
    assert not [o for o in gc.get_objects() if isinstance(o, PendingChain)]


class Stream:
    """Stands for a CUDA stream, and notes what waits for what."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_work_stays_on_the_stream_on_which_it_was_asked_for(monkeypatch):
    log: list[str] = []
    one, two = Stream(log, "one"), Stream(log, "two")
    current = [one]
    monkeypatch.setattr(pending, "_stream", lambda device: current[0])

    class on:  # noqa: N801  # as torch names it
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            log.append(f"on {self.stream.name}")

        def __exit__(self, *error: object) -> None:
            log.append("end")

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Tensor, "record_stream", lambda y, stream: log.append(f"used on {stream.name}"))

    def use(net: Network, x: Tensor) -> Tensor:
        y = net.layer2(net.layer1(net.stem(x)))
        current[0] = two
        return y + 0

    reference, fused = both(use)
    with torch.no_grad():
        y = fused(images())
        assert log == ["on one", "end", "two waits for one", "used on two"]
        current[0] = one
        equal(y, reference(images()), rtol=1e-4, atol=1e-4)
