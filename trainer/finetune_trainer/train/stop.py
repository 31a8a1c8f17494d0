"""SIGTERM while training: noted, and looked at between two micro-batches, so that a step ends whole or not at all."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class TrainingStopped(Exception):
    """Training ended before its last step, because it was told to."""


class DeferredStop:
    """Within this context SIGTERM only sets ``requested``; otherwise it raises Interrupted wherever the stage is."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> DeferredStop:
        # Python allows handlers in the main thread only.
        self._owns = threading.current_thread() is threading.main_thread()
        if self._owns:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owns:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, _signum: int, _frame: FrameType | None) -> None:
        self.requested = True
