"""What costs the more the larger a study is, done so seldom that it takes a small part of the driver's time."""

from __future__ import annotations

import time
from collections.abc import Callable

SHARE = 0.05
"""Of the time, at most."""


class Sparing:
    """Calls `act`, unless it was called so lately that it would take more than `SHARE` of the time."""

    def __init__(self, act: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._act = act
        self._clock = clock
        self._again_at = 0.0

    @property
    def due(self) -> bool:
        """Whether a call would do it now."""
        return self._clock() >= self._again_at

    def __call__(self) -> None:
        """Do it now or leave it; whoever needs it done calls `act`."""
        if not self.due:
            return
        begun = self._clock()
        self._act()
        ended = self._clock()
        self._again_at = ended + (ended - begun) * (1 / SHARE - 1)
