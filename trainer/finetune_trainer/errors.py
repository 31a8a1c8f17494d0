"""How a stage says why it cannot go on."""

from __future__ import annotations

import errno

from finetune_api.failures import FAILURES, Consequence, Reason
from finetune_trainer.text import readable


class StageError(Exception):
    """A failure with a name. The reason decides the exit code and whether the job fails, retries or waits."""

    def __init__(self, reason: Reason, message: str, patience_seconds: float | None = None) -> None:
        """``patience_seconds``: how long this is waited for although its reason is for good otherwise."""
        self.reason = reason
        self.message = readable(message)
        self.patience_seconds = patience_seconds
        super().__init__(f"{reason}: {self.message}")

    def __reduce__(self) -> tuple[type[StageError], tuple[Reason, str, float | None]]:
        return type(self), (self.reason, self.message, self.patience_seconds)

    @property
    def consequence(self) -> Consequence:
        """What follows from this failure."""
        return FAILURES[self.reason].consequence


def waits(error: BaseException) -> bool:
    """Whether somebody can mend it, and the caller tries again."""
    return isinstance(error, StageError) and (
        error.consequence is Consequence.WAIT or error.patience_seconds is not None
    )


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def full_disk(error: BaseException) -> str | None:
    """``no space left at PATH``, if that is what lies behind an error.

    torch's zip writer raises an error of its own while it handles the file's; safetensors and tokenizers, in Rust, only quote the number.
    """
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno in NO_ROOM:
            return f"no space left at {behind.filename}" if behind.filename else "no space left"
        if any(f"(os error {number})" in str(behind) for number in NO_ROOM):
            return f"no space left: {behind}"
        behind = behind.__cause__ or behind.__context__
    return None


class NotFound(Exception):
    """An object does not exist. Only the caller knows whether that is a missing dataset, model or result."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} does not exist")
        self.what = what


class Interrupted(BaseException):
    """SIGTERM arrived. Not an Exception, so that no handler for errors swallows it."""

    def __init__(
        self, message: str = "the container was told to stop (SIGTERM)", result: dict[str, object] | None = None
    ) -> None:
        """``result``: how far the stage came, for the operator (``step``, ``checkpointStep``)."""
        self.message = message
        self.result = result
        super().__init__(message)
