"""How often something may be done, where two programs could undo each other's work for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Allowance:
    """So many times at once, and then once in so many seconds."""

    def __init__(self, times: int, seconds: float, clock: Callable[[], float]) -> None:
        """Begin with all of it."""
        self._times = times
        self._seconds = seconds
        self._clock = clock
        self._left = float(times)
        self._counted = clock()

    def _count(self) -> None:
        now = self._clock()
        self._left = min(float(self._times), self._left + (now - self._counted) / self._seconds)
        self._counted = now

    def take(self) -> float:
        """Return 0 and take one; or return in how many seconds there is one."""
        self._count()
        if self._left < 1:
            return (1 - self._left) * self._seconds
        self._left -= 1
        return 0

    def is_ample(self) -> bool:
        """Tell whether half of it is there."""
        self._count()
        return self._left >= self._times / 2
