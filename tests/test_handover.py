"""Chains of bottlenecks whose last kernel computes the next chain's first convolution: when, when not, same results."""

from __future__ import annotations

import copy
import threading
import weakref

import pytest
import torch
from cases import BF16, FP16, FP32, require
from chains import merged
from handover_cases import Body, Counted, X, agree, body
from parity import assert_parity
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import handover
from fused_resblock import stage as stages
from fused_resblock.backends import asked, tuned
from fused_resblock.kernels.tables import StageEntry
from fused_resblock.kernels.tiles import StageTile
from fused_resblock.models import randomize_norms
from fused_resblock.program import Operation, Program
from fused_resblock.reference import BasicBlock


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (FP32, FP16, BF16)])
def test_parity(dtype, mode, monkeypatch):
    reference, fused = body(dtype=dtype, chains=3)
    counted = Counted(monkeypatch)
    x = X.to(dtype)
    with mode():
        y = fused(x)
        assert torch.equal(fused(x), y)
        slack = 8.0 if dtype == BF16 else 2.0  # the interpreter truncates to bf16 where a GPU rounds
        assert_parity(y, reference(x), copy.deepcopy(reference).double()(x.double()), what="y", floor=1e-6, slack=slack)
    assert counted.taken == 4, "two heads a forward"
    assert [merged(layer) for layer in (fused.layer1, fused.layer2, fused.layer3)] == [2, 2, 2]


def test_the_first_forward_runs_without(monkeypatch):
    require("triton")
    counted = Counted(monkeypatch)
    reference, fused = body()
    assert counted.taken == 0
    with torch.no_grad():
        agree(fused(X), reference(X))
    assert counted.taken == 1


def edit_a_view(y: Tensor) -> Tensor:
    y[:, :, ::2].zero_()
    return y


def edit_data(y: Tensor) -> Tensor:
    y.data.mul_(0.5)
    return y


def other_memory(y: Tensor) -> Tensor:
    y.data = y.data * 0.5
    return y


def edit_array(y: Tensor) -> Tensor:
    y.numpy()[...] *= 0.5
    return y


def edited_alias(y: Tensor) -> Tensor:
    alias = y.data  # with a version of its own
    alias.numpy()[:, :, 0, 0] = 1
    return alias


