"""How a stage ends: exit code, termination message and final post say the same."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.base import ApiModel
from finetune_api.failures import FAILURES, Consequence, Reason
from finetune_api.names import Stage
from finetune_api.progress import StageReport
from finetune_trainer import waiting
from finetune_trainer.context import StageContext
from finetune_trainer.entrypoint import TERMINATION_BYTES, main, set_up, termination_message
from finetune_trainer.errors import StageError
from finetune_trainer.text import shorten, shorten_bytes
from finetune_trainer.waiting import Patience, wait_until_available
from tests.support.trainer_run import Pod

SPEC: dict[str, Any] = {
    "model": {"uri": "hf://o/m"},
    "data": {"train": [{"uri": "s3://bucket/x"}]},
    "output": {"uri": "s3://bucket/out"},
}

GIB = 1024**3


class Done(ApiModel):
    some_rows: int = 3
    warnings: list[str] = []


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def ended(
    tmp_path: Path, body: Callable[[StageContext], ApiModel], stage: str = "prepare"
) -> tuple[int, dict[str, Any]]:
    pod = Pod(tmp_path)
    log = tmp_path / "termination-log"
    code = main(
        [stage], environ={}, termination_log=log, context=lambda s: pod.context(SPEC, s), stage_function=lambda s: body
    )
    assert len(log.read_bytes()) <= TERMINATION_BYTES
    return code, json.loads(log.read_text())


def raising(error: BaseException) -> Callable[[StageContext], ApiModel]:
    def body(ctx: StageContext) -> ApiModel:
        raise error

    return body


def test_success_carries_the_result(tmp_path: Path) -> None:
    code, message = ended(tmp_path, lambda ctx: Done())
    assert code == 0
    assert message["succeeded"]
    assert (message["reason"], message["result"]) == ("Succeeded", {"someRows": 3, "warnings": []})


@pytest.mark.parametrize("reason", [r for r, f in FAILURES.items() if f.exit_code is not None])
def test_every_reason_has_its_exit_code(tmp_path: Path, reason: Reason) -> None:
    code, message = ended(tmp_path, raising(StageError(reason, "what was found")))
    assert code == FAILURES[reason].exit_code
    assert (message["reason"], message["message"], message["succeeded"]) == (reason, "what was found", False)


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, known by module and name."""


OutOfMemoryError.__module__ = "torch"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("odd"), 1, "ValueError: odd"),
        (OutOfMemoryError("tried to allocate 2 GiB"), 40, "tried to allocate 2 GiB"),
        (MemoryError(), 41, "MemoryError"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/work/x"),
            42,
            "no space left at /work/x",
        ),
        (KeyboardInterrupt(), 60, "told to stop"),
        (ValueError("Gr\udcf6\udcdfe \ud83d"), 1, r"ValueError: Gr\xf6\xdfe \ud83d"),
        (SystemExit(3), 1, "exit code 3"),
    ],
)
def test_whatever_is_raised_has_a_code_and_a_message(
    tmp_path: Path, error: BaseException, code: int, text: str
) -> None:
    found, message = ended(tmp_path, raising(error))
    assert found == code
    assert text in message["message"]


def test_sigterm_ends_a_stage_as_interrupted(tmp_path: Path) -> None:
    def body(ctx: StageContext) -> ApiModel:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except Exception:  # noqa: BLE001 - what a library may do: it must not swallow the interruption
            return Done()
        return Done()

    code, message = ended(tmp_path, body)
    assert (code, message["reason"]) == (60, "Interrupted")


def test_a_snapshot_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    def context(stage: Stage) -> StageContext:
        raise FileNotFoundError(2, "No such file", "/etc/finetune/snapshot/snapshot.json")

    log = tmp_path / "log"
    assert main(["train"], environ={}, termination_log=log, context=context) == 1
    assert "snapshot.json" in json.loads(log.read_text())["message"]


@pytest.mark.parametrize("arguments", [[], ["cook"], ["prepare", "train"]])
def test_an_unknown_stage_is_a_usage_error(arguments: list[str]) -> None:
    assert main(arguments) == 2


@pytest.mark.parametrize("character", ["x", "é", "語", "😀", '"'])
def test_termination_messages_fit_and_stay_json(character: str) -> None:
    for warnings in ([], [character * 500] * 20):
        report = StageReport(
            stage=Stage.PREPARE,
            succeeded=False,
            reason="InvalidData",
            message=character * 2048,
            result={"a": 1, "warnings": warnings},
        )
        text = termination_message(report)
        assert len(text.encode()) <= TERMINATION_BYTES
        found = StageReport.model_validate_json(text)
        assert found.message.startswith(character * 50)
        assert found.reason == "InvalidData"
    huge = report.model_copy(update={"result": {"a": "x" * 9000}})
    assert json.loads(termination_message(huge)).get("result") is None


