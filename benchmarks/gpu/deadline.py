"""The time that a step may take."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic


class Deadline:
    """Counts down from a budget in seconds."""

    def __init__(self, budget: float, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._end = clock() + budget

    def left(self) -> float:
        """Seconds that remain, 0 after the end."""
        return max(0.0, self._end - self._clock())

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether something that takes so long may still begin."""
        return self.left() > seconds