BETWEEN = {
    "an edited alias": edited_alias,
    "edited in place": lambda y: y.mul_(0.5),
    "edited through a view": edit_a_view,
    "another tensor": lambda y: y * 0.5,
    "a copy": lambda y: y.clone(),
    "a view": lambda y: y[:],
    "edited through data": edit_data,
    "other memory": other_memory,
    "edited through NumPy": edit_array,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("between", [pytest.param(f, id=name) for name, f in BETWEEN.items()])
def test_only_the_very_tensor_has_a_head(between, mode, monkeypatch):
    reference, fused = body(between)
    counted = Counted(monkeypatch)
    with mode():
        agree(fused(X), reference(X))
    assert counted.taken == 0


def test_a_head_is_not_taken_into_another_graph(monkeypatch):
    """As where a chain runs eagerly, or is captured in one graph, and the next one is captured in another."""
    reference, fused = body()
    counted = Counted(monkeypatch)
    monkeypatch.setattr(handover, "_capture", lambda y: object())
    with torch.no_grad():
        agree(fused(X), reference(X))
    assert counted.taken == 0


def test_two_batch_sizes_in_turn_are_bound_once(monkeypatch):
    reference, fused = body()
    small = X[:1]
    with torch.no_grad():
        fused(small), fused(small)
        monkeypatch.setattr(stages.FusedStage, "_bind", lambda *args: pytest.fail("bound again"))
        for x in (X, small, X):
            agree(fused(x), reference(x))


def test_settings_changed_in_between(monkeypatch):
    """A head is not taken under other settings than those it was computed with."""
    reference, fused = body()
    counted = Counted(monkeypatch)
    with torch.no_grad():
        y = fused.layer1(X)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                ours = fused.layer2(y)
        theirs = reference.layer2(reference.layer1(X))
    torch.testing.assert_close(ours.float(), theirs, rtol=0.1, atol=0.1)
    assert counted.taken == 0


def test_a_chain_that_nobody_follows_any_more_computes_no_heads(monkeypatch):
    monkeypatch.setattr(handover, "PATIENCE", 4)
    reference, fused = body()
    with torch.no_grad():
        for _ in range(handover.PATIENCE + 2):
            y = fused.layer1(X)
        agree(y, reference.layer1(X))
        assert fused.layer2 not in handover._thread.waiting
        (program,) = stages._programs[fused.layer1]
        assert program.ends.ahead is None
        agree(fused(X), reference(X))
        agree(fused(X), reference(X))
        (program,) = stages._programs[fused.layer1]
        assert program.ends.ahead is None, "once and for all"


def test_threads_do_not_take_each_others_heads(monkeypatch):
    reference, fused = body()
    images, results = [X, X * 2], [None, None]
    alone, both = threading.Lock(), threading.Barrier(2)  # the interpreter runs one kernel at a time

    def between(y: Tensor) -> Tensor:
        alone.release()
        both.wait(60)
        alone.acquire()
        return y

    def work(i: int) -> None:
        with torch.no_grad(), alone:
            results[i] = fused(images[i])

    fused.between = between
    counted = Counted(monkeypatch)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for x, y in zip(images, results, strict=True):
            agree(y, reference(x))
    assert counted.taken == 2


def test_copies_learn_for_themselves():
    reference, fused = body()
    again = copy.deepcopy(fused)
    assert handover.following(again.layer1) is None
    with torch.no_grad():
        for _ in range(3):
            agree(again(X), reference(X))
    assert handover.following(again.layer1) is again.layer2
    assert handover.following(fused.layer1) is fused.layer2


def test_explain_says_so():
    _, fused = body()
    reasons = [part.reason for part in frb.explain(fused).parts]
    assert reasons == [
        "one chain, 2 of 2 tails as one kernel, the last one with the next chain's head",
        "one chain, 2 of 2 tails as one kernel",
    ]


def test_tune_asks_for_heads_and_a_table_decides(monkeypatch):
    require("triton")
    torch.manual_seed(0)
    reference = randomize_norms(Body()).eval()
    faster = StageEntry(1, True, StageTile(32, 16, 16, 4, 1, 1))

    def lookup(h, conv, case):
        return faster if "next" in case else None

    monkeypatch.setattr(tuned, "lookup_stage", lookup)
    fused = frb.fuse(reference, backend="triton")
    with torch.no_grad(), asked.recording() as found:
        fused(X)
        fused(X)
        agree(fused(X), reference(X))
    assert [merged(layer) for layer in (fused.layer1, fused.layer2)] == [0, 0], "each convolution was asked for"
    reduces = [one.reduce.weight for one in found if one.reduce is not None]
    assert any(weight is fused.layer2[0].conv1.weight for weight in reduces)
    fused = frb.fuse(reference, backend="triton")
    with torch.no_grad():
        fused(X)
        agree(fused(X), reference(X))
    # what ends the last chain has no next; what ends the other has, from the second forward on
    assert [merged(layer) for layer in (fused.layer1, fused.layer2)] == [2, 1]


def test_an_input_dies_when_it_was_read_for_the_last_time():
    """Where nobody but the list has it; with identity and projection, and a chain of more blocks."""
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    blocks = [BasicBlock(8, 8), BasicBlock(8, 16, 2, shortcut)]
    chain = frb.fuse(randomize_norms(nn.Sequential(*blocks)).eval(), inplace=True)
    x = torch.randn(1, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = chain(x)
    (program,) = handover.programs[chain]
    *first, last = program._operations
    held, seen, alive = [x], weakref.ref(x), []
    del x

    def watched(a, b):
        alive.append(seen() is not None)
        return last.run(a, b)

    y, _ = Program(None, [*first, last._replace(run=watched)]).run(held)
    assert torch.equal(y, expected)
    assert alive == [False]
    assert not held


def test_a_head_dies_when_it_was_read_for_the_last_time():
    head, alive = torch.ones(1, 1, 2, 2), []
    seen = weakref.ref(head)

    def last(y, x):
        alive.append(seen() is not None)
        return y + x

    steps = [
        Operation(lambda x, _: x, 0, -1, 1, ()),
        Operation(lambda h, _: 2 * h, 1, -1, 2, (1,)),
        Operation(last, 2, 0, 3, (2,)),
    ]
    heads = [head]
    del head
    y, _ = Program(None, steps).run([torch.zeros(1, 1, 2, 2)], heads)
    assert (y == 2).all()
    assert alive == [False]
    assert not heads


def test_a_head_is_let_go_with_what_it_was_made_of(monkeypatch):
    require("triton")
    counted = Counted(monkeypatch)
    reference, fused = body()
    with torch.no_grad():
        fused(X)
        y = fused.layer1(X)
        assert len(handover._thread.waiting) == 1
        waiting = weakref.ref(next(iter(handover._thread.waiting.values())).value)
        del y
        assert not handover._thread.waiting
        assert waiting() is None
        before, first = counted.taken, fused.layer1(X)
        second = fused.layer1(X)  # another head takes the place of the first
        del first
        agree(fused.layer2(second), reference.layer2(reference.layer1(X)))
    assert counted.taken == before + 1
