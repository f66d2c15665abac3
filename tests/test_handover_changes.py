"""What is done to a chain, or to the next one, after it has computed that one's head: the results are the reference's."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from chains import first, identity
from handover_cases import Body, Counted, X, agree, body
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import handover
from fused_resblock import stage as stages
from fused_resblock.models import randomize_norms
from fused_resblock.program import Program
from fused_resblock.programs import Programs

WAITING = {
    "weights": lambda b: b.conv1.weight.mul_(2),
    "weights replaced": lambda b: setattr(b.conv1, "weight", nn.Parameter(b.conv1.weight * 3)),
    "weights of other memory": lambda b: setattr(b.conv1.weight, "data", b.conv1.weight.data * 3),
    "eps": lambda b: setattr(b.bn1, "eps", 0.5),
    "statistics": lambda b: b.bn1.running_mean.add_(1),
    "checkpoint": lambda b: b.load_state_dict({key: value * 2 for key, value in b.state_dict().items()}),
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in WAITING.items()])
def test_a_head_that_waited_while_its_weights_changed(change, monkeypatch):
    """The call behind the change is bound anew without it, and so is none of those behind that."""
    reference, fused = body()
    counted = Counted(monkeypatch)
    with torch.no_grad():
        y = fused.layer1(X)
        for module in (fused, reference):
            change(module.layer2[0])
        expected = reference.layer2(reference.layer1(X))
        for _ in range(3):
            agree(fused.layer2(y), expected)
    assert counted.taken == 0


def test_a_head_that_waited_while_another_thread_bound_both_chains_again(monkeypatch):
    reference, fused = body()
    counted = Counted(monkeypatch)
    with torch.no_grad():
        y = fused.layer1(X)
        for module in (fused, reference):
            module.layer2[0].conv1.weight.mul_(2)

        def forward() -> None:
            with torch.no_grad():
                fused(X)

        other = threading.Thread(target=forward)
        other.start()
        other.join()
        agree(fused.layer2(y), reference.layer2(reference.layer1(X)))
    assert counted.taken == 0


def test_training_the_next_chain_ends_it(monkeypatch):
    """A frozen chain is not bound again at every step of what comes behind it."""
    monkeypatch.setattr(handover, "PATIENCE", 3)
    _, fused = body()
    bound, bind = [], stages.FusedStage._bind
    monkeypatch.setattr(stages.FusedStage, "_bind", lambda self, x: bound.append(self) or bind(self, x))
    for _ in range(8):
        with torch.no_grad():
            fused.layer2[0].conv1.weight.mul_(1.01)
            fused.layer1(X)
    assert 0 < len(bound) <= 4


CHANGES = {
    "weights": lambda m: m.layer2[0].conv1.weight.data.mul_(2),
    "weights replaced": lambda m: setattr(m.layer2[0].conv1, "weight", nn.Parameter(m.layer2[0].conv1.weight * 3)),
    "statistics": lambda m: m.layer2[0].bn1.running_mean.add_(1),
    "statistics of another norm": lambda m: m.layer2[0].bn2.running_mean.add_(1),
    "eps": lambda m: setattr(m.layer2[0].bn1, "eps", 0.5),
    "hook on the block": lambda m: m.layer2[0].register_forward_hook(lambda b, a, y: y * 2),
    "hook on its convolution": lambda m: m.layer2[0].conv1.register_forward_hook(lambda b, a, y: y * 2),
    "pre-hook on the chain": lambda m: m.layer2.register_forward_pre_hook(lambda b, a: (a[0] * 2,)),
    "hook on the chain before": lambda m: m.layer1.register_forward_hook(lambda b, a, y: y.mul_(2)),
    "block replaced by a fused one": lambda m: m.layer2.__setitem__(
        0, frb.fuse(randomize_norms(first(64), seed=5).eval(), backend="triton")
    ),
    "block replaced": lambda m: m.layer2.__setitem__(0, randomize_norms(first(64), seed=5).eval()),
    "convolution replaced": lambda m: setattr(m.layer2[0], "conv1", nn.Conv2d(64, 16, 1).requires_grad_(False)),
    "train mode": lambda m: m.layer2.train(),
    "forward overridden": lambda m: setattr(m.layer2, "forward", lambda x: x * 3),
    "chain replaced": lambda m: setattr(
        m, "layer2", randomize_norms(nn.Sequential(first(64), identity()), seed=7).eval()
    ),
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_change_of_the_next_chain(change):
    reference, fused = body()
    results = []
    with torch.no_grad():
        for module in (fused, reference):
            torch.manual_seed(3)
            change(module)
            results.append([module(X), module(X)])
    for ours, theirs in zip(*results, strict=True):
        agree(ours, theirs)


def test_weights_that_autocast_had_copied(monkeypatch):
    reference, fused = body()
    counted = Counted(monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fused(X), fused(X)
        for module in (fused, reference):
            module.layer2[0].conv1.weight.mul_(4)
        fused(X)
        torch.testing.assert_close(fused(X), reference(X), rtol=0.1, atol=0.1)
    assert counted.taken > 0


def test_change_between_the_two_chains():
    reference, fused = body()
    for module in (reference, fused):

        def change(y: Tensor, module: Body = module) -> Tensor:
            module.layer2[0].conv1.weight.mul_(1.5)
            return y

        module.between = change
    with torch.no_grad():
        agree(fused(X), reference(X))
        agree(fused(X), reference(X))


def test_a_hook_that_came_and_went(monkeypatch):
    """While layer2 cannot run as a chain nothing is computed ahead; a later change of its norm is seen."""
    reference, fused = body()
    with torch.no_grad():
        handle = fused.layer2[0].register_forward_hook(lambda m, a, y: y)
        agree(fused(X), reference(X))
        handle.remove()
        small = X[:1]
        for _ in range(2):
            agree(fused(small), reference(small))
        for module in (fused, reference):
            module.layer2[0].bn1.eps = 0.5
        for x in (small, small, X):
            agree(fused(x), reference(x))


def test_the_next_chain_goes_away():
    reference, fused = body()
    with torch.no_grad():
        fused.layer2 = nn.Identity()
        gc.collect()
        assert handover.following(fused.layer1) is None
        agree(fused.layer1(X), reference.layer1(X))
    (program,) = stages._programs[fused.layer1]
    assert program.ends.ahead is None


def test_other_backend_of_the_next_chain(monkeypatch):
    reference, fused = body()
    counted = Counted(monkeypatch)
    with torch.no_grad():
        frb.fuse(fused.layer2, backend="eager", inplace=True)
        for _ in range(2):
            agree(fused(X), reference(X))
    assert counted.taken == 0


def beside(work) -> None:
    """Run something in another thread, without gradients."""

    @torch.no_grad()
    def forward() -> None:
        work()

    other = threading.Thread(target=forward)
    other.start()
    other.join()


def edit(reference: nn.Module, fused: nn.Module) -> None:
    for module in (fused, reference):
        module.layer2[0].conv1.weight.mul_(3)
        module.layer2[0].bn1.bias.add_(1)


def test_a_program_with_a_head_is_kept_under_a_guard_that_knows_the_next_chain(monkeypatch):
    """Though another thread binds one without a head in the midst of it: an image that no tail takes."""
    reference, fused = body()
    keep, times = Programs.keep, []
    single = X[:1, :, :1, :1].contiguous()

    def slow(self, x: Tensor, program: Program, *args: object, **kwargs: object) -> None:
        times.append(program.ends.ahead is not None)
        if times.count(True) == 1 and times[-1]:
            beside(lambda: fused.layer1(single))
        keep(self, x, program, *args, **kwargs)

    frb.clear_caches()
    with torch.no_grad():
        monkeypatch.setattr(Programs, "keep", slow)
        fused(X)
        fused(X)
        monkeypatch.undo()
        assert True in times
        agree(fused(X), reference(X))
        edit(reference, fused)
        for _ in range(3):
            agree(fused(X), reference(X))


def test_a_head_of_weights_that_change_while_it_is_computed(monkeypatch):
    """And which the next chain has been bound to anew before the head is left for it."""
    reference, fused = body()
    run, changed = Program.run, []

    def slow(self, x: list[Tensor], head: list[Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        y, ahead = run(self, x, head)
        if ahead is not None and not changed:
            changed.append(y)
            edit(reference, fused)
            beside(lambda: fused.layer2(y))
        return y, ahead

    with torch.no_grad():
        fused(X)
        monkeypatch.setattr(Program, "run", slow)
        agree(fused(X), reference(X))
    assert changed


def test_a_chain_in_the_place_of_the_next_one_is_learnt(monkeypatch):
    reference, fused = body()
    with torch.no_grad():
        fused(X)
        new = randomize_norms(nn.Sequential(first(64), identity())).eval()
        reference.layer2, fused.layer2 = new, frb.fuse(new, backend="triton", stages="kernel")
        gc.collect()
        assert "head" not in frb.explain(fused).parts[0].reason
        counted = Counted(monkeypatch)
        for _ in range(4):
            agree(fused(X), reference(X))
    assert counted.taken > 0
