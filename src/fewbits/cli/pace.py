"""Pace: how long a stage still takes, by how fast it went lately.

A stage's first step loads and compiles what the others only use, so it says nothing of them: the pace is taken from the
second on, over the last half minute. A window long enough that linears of unlike size even out.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 30.0
# Fewer steps than this after the first are no pace yet.
ENOUGH_STEPS = 3


class Pace:
    """Remaining seconds of a stage of `total` units that starts at `now_s`, by any clock that only goes forward."""

    def __init__(self, total: int, now_s: float) -> None:
        self.started_s = now_s
        self.done, self._total = 0, total
        self._marks: deque[tuple[float, int]] = deque()

    def advance(self, amount: int, now_s: float) -> None:
        """`amount` more units are done."""
        self.done += amount
        self._marks.append((now_s, self.done))
        while len(self._marks) > ENOUGH_STEPS + 1 and now_s - self._marks[1][0] > WINDOW_S:
            self._marks.popleft()

    def remaining_s(self, now_s: float) -> float | None:
        """Seconds left; None where too little was done to tell."""
        if len(self._marks) <= ENOUGH_STEPS:
            return None
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        if last == first:
            return None
        left_s = (last_s - first_s) / (last - first) * (self._total - self.done)
        return max(left_s - (now_s - last_s), 0.0)
