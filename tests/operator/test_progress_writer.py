"""What becomes of posts when the API server is away, when two replicas write, and when strangers post."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from finetune_api.names import Stage
from finetune_api.progress import ProgressPost
from finetune_operator.cache import Cache, Key
from finetune_operator.client import Api, ApiError
from finetune_operator.pace import Pace
from finetune_operator.planning.clock import rfc3339
from finetune_operator.progress import auth, writer
from finetune_operator.progress.auth import Authenticator, Caller, Refused
from finetune_operator.progress.writer import ProgressWriter
from tests.operator.manifests import success

Raw = dict[str, Any]
KEY = Key("ns", "a")
CREATED = datetime(2026, 3, 1, 12, tzinfo=UTC)
CALLER = Caller(KEY, "job", "pod-1", CREATED, Stage.TRAIN)
SECRET = {"reason": "SecretMissing", "message": "Secret s3 does not exist"}
GONE = ApiError(0, "ClientConnectorError", "", "GET", "/")


class Server:
    """One FineTuneJob's status, with the API server's optimistic locking."""

    def __init__(self) -> None:
        self.status: Raw = {}
        self.version = 1
        self.away = 0
        self.meanwhile: Callable[[], None] | None = None
        """Done once, between a read and the write that follows it."""
        self.changed = asyncio.Condition()

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise GONE

    def write(self, **progress: object) -> None:
        """Another replica's write."""
        self.status["progress"] = {"executionId": "pod-1", "stage": "train", **progress}
        self.version += 1

    async def get_finetunejob(self, namespace: str, name: str) -> Raw:
        self._answer()
        meta = {"namespace": namespace, "name": name, "uid": "job", "resourceVersion": str(self.version)}
        return {"metadata": meta, "status": dict(self.status)}

    async def apply_status(
        self, _: str, namespace: str, name: str, uid: str, status: Raw, manager: str, resource_version: str = ""
    ) -> Raw:
        self._answer()
        if self.meanwhile is not None:
            act, self.meanwhile = self.meanwhile, None
            act()
        if resource_version != str(self.version):
            raise ApiError(409, "Conflict", "the object has been modified", "PATCH", "/")
        self.status.update(status)
        self.version += 1
        async with self.changed:
            self.changed.notify_all()
        return await self.get_finetunejob(namespace, name)

    async def until(self, check: Callable[[Raw], bool]) -> None:
        """Wait until status.progress is as wanted."""
        async with self.changed, asyncio.timeout(10):
            await self.changed.wait_for(lambda: check(self.status.get("progress") or {}))


def replica(server: Server) -> ProgressWriter:
    api = cast(Api, server)
    return ProgressWriter(api, Authenticator(api, Cache()), Pace(0.01), lambda _: None)


