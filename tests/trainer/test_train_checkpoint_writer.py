"""The thread that writes checkpoints: what it writes, what it gives up, and that nothing ends it without a word."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.progress import Split
from finetune_api.results import CheckpointMarker
from finetune_api.spec import CheckpointInterval
from finetune_trainer import heartbeat
from finetune_trainer.errors import StageError
from finetune_trainer.train import checkpoint_writer
from finetune_trainer.train.capture import Captured
from finetune_trainer.train.checkpoint_writer import CheckpointWriter
from finetune_trainer.train.checkpoints import Saved
from finetune_trainer.train.fit import is_due

SPLIT = Split(
    micro_batch_sequences=1, gradient_accumulation_steps=1, gradient_checkpointing=False, max_sequence_tokens=8
)
AWAY = StageError(Reason.STORAGE_UNAVAILABLE, "the store is away")


def captured(step: int, loss: float | None = None) -> Captured:
    return Captured(step, {}, {}, {}, {}, None, [], "", {}, loss)


@dataclass
class Store:
    """Stands for the checkpoints in a bucket: does what ``act`` says, then keeps the step."""

    act: Callable[[Captured], None] = lambda _: None
    steps: list[int] = field(default_factory=list)

    def save(self, state: Captured, on_bytes: Callable[[int], None]) -> Saved:
        on_bytes(1)
        self.act(state)
        self.steps.append(state.step)
        marker = CheckpointMarker(
            snapshot_digest="0" * 64, execution_id="e", execution_number=1, step=state.step, total_steps=9, split=SPLIT,
            created_at="", files=[],
        )  # fmt: skip
        return Saved(marker)


@dataclass
class Told:
    saved: list[int] = field(default_factory=list)
    problems: list[Reason] = field(default_factory=list)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def start(told: Told, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CheckpointWriter]]:
    monkeypatch.setattr(checkpoint_writer, "PAUSE_SECONDS", 0.01)
    writers: list[CheckpointWriter] = []

    def make(store: Any, patience_seconds: float = 60) -> CheckpointWriter:
        writers.append(
            CheckpointWriter(
                store,
                lambda saved: told.saved.append(saved.marker.step),
                lambda error: told.problems.append(error.reason),
                patience_seconds,
            )
        )
        return writers[-1]

    yield make
    for writer in writers:
        writer.close()


class Gate:
    """Holds saving up."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, _: Captured) -> None:
        self.reached.set()
        assert self.open.wait(30)


def test_the_step_loop_never_waits_and_a_newer_checkpoint_takes_the_place_of_one_that_waits(
    start: Callable[..., CheckpointWriter], told: Told
) -> None:
    gate = Gate()
    store = Store(gate)
    writer = start(store)
    writer.submit(captured(1))
    assert gate.reached.wait(30)
    for step in (2, 3, 4):
        writer.submit(captured(step))  # returns although nothing can be written
    assert writer.submitted == 4
    gate.open.set()
    saved = writer.finish()
    assert saved is not None
    assert saved.marker.step == 4
    assert store.steps == told.saved == [1, 4]


def test_the_best_so_far_is_written_although_a_newer_one_waits(start: Callable[..., CheckpointWriter]) -> None:
    gate = Gate()
    store = Store(gate)
    writer = start(store)
    writer.submit(captured(1, loss=3.0))
    assert gate.reached.wait(30)
    writer.submit(captured(2, loss=2.0))
    writer.submit(captured(3, loss=2.5))
    writer.submit(captured(4))
    gate.open.set()
    writer.finish()
    assert store.steps == [1, 2, 4]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AWAY, Reason.STORAGE_UNAVAILABLE),
        (RuntimeError("PytorchStreamWriter failed writing file"), Reason.UNKNOWN),
        (OSError(errno.ENOSPC, "No space left on device"), Reason.DISK_FULL),
        (StageError(Reason.ACCESS_DENIED, "refused"), Reason.ACCESS_DENIED),
    ],
    ids=["store", "torch", "disk", "refused"],
)
def test_whatever_goes_wrong_is_told_once_and_tried_again(
    start: Callable[..., CheckpointWriter], told: Told, error: Exception, reason: Reason
) -> None:
    tries: list[int] = []
    mended = threading.Event()

    def fail(state: Captured) -> None:
        tries.append(state.step)
        if len(tries) < 4:
            raise error
        mended.set()

    writer = start(Store(fail))
    writer.submit(captured(7))
    assert mended.wait(30)
    assert writer.finish() is not None
    assert (tries, told.problems, told.saved, writer.problem) == ([7] * 4, [reason], [7], None)


def test_the_end_of_training_waits_for_a_store_that_is_away_no_longer_than_a_gpu_may_be_held(
    start: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[int] = []
    monkeypatch.setattr(heartbeat, "beat", lambda: beats.append(1))
    tries: list[int] = []

    def away(state: Captured) -> None:
        tries.append(state.step)
        raise AWAY

    writer = start(Store(away), patience_seconds=0.5)
    writer.submit(captured(9))
    with pytest.raises(StageError) as caught:
        writer.finish()
    assert caught.value.reason is Reason.STORAGE_UNAVAILABLE
    assert len(tries) > 2
    assert len(beats) >= len(tries), "a wait that is bounded is no hang"


def test_what_nobody_will_mend_is_not_waited_for(start: Callable[..., CheckpointWriter]) -> None:
    def refuse(_: Captured) -> None:
        raise StageError(Reason.ACCESS_DENIED, "refused")

    writer = start(Store(refuse))
    writer.submit(captured(9))
    with pytest.raises(StageError) as caught:
        writer.finish()
    assert caught.value.reason is Reason.ACCESS_DENIED


def test_an_execution_that_was_superseded_writes_nothing_more(start: Callable[..., CheckpointWriter]) -> None:
    def superseded(_: Captured) -> None:
        raise StageError(Reason.SUPERSEDED, "another one")

    store = Store(superseded)
    writer = start(store)
    writer.submit(captured(1))
    with pytest.raises(StageError) as caught:
        writer.finish()
    assert caught.value is writer.failure
    assert caught.value.reason is Reason.SUPERSEDED
    assert store.steps == []


def test_closing_ends_an_upload_that_is_under_way(start: Callable[..., CheckpointWriter]) -> None:
    ended = threading.Event()

    class Slow(Store):
        def save(self, state: Captured, on_bytes: Callable[[int], None]) -> Saved:
            try:
                while True:
                    on_bytes(1)
            finally:
                ended.set()

    writer = start(Slow())
    writer.submit(captured(1))
    assert writer.finish(0.05) is None
    writer.close()
    assert ended.wait(30)


def test_when_a_checkpoint_is_due() -> None:
    every = CheckpointInterval(steps=10)
    assert [s for s in range(5, 36) if is_due(s, 35, 5, every, 0)] == [5, 10, 20, 30, 35]
    timed = CheckpointInterval(seconds=300)
    assert is_due(7, 35, 5, timed, 300)
    assert not is_due(7, 35, 5, timed, 299)
    assert is_due(5, 35, 5, timed, 0)
    assert is_due(35, 35, 5, timed, 0)
