"""Chains in which whole bottlenecks are one operation: where a table says so, and with the same results."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import BF16, DEVICE, require
from chains import CHAINS, CLOSE, X, chain, first, identity, image_for
from torch import nn

import fused_resblock as frb
from fused_resblock import stage as stages
from fused_resblock.backends import asked, tuned, whole
from fused_resblock.kernels import bottleneck
from fused_resblock.kernels.tables import StageEntry
from fused_resblock.kernels.tiles import StageTile
from fused_resblock.reference import Bottleneck

FROM_32, FROM_64, IDENTITY = "16-64.s1.shortcut32.from32", "16-64.s1.shortcut64.from64", "16-64.s1.residual.from64"
TILE = StageTile(128, 64, 64, 8, 3, 4, tma=True, ring=True)
ROW, SLOWER, UNKNOWN = StageEntry(48, True, TILE), StageEntry(48, False, TILE), StageEntry(48, True, None)
#: a row for the tail of a first block, with the next reduce and without
TAIL = StageEntry(48, True, StageTile(32, 16, 16, 4, 1, 1))


@pytest.fixture
def table(monkeypatch):
    """What a table says, by case; the kernel, which runs on Hopper alone, takes every block with a stride of 1.

    Conv by conv it is computed in its place.
    """
    require("triton")
    rows, bound = {}, []

    def refusal(x, reduce, conv, *_):
        return "another 3x3" if (conv.stride, conv.groups) != ((1, 1), 1) else None

    def bind_tile(x, layers, tile, backend="auto"):
        bound.append((layers.case, tile))
        return whole.apart(x, layers, backend)

    monkeypatch.setattr(bottleneck, "refusal", refusal)
    monkeypatch.setattr(whole, "bind_tile", bind_tile)
    monkeypatch.setattr(tuned, "lookup_stage", lambda h, conv, case: rows.get(case))
    return rows, bound


def program_of(fused: nn.Module):
    (program,) = stages._programs[fused]
    return program


def run(make, x=None, **options):
    """A chain and its fused copy, which has run; its results are the same."""
    reference = chain(make)
    fused = frb.fuse(reference, **{"backend": "triton", **options})
    x = image_for(reference) if x is None else x
    with torch.no_grad():
        y = fused(x)
        torch.testing.assert_close(y, reference(x), **CLOSE)
        assert torch.equal(fused(x), y)
    return reference, fused


@pytest.mark.parametrize(
    ("make", "rows", "counts"),
    [
        (lambda: [identity(), identity()], {}, (0, 0)),
        (lambda: [identity(), identity()], {IDENTITY: ROW}, (0, 2)),
        (lambda: [identity(), identity()], {IDENTITY: SLOWER}, (0, 0)),
        (lambda: [identity(), identity()], {IDENTITY: UNKNOWN}, (0, 0)),
        (lambda: [first(stride=1), identity(), identity()], {IDENTITY: ROW}, (0, 2)),
        (lambda: [first(stride=1), identity()], {IDENTITY: ROW, FROM_32: ROW}, (0, 2)),
        (lambda: [first(stride=1), identity()], {FROM_32: ROW}, (0, 0)),
        (lambda: [first(64, stride=1), identity()], {IDENTITY: ROW, FROM_64: ROW}, (0, 2)),
        (lambda: [first(), identity(), identity()], {IDENTITY: ROW}, (0, 2)),
        (lambda: [identity(), identity(groups=2, base_width=32)], {IDENTITY: ROW}, (0, 0)),
    ],
)
def test_where_a_table_says_so(make, rows, counts, table):
    table[0].update(rows)
    _, fused = run(make)
    program = program_of(fused)
    assert (program.tails, program.wholes) == counts
    assert len(table[1]) == counts[1]


def test_a_tail_in_front_computes_no_reduce_that_nobody_reads(table):
    rows, _ = table
    rows.update({IDENTITY: ROW, "16-64.s2.shortcut32.next16": TAIL})
    _, fused = run(CHAINS["layer"][0])
    assert (program_of(fused).tails, program_of(fused).wholes) == (0, 2)
    rows["16-64.s2.shortcut32.last"] = TAIL
    _, fused = run(CHAINS["layer"][0])
    assert (program_of(fused).tails, program_of(fused).wholes) == (1, 2)
    rows.pop(IDENTITY)
    _, fused = run(CHAINS["layer"][0])
    assert (program_of(fused).tails, program_of(fused).wholes) == (1, 0)


def test_off_where_tails_are_asked_for_or_nothing_is(table):
    table[0][IDENTITY] = ROW
    for options in ({"stages": "kernel"}, {"stages": False}, {"backend": "eager"}):
        run(lambda: [identity(), identity()], **options)
    assert table[1] == []


def test_explain_counts_them(table):
    table[0].update({IDENTITY: ROW, "16-64.s2.shortcut32.last": TAIL})
    _, fused = run(CHAINS["layer"][0])
    said = "one chain, 1 of 3 tails and 2 of 3 blocks as one kernel: measured to be faster for the last new size"
    assert frb.explain(fused).parts[0].reason == said


def test_autocast(table):
    table[0][IDENTITY] = ROW
    reference = chain(lambda: [identity(), identity()])
    fused = frb.fuse(reference, backend="triton")
    with torch.no_grad(), torch.autocast(DEVICE, BF16):
        y, expected = fused(X), reference(X)
    assert y.dtype == BF16
    torch.testing.assert_close(y.to(expected.dtype), expected, rtol=0.05, atol=0.05)
    assert len(table[1]) == 2


def test_weights_of_another_dtype_are_the_users_error(table):
    table[0][IDENTITY] = ROW
    _, fused = run(lambda: [identity(), identity()])
    fused[1].conv2.half()
    with torch.no_grad(), pytest.raises(ValueError, match="x must have the weights' dtype"):
        fused(X)


def test_changed_weights_are_seen(table):
    table[0][IDENTITY] = ROW
    reference, fused = run(lambda: [identity(), identity()])
    for model in (reference, fused):
        with torch.no_grad():
            model[1].conv1.weight.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(fused(X), reference(X), **CLOSE)


def test_a_blocks_input_dies_behind_it(table, monkeypatch):
    table[0][IDENTITY] = ROW
    alive, seen = [], []

    def bind_tile(x, layers, tile, backend="auto"):
        inner = whole.apart(x, layers, backend)

        def call(x, _):
            gc.collect()
            seen.append(sum(ref() is not None for ref in alive))
            y = inner(x, None)
            alive.append(weakref.ref(y))
            return y

        return call

    monkeypatch.setattr(whole, "bind_tile", bind_tile)
    _, fused = run(lambda: [identity(), identity(), identity(), identity()])
    alive.clear()
    seen.clear()
    with torch.no_grad():
        fused(X)
    assert seen == [0, 1, 1, 1]


def test_a_tile_that_does_not_run_gives_way(table, monkeypatch):
    table[0][IDENTITY] = ROW

    def bind_tile(*_):
        raise RuntimeError("no such tile")

    monkeypatch.setattr(whole, "bind_tile", bind_tile)
    with pytest.warns(RuntimeWarning, match="of a block does not run here .*conv by conv"):
        run(lambda: [identity(), identity()])


@pytest.mark.parametrize("shape", [(0, 64, 6, 4), (2, 64, 1, 1)])
def test_images_that_it_does_not_take(shape, table):
    table[0][IDENTITY] = ROW
    run(lambda: [identity(), identity()], torch.randn(shape).to(DEVICE))
    assert table[1] == []


def test_tune_asks_for_blocks_and_for_what_else_may_run(table):
    table[0][IDENTITY] = ROW
    reference = chain(CHAINS["layer"][0])
    fused = frb.fuse(reference, backend="triton")
    with torch.no_grad(), asked.recording() as found:
        fused(image_for(reference))
    kinds = [one.kind for one in found]
    assert kinds.count("block") == 2
    assert kinds.count("tail") == 5  # with the next reduce, and without
    assert kinds.count("convolution") == 9
    block = next(one for one in found if one.kind == "block")
    x, other = block.inputs()
    assert other is None
    layers = whole.Layers.of(block)
    (y,) = block.plain(x, None)
    with torch.no_grad():
        torch.testing.assert_close(whole.apart(x, layers, "triton")(x, None), y, **CLOSE)


def test_a_place_in_memory_that_no_descriptor_names(monkeypatch):
    require("triton")
    from fused_resblock.kernels import bottleneck_rows

    def bind(x, *_):
        return lambda x: pytest.fail("the kernel was asked")

    monkeypatch.setattr(bottleneck_rows, "bind_bottleneck_rows", bind)
    reference = chain(lambda: [identity(), identity()])
    block = frb.fuse(reference)[0]
    layers = whole.Layers(*(step.main.weights() for step in block.runner().steps), None)
    x = torch.randn(X.numel() + 1)[1:].view(2, 6, 4, 64).permute(0, 3, 1, 2)
    with torch.no_grad():
        y = whole.bind_tile(x, layers, TILE, "triton")(x, None)
        torch.testing.assert_close(y, reference[0](x), **CLOSE)


class Swapped(Bottleneck):
    """A bottleneck that adds what its first convolution makes of x."""

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(h)))
        return self.relu(self.bn3(self.conv3(y)) + h)


def test_only_blocks_in_that_order(table):
    table[0]["64-64.s1.residual.from64"] = ROW
    for block, count in ((Bottleneck, 2), (Swapped, 0)):
        _, fused = run(lambda block=block: [square(block), square(block)])
        assert program_of(fused).wholes == count


def square(kind: type[Bottleneck]) -> Bottleneck:
    """A bottleneck of 64 channels throughout."""
    block = kind(64, 16)
    for number in (1, 2, 3):
        conv = nn.Conv2d(64, 64, 3 if number == 2 else 1, padding=int(number == 2), bias=False)
        setattr(block, f"conv{number}", conv)
        setattr(block, f"bn{number}", nn.BatchNorm2d(64))
    return block


@pytest.mark.parametrize("make", [identity, lambda: first(64, stride=1)], ids=["residual", "branch"])
def test_what_a_block_is_timed_against(make, table):
    rows, _ = table
    reference = chain(lambda: [make(), identity()])
    block = frb.fuse(reference, stages=False)[0]
    steps = block.runner().steps
    shortcut = steps[2].shortcut
    layers = whole.Layers(*(step.main.weights() for step in steps), None if shortcut is None else shortcut.weights())
    with torch.no_grad():
        x = X.contiguous(memory_format=torch.channels_last)
        assert whole.by_tail(x, layers, "triton") is None
        kind = "residual" if shortcut is None else "shortcut64"
        rows[f"16-64.s1.{kind}.next16"] = TAIL
        y = whole.by_tail(x, layers, "triton")(x, None)
        torch.testing.assert_close(y, reference[0](x), **CLOSE)


def test_a_chain_that_begins_with_one_is_left_no_head(table):
    """The tail of the chain in front could compute it, but nobody would read it."""
    rows, _ = table
    rows.update({f"16-64.s1.shortcut{c}.{what}": TAIL for c in (32, 64) for what in ("next16", "last")})
    reference = nn.Sequential(
        chain(lambda: [first(32, stride=1), first(64, stride=1)]), chain(lambda: [identity(), identity()])
    )
    fused, x = frb.fuse(reference, backend="triton"), torch.randn(2, 32, 6, 4).to(DEVICE)
    for row, ahead in ((None, True), (ROW, False)):
        rows[IDENTITY] = row
        fused = frb.fuse(reference, backend="triton")
        with torch.no_grad():
            for _ in range(4):
                torch.testing.assert_close(fused(x), reference(x), **CLOSE)
        assert program_of(fused[0]).tails == 2
        assert (program_of(fused[0]).ends.ahead is not None) == ahead
        assert program_of(fused[1]).wholes == (0 if ahead else 2)


def test_off_in_chains_of_several_backends(table):
    table[0][IDENTITY] = ROW
    fused = reference = chain(lambda: [identity(), identity()])
    for place, backend in (("0", "triton"), ("1", "eager")):
        fused = frb.fuse(fused, backend=backend, filter_fn=lambda name, _, place=place: name.startswith(place))
    with torch.no_grad():
        torch.testing.assert_close(fused(X), reference(X), **CLOSE)
    assert len(program_of(fused)._operations) == 6, "one chain"
    assert table[1] == []
