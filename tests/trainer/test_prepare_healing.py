"""What somebody can mend is waited for, said, and used when it appears."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import finetune_trainer.prepare.run as stage
from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.results import PrepareResult
from finetune_trainer import waiting
from finetune_trainer.context import StageContext
from finetune_trainer.publish import run as publish
from finetune_trainer.train import run as train
from tests.support.hub_server import HubServer
from tests.support.prepare_bench import ROWS, Bench
from tests.support.prepared import prepare_job
from tests.trainer.conftest import S3


def mended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, mend: Callable[[], None], **changes: Any
) -> list[tuple[str, str]]:
    """Run; each pause is recorded with what was reported, and the second one mends."""
    ctx = bench.context(changes)
    seen: list[tuple[str, str]] = []

    def pause(seconds: float) -> None:
        reported = ctx.reporter._waiting
        assert reported is not None
        seen.append((reported.reason, reported.message))
        assert 0 < seconds <= 11
        if len(seen) == 2:
            mend()

    monkeypatch.setattr(waiting, "pause", pause)
    stage.run(ctx)
    assert ctx.reporter._waiting is None
    return seen


def test_missing_secrets_are_waited_for_and_used_when_they_appear(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(ROWS)
    for slot in ("output", "model", "train-0"):
        for file in (bench.pod.secrets / slot).iterdir():
            file.unlink()
        restore = partial(bench.s3.write_secret, bench.pod.secrets / slot)
        seen = mended(bench, monkeypatch, restore, training={"seed": len(slot)})
        assert [reason for reason, _ in seen] == [Reason.SECRET_MISSING] * 2
        assert f"Secret s3 (for {slot}) does not exist or is empty" in seen[0][1]


def test_unreachable_endpoints_are_waited_for_and_used_when_they_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(ROWS)
    for slot in ("output", "train-0"):
        bench.s3.write_secret(bench.pod.secrets / slot, endpoint="http://127.0.0.1:9")
        restore = partial(bench.s3.write_secret, bench.pod.secrets / slot)
        seen = mended(bench, monkeypatch, restore, training={"seed": len(slot)})
        assert {reason for reason, _ in seen} == {Reason.STORAGE_UNAVAILABLE}
        assert "http://127.0.0.1:9" in seen[0][1]


def test_a_hub_that_fails_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, hub: HubServer, tiny_model: Path
) -> None:
    bench.put(ROWS)
    hub.add_model("org/tiny", tiny_model)
    hub.faults.unavailable = -1
    change = {"uri": "hf://org/tiny", "endpointURL": hub.endpoint, "secretRef": None}
    seen = mended(bench, monkeypatch, lambda: setattr(hub.faults, "unavailable", 0), model=change)
    assert {reason for reason, _ in seen} == {Reason.HUB_UNAVAILABLE}
    assert PrepareResult.model_validate_json(bench.object("prepare/result.json")).model_commit


@pytest.mark.parametrize(("stage", "run"), [(Stage.TRAIN, train.run), (Stage.PUBLISH, publish.run)])
@pytest.mark.parametrize("fault", ["no Secret", "wrong endpoint"])
def test_later_stages_wait_for_the_output_too(
    s3: S3, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    stage: Stage, run: Callable[[StageContext], object], fault: str,
) -> None:  # fmt: skip
    job = prepare_job(s3, tmp_path, tiny_model)
    ctx = job.context(stage)
    secret = ctx.secrets_dir / "output"
    if fault == "no Secret":
        shutil.rmtree(secret)
    else:
        s3.write_secret(secret, endpoint="http://127.0.0.1:9")
    seen: list[str] = []

    def pause(seconds: float) -> None:
        assert ctx.reporter._waiting is not None
        seen.append(ctx.reporter._waiting.reason)
        s3.write_secret(secret)

    class Opened(Exception):
        pass

    def opened(*_: object) -> None:
        raise Opened

    monkeypatch.setattr(waiting, "pause", pause)
    monkeypatch.setattr(train, "pick_compute", opened)
    monkeypatch.setattr(publish, "read_train_result", opened)
    with pytest.raises(Opened):
        run(ctx)
    assert seen == [Reason.SECRET_MISSING if fault == "no Secret" else Reason.STORAGE_UNAVAILABLE]
