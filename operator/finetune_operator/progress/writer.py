"""Writes ``status.progress``: at most one write per job and interval, at once only for what somebody acts upon."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from finetune_api import KIND
from finetune_api.names import Stage
from finetune_api.progress import ProgressPost
from finetune_api.status import FineTuneJobStatus, ProgressStatus
from finetune_operator import metrics
from finetune_operator.client import PROGRESS_MANAGER, Api, ApiError, Raw
from finetune_operator.pace import Pace
from finetune_operator.planning.clock import parse_time
from finetune_operator.progress.auth import Authenticator, Caller, Refused
from finetune_operator.progress.protocol import fold, merge

logger = logging.getLogger(__name__)
BURST_SECONDS = 1.0
"""Even urgent writes of one job keep this distance."""
CONFLICTS = 3
"""Looks at what somebody else has just written before the post is put back."""
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 8.0
"""Between tries while the API server cannot be reached: doubled each time. What was taken is written when it is back."""
ANSWER_SECONDS = 10.0
IDLE_SECONDS = 300.0


@dataclass
class _Stream:
    """The posts of one job that are not written yet."""

    caller: Caller
    pending: ProgressPost | None = None
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    urgent: bool = False
    last_write: float = 0.0
    failures: int = 0
    retry_at: float = 0.0
    last: ProgressPost | None = None
    """Everything this replica took of the execution, folded."""
    used: float = field(default_factory=time.monotonic)


class ProgressWriter:
    """One small task per job that has something to write; it ends when there is nothing left."""

    def __init__(self, api: Api, auth: Authenticator, pace: Pace, wrote: Callable[[Raw], None]) -> None:
        self._api = api
        self._auth = auth
        self._pace = pace
        self._wrote = wrote
        self._streams: dict[str, _Stream] = {}

    async def submit(self, caller: Caller, post: ProgressPost, sequenced: bool = True) -> bool:
        """Take a post. Returns whether it has been written; a final post is, before this returns.

        Raises:
            Refused: 409 for an execution that another has replaced, 503 when a final could not be written.
        """
        status = await self._auth.status_of(caller)
        stream = self._streams.get(caller.job_uid)
        written = status.progress
        if stream is None:
            self._prune()
            stream = self._streams[caller.job_uid] = _Stream(caller)
        elif stream.caller.pod_uid != caller.pod_uid:
            old, new = stream.caller.pod_created, caller.pod_created
            if old is not None and new is not None and new < old:
                raise Refused(409, "Stale", "a newer pod of this job has posted")
        stream.used = time.monotonic()
        newest = self._newest(stream, written, caller)
        if not sequenced:
            post = post.model_copy(update={"sequence": newest + 1})
        elif post.sequence <= newest:
            # A repetition, or one that was overtaken. A final that was recorded is acknowledged again.
            recorded = written is not None and written.execution_id == caller.pod_uid and written.report is not None
            if post.final is None or recorded:
                return False
            post = post.model_copy(update={"sequence": newest + 1})
        changed = self._is_urgent(stream, written, post)
        stream.caller = caller
        stream.pending = fold(stream.pending, post)
        stream.last = fold(stream.last, post)
        stream.urgent = stream.urgent or changed
        return await self._schedule(stream, wait=post.final is not None)

    def _newest(self, stream: _Stream, written: ProgressStatus | None, caller: Caller) -> int:
        known = [-1]
        if stream.last is not None and stream.last.execution_id == caller.pod_uid:
            known.append(stream.last.sequence)
        if written is not None and written.execution_id == caller.pod_uid and written.sequence is not None:
            known.append(written.sequence)
        return max(known)

    def _is_urgent(self, stream: _Stream, written: ProgressStatus | None, post: ProgressPost) -> bool:
        """A final, a wait that begins, changes or ends, a restart, checkpoints that cannot be stored or can again, and the first
        sign of training or publishing.

        Not the first sign of prepare: a short one costs no write at all before training.
        """
        if post.final is not None:
            return True
        last = stream.last if stream.last is not None and stream.last.execution_id == post.execution_id else None
        reason = post.waiting.reason if post.waiting else None
        if last is not None:
            restarted = len(post.restarts or ()) > len(last.restarts or ())
            turned = _turned(last.checkpoint_problem, post.checkpoint_problem)
            return restarted or turned or reason != (last.waiting.reason if last.waiting else None)
        if written is not None and written.execution_id == post.execution_id:
            restarted = len(post.restarts or ()) > len(written.restarts or ())
            turned = _turned(written.checkpoint_problem, post.checkpoint_problem)
            return restarted or turned or reason != written.waiting_reason
        return reason is not None or post.stage is not Stage.PREPARE

    async def _schedule(self, stream: _Stream, wait: bool) -> bool:
        future: asyncio.Future[None] | None = None
        if wait:
            future = asyncio.get_running_loop().create_future()
            stream.waiters.append(future)
        stream.wake.set()
        if stream.task is None or stream.task.done():
            stream.task = asyncio.ensure_future(self._run(stream))
        if future is None:
            return False
        try:
            await asyncio.wait_for(future, ANSWER_SECONDS)
        except (ApiError, TimeoutError) as problem:
            raise Refused(503, "Unavailable", "the report could not be recorded; post it again") from problem
        return True

    async def _run(self, stream: _Stream) -> None:
        """Write while there is something to write."""
        first = time.monotonic()
        while stream.pending is not None:
            if stream.urgent:
                due = stream.last_write + BURST_SECONDS if stream.last_write else 0.0
            else:
                due = self._pace.due(stream.caller.job_uid, first)
            due = max(due, stream.retry_at)
            left = due - time.monotonic()
            if left > 0:
                stream.wake.clear()
                try:
                    await asyncio.wait_for(stream.wake.wait(), left)
                except TimeoutError:
                    pass
                else:
                    continue
            await self._flush(stream)
            first = time.monotonic()

    async def _flush(self, stream: _Stream) -> None:
        """One try. What cannot be written now is put back: its sender has been told that it was taken."""
        caller, post, urgent = stream.caller, stream.pending, stream.urgent
        stream.pending, stream.urgent = None, False
        waiters, stream.waiters = stream.waiters, []
        assert post is not None
        problem: Refused | ApiError | None = None
        try:
            await self._write(caller, post)
        except (Refused, ApiError) as failed:
            problem = failed
        stream.last_write = time.monotonic()
        if problem is not None and _may_pass(problem):
            # (A newer execution's post has the place of an older one's: fold lets that go.)
            stream.pending = post if stream.pending is None else fold(post, stream.pending)
            stream.urgent = stream.urgent or urgent
            stream.waiters = [*waiters, *stream.waiters]
            pause = min(PAUSE_SECONDS * 2**stream.failures, LONGEST_PAUSE_SECONDS)
            stream.failures, stream.retry_at = stream.failures + 1, stream.last_write + pause
            logger.warning("%s: progress is not recorded yet, again in %.1f s: %s", caller.key, pause, problem)
            return
        stream.failures, stream.retry_at = 0, 0.0
        if problem is not None:
            logger.warning("%s: progress was not recorded: %s", caller.key, problem)
        for waiter in waiters:
            if waiter.done():
                continue
            if problem is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(problem)

    async def _write(self, caller: Caller, post: ProgressPost) -> None:
        """Merge into what stands there now, and only into that: another replica may have written since the last look."""
        for left in reversed(range(CONFLICTS)):
            status, unknown, version = await self._auth.read_status(caller)
            progress = _merged(status, caller, post)
            if progress is None:
                return
            same = status.progress is not None and status.progress.execution_id == progress.execution_id
            kept = unknown.get("progress", {}) if same else {}
            body = {"progress": {**kept, **progress.to_json_dict()}}
            key = caller.key
            try:
                answer = await self._api.apply_status(
                    KIND, key.namespace, key.name, caller.job_uid, body, PROGRESS_MANAGER, version
                )
            except ApiError as problem:
                if problem.status != 409 or not left:
                    raise
            else:
                metrics.PROGRESS_WRITES.inc()
                self._pace.wrote(caller.job_uid)
                self._wrote(answer)
                return

    def _prune(self) -> None:
        """Forget jobs that have not posted for a while."""
        limit = time.monotonic() - IDLE_SECONDS
        for uid, stream in list(self._streams.items()):
            if stream.used < limit and stream.pending is None:
                del self._streams[uid]


def _turned(before: str | None, now: str | None) -> bool:
    """Whether a problem has appeared or gone; a post that does not speak of it changes nothing."""
    return now is not None and bool(before) != bool(now)


def _may_pass(problem: Refused | ApiError) -> bool:
    """Whether a write that failed may succeed later. 409 of the API server: others wrote at the same time."""
    if isinstance(problem, Refused):
        return problem.status == 503
    return problem.status in (0, 409, 429) or problem.status >= 500


def _merged(status: FineTuneJobStatus, caller: Caller, post: ProgressPost) -> ProgressStatus | None:
    """``status.progress`` with a post, or None if it holds that post or a later one already.

    Raises:
        Refused: 409 when a newer pod has posted through another replica.
    """
    base = status.progress
    if base is None or base.execution_id is None:
        return merge(base, post, datetime.now(UTC))
    if base.execution_id != post.execution_id:
        if _replaced(status, caller, base.execution_id):
            raise Refused(409, "Stale", "a newer pod of this job has posted")
        return merge(base, post, datetime.now(UTC))
    written = base.sequence if base.sequence is not None else -1
    if written >= post.sequence:
        if post.final is None or base.report is not None:
            return None
        # A final is news even where a later post came before it.
        post = post.model_copy(update={"sequence": written})
    return merge(base, post, datetime.now(UTC))


def _replaced(status: FineTuneJobStatus, caller: Caller, other: str) -> bool:
    """Whether another execution that has posted is newer than the caller's: of two that go on, the one that began later; else the
    one that goes on."""
    attempts = {a.execution_id: a for a in status.attempts}
    mine, found = attempts.get(caller.pod_uid), attempts.get(other)
    if mine is not None and mine.outcome != "Running":
        return True
    began = parse_time(found.started_at) if found is not None and found.outcome == "Running" else None
    return began is not None and caller.pod_created is not None and caller.pod_created < began