@pytest.mark.parametrize("limit", range(1, 12))
def test_shortened_texts_fit_and_are_whole_characters(limit: int) -> None:
    text = "aé語😀" * 3
    assert len(shorten(text, limit)) <= limit
    if limit >= 3:
        assert len(shorten_bytes(text, limit).encode()) <= limit


def test_a_wait_ends_when_the_thing_appears_and_other_errors_pass_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = Pod(tmp_path).context(SPEC)
    pauses: list[float] = []
    monkeypatch.setattr(waiting, "pause", pauses.append)
    tries = iter([StageError(Reason.SECRET_MISSING, "no"), StageError(Reason.STORAGE_UNAVAILABLE, "no"), None])

    def attempt() -> str:
        error = next(tries)
        if error:
            raise error
        return "here"

    assert wait_until_available(ctx, attempt) == "here"
    assert len(pauses) == 2
    with pytest.raises(StageError) as info:
        wait_until_available(ctx, lambda: (_ for _ in ()).throw(StageError(Reason.ACCESS_DENIED, "no")))
    assert info.value.reason is Reason.ACCESS_DENIED
    assert len(pauses) == 2


@pytest.mark.parametrize(
    ("failures", "advances", "spent"),
    [
        ([1000.0, 1299.0], {}, [False, False]),
        ([1000.0, 1150.0, 1300.0], {}, [False, False, True]),
        ([1000.0, 1250.0, 1400.0], {1250.0: 1200.0}, [False, False, False]),
        ([1000.0, 1400.0], {1400.0: 1001.0}, [False, False]),
    ],
    ids=["hours before the first failure", "nothing moved", "got on in between", "got on for long"],
)
def test_patience_counts_only_time_without_progress(
    failures: list[float], advances: dict[float, float], spent: list[bool]
) -> None:
    advanced = 0.0
    patience = Patience(300, lambda: advanced)
    found = []
    for now in failures:
        advanced = advances.get(now, advanced)
        found.append(patience.spent(now, None))
    assert found == spent


def test_a_failure_with_a_patience_of_its_own_is_not_charged_for_others_before_it() -> None:
    patience = Patience(None, lambda: 0.0)
    assert not patience.spent(0.0, None)
    assert not patience.spent(1000.0, 300)
    assert not patience.spent(1299.0, 300)
    assert patience.spent(1300.0, 300)
    held = Patience(300, lambda: 0.0)
    assert not held.spent(0.0, None)
    assert held.spent(300.0, 300)


def test_bytes_moved_again_are_no_progress(tmp_path: Path) -> None:
    reporter = Pod(tmp_path).context(SPEC).reporter
    reporter.measure_anew()
    first = reporter.transfer("download")
    first(GIB)
    reached = reporter.advanced
    again = reporter.transfer("download")  # the next try
    again(GIB)
    assert reporter.advanced == reached
    again(GIB)
    assert reporter.advanced > reached


def test_a_failure_with_a_patience_of_its_own_is_waited_for_so_long_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = Pod(tmp_path).context(SPEC)
    clock = [0.0]
    monkeypatch.setattr(waiting, "pause", lambda seconds: clock.__setitem__(0, clock[0] + 60))
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    with pytest.raises(StageError) as info:
        wait_until_available(
            ctx, lambda: (_ for _ in ()).throw(StageError(Reason.ACCESS_DENIED, "expired", patience_seconds=300))
        )
    assert info.value.reason is Reason.ACCESS_DENIED
    assert clock[0] == 300


def test_a_bounded_wait_raises_the_last_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = Pod(tmp_path).context(SPEC)
    monkeypatch.setattr(waiting, "pause", lambda seconds: None)
    with pytest.raises(StageError) as info:
        wait_until_available(
            ctx, lambda: (_ for _ in ()).throw(StageError(Reason.STORAGE_UNAVAILABLE, "down")), limit_seconds=0.05
        )
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    assert info.value.consequence is Consequence.WAIT


def test_logs_are_silent_about_libraries_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    set_up({})
    assert os.environ.get("HF_HUB_DISABLE_TELEMETRY") == "1"
