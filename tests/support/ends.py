"""The ends of processes that are nobody's children here, waited for."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager


class Ends:
    """Processes that ran when the watch on them began: an id that is used again is never taken for one of them."""

    def __init__(self, poll: select.poll, pids: dict[int, int]) -> None:
        self._poll, self._pids = poll, pids

    def all_within(self, seconds: float) -> None:
        """Wait until all have ended.

        Raises:
            AssertionError: some have not after so many seconds.
        """
        due = time.monotonic() + seconds
        while self._pids:
            ended = self._poll.poll(max(0.0, 1000 * (due - time.monotonic())))
            assert ended, f"still there after {seconds:.0f} s: {sorted(self._pids.values())}"
            for descriptor, _ in ended:
                self._poll.unregister(descriptor)
                del self._pids[descriptor]


@contextmanager
def watched(pids: Iterable[int]) -> Iterator[Ends]:
    """Watch processes that run now."""
    with ExitStack() as opened:
        poll = select.poll()
        found = {}
        for pid in pids:
            descriptor = os.pidfd_open(pid)
            opened.callback(os.close, descriptor)
            poll.register(descriptor, select.POLLIN)
            found[descriptor] = pid
        yield Ends(poll, found)
