"""Where a bottleneck's tail and the next one's head can be one operation: 3x3, expand, add, ReLU, the next reduce.

What `kernels.expand_shift` runs as one kernel are three steps of a chain of blocks, the last of which belongs to the
next block. This finds them by the plans alone, and bottlenecks that are one operation as a whole
(`kernels.bottleneck_rows`); whether a kernel takes their convolutions is asked of the backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .runner import BoundBranch, BoundStep, Runner


class Tail(NamedTuple):
    """`y = relu(expand(relu(conv(h))) + (other | shortcut(other)))` and, unless `reduce` is None, `relu(reduce(y))`.

    `other` is the number of the other activation among the chain's values.
    """

    conv: BoundBranch
    expand: BoundBranch
    other: int
    shortcut: BoundBranch | None
    reduce: BoundBranch | None


def _plain(step: BoundStep) -> bool:
    """Whether a step is a convolution, its norm and a ReLU, and nothing else."""
    alone = step.step.residual is None and step.shortcut is None and step.module is None
    return alone and step.main.conv is not None and step.step.relu


def _adds(step: BoundStep) -> bool:
    """Whether a step is a convolution, its norm, the add of a plain residual or of a downsample branch, and a ReLU."""
    if step.main.conv is None or not step.step.relu:
        return False
    if step.shortcut is not None:
        return step.shortcut.conv is not None
    return step.step.residual is not None and step.step.residual_stride == 1 and step.residual_norm is None


def no_tail(runner: Runner) -> str:
    """Why `find_tails` finds none in a block, where it does not."""
    kept = [step.step.module for step in runner.steps if step.step.module is not None]
    if kept:
        return f"{kept[0]} runs as it is"
    return "no convolution with norm and ReLU in front of the last one, or one that something else reads, too"


def find_tails(
    runners: Sequence[Runner],
    last_read: Mapping[int, int],
    names: Sequence[str],
    behind: BoundStep | None = None,
) -> dict[int, Tail]:
    """The tails in a chain of blocks, by the number of their first step.

    Args:
        runners: of the blocks, each of which reads the result of the one before it.
        last_read: for each value of the chain the number of the last step that reads it; see `chain.bind`.
        names: of the blocks' backends; a tail has no reduce of a block on another one.
        behind: a step that reads the last block's result, if one is known.
    """
    found, base = {}, 0  # the number of a block's input, and of its first step
    for place, runner in enumerate(runners):
        following = behind
        if place + 1 < len(runners):
            following = runners[place + 1].steps[0] if names[place + 1] == names[place] else None
        steps = runner.steps
        if len(steps) >= 2 and _plain(steps[-2]) and _adds(steps[-1]):
            conv, expand = steps[-2:]
            inner = len(steps) - 1  # the value, within the block, between the two
            source = expand.shortcut.source if expand.shortcut is not None else expand.step.residual
            assert source is not None
            alone = last_read[base + inner] == base + len(steps) - 1 and source != inner
            if alone and expand.main.source == inner:
                reads_y = following is not None and _plain(following) and following.main.source == 0
                reduce = following.main if following is not None and reads_y else None
                found[base + len(steps) - 2] = Tail(conv.main, expand.main, base + source, expand.shortcut, reduce)
        base += len(steps)
    return found


class Whole(NamedTuple):
    """A bottleneck: `y = relu(expand(relu(conv(relu(reduce(x))))) + (x | shortcut(x)))`."""

    reduce: BoundBranch
    conv: BoundBranch
    expand: BoundBranch
    shortcut: BoundBranch | None


def find_wholes(runners: Sequence[Runner]) -> dict[int, Whole]:
    """The bottlenecks in a chain of blocks, by the number of their first step."""
    found, base = {}, 0
    for runner in runners:
        steps = runner.steps
        if len(steps) == 3 and _plain(steps[0]) and _plain(steps[1]) and _adds(steps[2]):
            reduce, conv, expand = steps
            source = expand.step.residual if expand.shortcut is None else expand.shortcut.source
            if (reduce.main.source, conv.main.source, expand.main.source, source) == (0, 1, 2, 0):
                found[base] = Whole(reduce.main, conv.main, expand.main, expand.shortcut)
        base += len(steps)
    return found
