"""What a residual block computes, as a short list of fused steps.

A plan is made of names and numbers only: no tensors, no modules. So it can be compared, pickled and printed, and it
stays valid while parameters change.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Branch:
    """`norm(conv(value))`: the number of the value it reads, and the paths of its modules in the block."""

    source: int
    conv: str | None
    norm: str | None = None


@dataclass(frozen=True)
class Step:
    """One fused operation: `act(main [+ residual | + shortcut])`.

    Value 0 is the block's input and value i the result of step i, counted from 1.

    Attributes:
        main: the branch that the operation is built around; without a conv it is an elementwise `bn_act`.
        relu: whether a ReLU ends the step.
        residual: number of the value that is added, or None.
        residual_stride: the value is read at every `residual_stride`-th row and column.
        residual_norm: path of a norm applied to the residual, or None.
        shortcut: a 1x1 downsample branch accumulated in the same tile, or None.
        module: path of an average pool or a gate that is run as it is; then nothing else is set but `main.source`.
    """

    main: Branch
    relu: bool = False
    residual: int | None = None
    residual_stride: int = 1
    residual_norm: str | None = None
    shortcut: Branch | None = None
    module: str | None = None


@dataclass(frozen=True)
class Plan:
    """The steps of a block, in order; the last one's value is the block's output.

    `eval_only` says that the block computes something else in `train()` even where its norms do not (dropout, say).
    """

    steps: tuple[Step, ...]
    eval_only: bool = False

    def convs(self) -> tuple[Branch, ...]:
        """Every branch that holds a convolution, shortcuts included."""
        branches = [b for step in self.steps for b in (step.main, step.shortcut)]
        return tuple(b for b in branches if b is not None and b.conv is not None)

    def norms(self) -> tuple[str, ...]:
        """The paths of every norm."""
        branches = [b for step in self.steps for b in (step.main, step.shortcut) if b is not None]
        paths = [b.norm for b in branches] + [step.residual_norm for step in self.steps]
        return tuple(path for path in paths if path is not None)


class Unsupported(Exception):
    """A block cannot be fused; the message says why, as `explain` prints it."""
