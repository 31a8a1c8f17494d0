"""The time as the API server tells it.

What the planner compares with now was stamped by others: creation and deletion by the API server, Jobs by their controller, pods
by their node. With a clock of its own that is five minutes fast, an operator would end a job of an hour five minutes early, and
two operators would disagree about how long a job has waited.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

logger = logging.getLogger(__name__)
TOLERANCE = timedelta(seconds=2)
"""The Date header has whole seconds, and time must not jump for less than that."""


class ServerClock:
    """Our clock, corrected by the Date headers of answers as far as the two disagree."""

    def __init__(self) -> None:
        self.offset = timedelta()

    def now(self) -> datetime:
        """The API server's time."""
        return datetime.now(UTC) + self.offset

    def local(self) -> datetime:
        """Our own time, as :meth:`heard` wants it."""
        return datetime.now(UTC)

    def heard(self, date: str | None, asked: datetime, answered: datetime) -> None:
        """An answer bore a Date, to a request that was sent and answered at these times of ours."""
        if not date:
            return
        try:
            told = parsedate_to_datetime(date)
        except ValueError:
            return
        if told.tzinfo is None:
            return
        trip = answered - asked
        offset = told + timedelta(seconds=0.5) - (asked + trip / 2)
        if abs(offset - self.offset) <= TOLERANCE + trip / 2:
            return
        self.offset = offset if abs(offset) > TOLERANCE + trip / 2 else timedelta()
        logger.warning(
            "This machine's clock differs from the API server's by %.0f s: the API server's is followed.",
            self.offset.total_seconds(),
        )
