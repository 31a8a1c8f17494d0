"""Why tasks cannot be done: what lm-eval, datasets and the Hub raise, in few words and with what can be done about it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune_trainer.tasks.protocol import Failure, Trouble
from finetune_trainer.text import shorten

INSTEAD = "leave it out, or bring a task of your own (uri)"
PASSING = (408, 429)
SWALLOWED = re.compile(r"on the Hugging Face Hub either: (\w+)")
STATUS = re.compile(r"\berror '(\d{3}) ")
"""In httpx's words."""


class Unusable(Exception):
    """A task that cannot be done here, and why."""


def trouble(error: Exception, *, offline: bool) -> Trouble:
    """In the words of the failure table.

    Args:
        offline: whether the Hub was not to be asked: then waiting for it is of no use.
    """
    chain = list(_chain(error))
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    # datasets raises some of its errors without their causes, whose names are in its text then.
    names |= set(SWALLOWED.findall(str(error)))
    status = next((code for each in chain if (code := _status(each)) is not None), 0)
    told = f"{type(error).__name__}: {error}"
    if isinstance(error, Unusable):
        failure, told = Failure.UNUSABLE, str(error)
    elif missing := next((e.name for e in chain if isinstance(e, ModuleNotFoundError) and e.name), None):
        failure = Failure.UNUSABLE
        told = f"it needs the Python package {missing.partition('.')[0]}, which the trainer image has not: {INSTEAD}"
    elif "GatedRepoError" in names or "gated dataset" in str(error):  # which datasets raises without its cause
        failure = Failure.NOT_ALLOWED
        told += " It takes the token of an account that has access (HF_TOKEN in the task's secretRef)."
    elif names & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        failure = Failure.NOT_FOUND
    elif status in (401, 403):
        failure = Failure.NOT_ALLOWED
    elif names & {"ConnectionError", "TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"} or (
        status in PASSING or status >= 500
    ):
        failure = Failure.UNUSABLE if offline else Failure.AWAY
        if offline:
            told = f"it asks the Hub for more than its data, which is not done when it is scored ({told}): {INSTEAD}"
    else:
        failure = Failure.UNUSABLE
        if "scripts are no longer supported" in str(error):
            told = f"its data are made by code on the Hub, which is not run ({error}): {INSTEAD} with the data as files"
    of = "".join(f"{note}: " for note in reversed(getattr(error, "__notes__", [])))
    return Trouble(failure=failure, message=shorten(f"{of}{' '.join(told.split())}", 500))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """It and what it was raised of."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _status(error: BaseException) -> int | None:
    """Of an answer over HTTP."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    told = STATUS.search(str(error))
    return code if isinstance(code, int) else int(told[1]) if told else None
