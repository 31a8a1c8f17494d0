"""When each job's status was last written, by whichever of our two field managers: they share one budget per job."""

from __future__ import annotations

import time
from collections import OrderedDict

LIMIT = 20_000


class Pace:
    """Monotonic times of the last status write, by UID."""

    def __init__(self, interval_seconds: float) -> None:
        self.interval = interval_seconds
        self._last: OrderedDict[str, float] = OrderedDict()

    def wrote(self, uid: str) -> None:
        """A status write was accepted."""
        self._last[uid] = time.monotonic()
        self._last.move_to_end(uid)
        while len(self._last) > LIMIT:
            self._last.popitem(last=False)

    def last(self, uid: str) -> float | None:
        """When the last one was."""
        return self._last.get(uid)

    def due(self, uid: str, dirty_since: float) -> float:
        """When a change that is not urgent may be written: one interval after the last write or, without one, the change."""
        return self._last.get(uid, dirty_since) + self.interval

    def forget(self, uid: str) -> None:
        """The job is gone."""
        self._last.pop(uid, None)