def post(sequence: int, **fields: object) -> ProgressPost:
    return ProgressPost.model_validate({"executionId": "pod-1", "stage": "train", "sequence": sequence, **fields})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(writer, "LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(writer, "BURST_SECONDS", 0.01)


async def test_a_wait_that_was_taken_is_written_when_the_api_server_is_back() -> None:
    server = Server()
    progress = replica(server)
    await progress.submit(CALLER, post(1, activity="Loading"))
    await server.until(lambda p: p.get("activity") == "Loading")
    server.away = 12
    await progress.submit(CALLER, post(2, waiting=SECRET))
    await server.until(lambda p: p.get("waitingReason") == "SecretMissing")


async def test_what_is_posted_while_the_api_server_is_away_is_written_with_what_was_put_back() -> None:
    server = Server()
    progress = replica(server)
    await progress.submit(CALLER, post(1, activity="Loading"))
    await server.until(lambda p: p.get("activity") == "Loading")
    server.away = 6
    await progress.submit(CALLER, post(2, step=5, waiting=SECRET))
    await progress.submit(CALLER, post(3, loss=1.5))
    await server.until(lambda p: p.get("sequence") == 3)
    written = server.status["progress"]
    assert (written["step"], written["loss"], "waitingReason" in written) == (5, 1.5, False)


async def test_a_final_is_acknowledged_only_once_it_is_written() -> None:
    server = Server()
    server.status = {"progress": {"executionId": "pod-1", "stage": "train", "sequence": 1}}
    progress = replica(server)
    await progress.submit(CALLER, post(2, activity="Uploading"))
    server.away = 6
    assert await progress.submit(CALLER, post(3, final=success(Stage.TRAIN).to_json_dict()))
    assert server.status["progress"]["report"]["succeeded"]


async def test_a_post_that_another_replica_has_overtaken_changes_nothing() -> None:
    server = Server()
    report = success(Stage.TRAIN).to_json_dict()
    server.meanwhile = lambda: server.write(sequence=9, step=9, report=report)
    progress = replica(server)
    await progress.submit(CALLER, post(1, step=1))
    await progress.submit(CALLER, post(10, step=10))
    await server.until(lambda p: p.get("sequence") == 10)
    assert server.status["progress"]["report"] == report, "an acknowledged report is never lost"


async def test_a_report_that_another_replica_wrote_since_the_last_look_survives() -> None:
    server = Server()
    report = success(Stage.TRAIN).to_json_dict()
    server.write(sequence=3, step=3)
    server.meanwhile = lambda: server.write(sequence=4, step=4, report=report)
    progress = replica(server)
    await progress.submit(CALLER, post(5, activity="Uploading", waiting=SECRET))
    await server.until(lambda p: p.get("sequence") == 5)
    assert server.status["progress"]["report"] == report


async def test_what_only_a_newer_version_knows_of_a_running_execution_is_written_again() -> None:
    server = Server()
    server.write(sequence=1, flops=1.5)
    progress = replica(server)
    await progress.submit(CALLER, post(2, step=2))
    await server.until(lambda p: p.get("sequence") == 2)
    assert server.status["progress"]["flops"] == 1.5
    await progress.submit(
        Caller(KEY, "job", "pod-2", CREATED + timedelta(seconds=60), Stage.TRAIN),
        post(1).model_copy(update={"execution_id": "pod-2"}),
    )
    await server.until(lambda p: p.get("executionId") == "pod-2")
    assert "flops" not in server.status["progress"], "another execution's"


async def test_a_pod_that_another_has_replaced_writes_no_more_through_any_replica() -> None:
    server = Server()
    began = rfc3339(CREATED + timedelta(seconds=60))
    server.status = {
        "progress": {"executionId": "pod-2", "stage": "train", "sequence": 1, "step": 1},
        "attempts": [{"executionId": "pod-2", "stage": "train", "pod": "p2", "startedAt": began}],
    }
    with pytest.raises(Refused) as refused:
        await replica(server).submit(CALLER, post(70, final=success(Stage.TRAIN).to_json_dict()))
    assert refused.value.status == 409
    assert server.status["progress"]["executionId"] == "pod-2"


async def test_a_pod_posts_although_its_predecessor_is_said_to_have_begun_after_it() -> None:
    """Its node's clock was fast."""
    server = Server()
    old = {"executionId": "pod-0", "stage": "train", "pod": "p0", "outcome": "Failed"}
    server.status = {
        "progress": {"executionId": "pod-0", "stage": "train", "sequence": 9, "step": 9},
        "attempts": [{**old, "startedAt": rfc3339(CREATED + timedelta(seconds=600))}],
    }
    assert await replica(server).submit(CALLER, post(1, final=success(Stage.TRAIN).to_json_dict()))
    assert server.status["progress"]["executionId"] == "pod-1"


async def test_a_pod_that_has_ended_does_not_post_over_its_successor() -> None:
    server = Server()
    ended = {"executionId": "pod-1", "stage": "train", "pod": "p1", "outcome": "Failed"}
    server.status = {
        "progress": {"executionId": "pod-2", "stage": "train", "sequence": 1, "step": 1},
        "attempts": [ended],
    }
    with pytest.raises(Refused):
        await replica(server).submit(CALLER, post(70, final=success(Stage.TRAIN).to_json_dict()))


async def test_checkpoints_that_cannot_be_stored_are_written_at_once_and_so_is_their_end() -> None:
    server = Server()
    api = cast(Api, server)
    progress = ProgressWriter(api, Authenticator(api, Cache()), Pace(3600), lambda _: None)
    await progress.submit(CALLER, post(1, step=1))
    await server.until(lambda p: p.get("step") == 1)
    await progress.submit(CALLER, post(2, step=2, checkpointProblem="StorageFull: full"))
    await server.until(lambda p: p.get("checkpointProblem") == "StorageFull: full")
    await progress.submit(CALLER, post(3, step=3))
    await progress.submit(CALLER, post(4, step=4, checkpointProblem=""))
    await server.until(lambda p: p.get("step") == 4 and "checkpointProblem" not in p)


async def test_strangers_cannot_make_the_operator_flood_the_api_server_with_token_reviews() -> None:
    asked, most = 0, 0
    busy, go = asyncio.Event(), asyncio.Event()

    class Reviews:
        async def review_token(self, token: str, audience: str) -> Raw:
            nonlocal asked, most
            asked += 1
            most = max(most, asked)
            if asked == auth.REVIEWS_AT_ONCE:
                busy.set()
            await go.wait()
            asked -= 1
            return {"authenticated": False}

    authenticator = Authenticator(cast(Api, Reviews()), Cache())
    posts = [asyncio.ensure_future(authenticator.identify(f"Bearer {number}")) for number in range(50)]
    await busy.wait()
    go.set()
    answers = await asyncio.gather(*posts, return_exceptions=True)
    assert most == auth.REVIEWS_AT_ONCE
    assert all(isinstance(a, Refused) and a.status == 401 for a in answers)


async def test_a_post_whose_token_cannot_be_checked_in_time_is_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auth, "REVIEW_PATIENCE_SECONDS", 0.01)

    class Stuck:
        async def review_token(self, token: str, audience: str) -> Raw:
            await asyncio.Event().wait()
            return {}

    authenticator = Authenticator(cast(Api, Stuck()), Cache())
    stuck = [asyncio.ensure_future(authenticator.identify(f"Bearer {n}")) for n in range(auth.REVIEWS_AT_ONCE)]
    await asyncio.sleep(0)
    with pytest.raises(Refused) as refused:
        await authenticator.identify("Bearer mine")
    assert (refused.value.status, refused.value.reason) == (503, "Busy")
    for task in stuck:
        task.cancel()
