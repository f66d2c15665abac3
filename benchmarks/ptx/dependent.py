"""`griddepcontrol`: what a kernel may touch that was started while the one before it is still at work.

Until it has waited it may read filters and norms alone, which no kernel before it writes, and it may write nothing.
"""

from __future__ import annotations

from .grid import Array, Grid
from .memory import active_of
from .operands import Builder, Step
from .parse import Instruction

#: how the names of the arguments begin that may be read at once
SETTLED = ("w", "bias", "mean", "var", "gamma", "beta")


def _wait(i: Instruction) -> Step:
    def run(g: Grid, active: Array | None) -> None:
        g.waited = g.waited | active_of(g, active)

    return run


def _launch_dependents(i: Instruction) -> Step:
    return lambda g, active: None


BUILDERS: dict[str, Builder] = {"griddepcontrol.wait": _wait, "griddepcontrol.launch_dependents": _launch_dependents}
