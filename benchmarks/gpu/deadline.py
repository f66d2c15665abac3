"""The time that a step may take."""

from __future__ import annotations

from time import monotonic


class Deadline:
    """Counts down from a budget in seconds."""

    def __init__(self, budget: float) -> None:
        self._end = monotonic() + budget

    def left(self) -> float:
        """Seconds that remain, 0 after the end."""
        return max(0.0, self._end - monotonic())

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether something that takes so long may still begin."""
        return self.left() > seconds
