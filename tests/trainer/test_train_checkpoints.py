"""Checkpoints in the bucket and on the pod's disk: which count, who may delete them, and what a bad moment does to them."""

from __future__ import annotations

import json
import signal
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from finetune_api.failures import Reason
from finetune_api.results import CHECKPOINTS_DIR, TRAIN_OWNER
from finetune_trainer import waiting
from finetune_trainer.errors import Interrupted, StageError
from finetune_trainer.s3 import S3Store
from finetune_trainer.train import checkpoints as module
from finetune_trainer.train import evaluate
from finetune_trainer.train import run as train
from finetune_trainer.train.capture import Captured, random_states, write_files
from finetune_trainer.train.checkpoints import Checkpoints, folder_name
from finetune_trainer.train.owner import claim, read_owner
from finetune_trainer.train.trainer import LoraTrainer
from tests.support.prepared import PreparedJob, prepare_job
from tests.trainer.test_train_resume import (
    SPEC,
    adapter,
    corrupt_newest,
    forget_the_result,
    interrupt,
    markers,
    result,
    sigterm,
)

AWAY = StageError(Reason.STORAGE_UNAVAILABLE, "the store is away")


@pytest.fixture
def job(s3: Any, tiny_model: Path, tmp_path: Path) -> PreparedJob:
    return prepare_job(s3, tmp_path, tiny_model, **SPEC)


def checkpoints(job: PreparedJob, execution: str, keep: int = 2) -> Checkpoints:
    ctx = job.context(execution=execution)
    store = ctx.workspace_store()
    owner = claim(store, execution)
    return Checkpoints(
        store, ctx.work_dir / "checkpoints", owner, job.snapshot.digest(), job.snapshot.split, total_steps=12, keep=keep
    )


def captured(step: int, loss: float | None = None) -> Captured:
    weights = {"a.lora_A.weight": torch.full((2, 2), float(step))}
    return Captured(step, weights, {"r": 2}, {"step": step}, {}, None, [random_states()], "{}", {}, loss)


def names(job: PreparedJob) -> set[str]:
    return {info.key.split("/")[1] for info in job.context().workspace_store().list(CHECKPOINTS_DIR)}


def test_a_corrupt_checkpoint_counts_for_nothing(job: PreparedJob) -> None:
    """Neither as one of those that are kept, nor as the best."""
    first = checkpoints(job, "execution-1")
    for step, loss in ((3, 2.0), (6, 1.0)):
        first.save(captured(step, loss))
    corrupt_newest(job, "adapter_model.safetensors")
    second = checkpoints(job, "execution-2", keep=1)
    restored = second.newest()
    assert restored is not None
    assert restored.marker.step == 3
    best = second.best()
    assert best is not None
    assert best.step == 3
    second.save(captured(4, loss=2.5))
    assert names(job) == {folder_name(3, "execution-1"), folder_name(4, "execution-2")}


def test_what_a_later_execution_writes_is_never_deleted(job: PreparedJob) -> None:
    first = checkpoints(job, "execution-1", keep=1)
    first.newest()
    first.save(captured(3))
    # A later one is in the middle of its first upload: its folder has no marker yet, and the owner's record is still ours.
    later = f"{CHECKPOINTS_DIR}/{folder_name(4, 'execution-2')}/optimizer.pt"
    job.context().workspace_store().put_bytes(later, b"half")
    first.save(captured(5))
    assert names(job) == {folder_name(4, "execution-2"), folder_name(5, "execution-1")}
    claim(job.context().workspace_store(), "execution-2")
    first.known["00000001-execution-1"] = first.known[folder_name(5, "execution-1")]
    first.keep = 0
    with pytest.raises(StageError) as caught:
        first.prune()
    assert caught.value.reason is Reason.SUPERSEDED
    assert folder_name(5, "execution-1") in names(job)


def test_saving_that_is_tried_again_goes_on_with_the_same_files(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def count(state: Captured, folder: Path) -> None:
        written.append(state.step)
        write_files(state, folder)

    monkeypatch.setattr(module, "write_files", count)
    upload = S3Store.upload_dir
    failures = [AWAY, AWAY]

    def upload_dir(self: S3Store, *args: Any) -> Any:
        if failures:
            raise failures.pop()
        return upload(self, *args)

    monkeypatch.setattr(S3Store, "upload_dir", upload_dir)
    ours, state = checkpoints(job, "execution-1"), captured(3)
    for _ in range(2):
        with pytest.raises(StageError):
            ours.save(state)
        assert markers(job) == {}, "the marker comes last"
    ours.save(state)
    assert written == [3]


def test_an_execution_that_loses_the_job_while_it_uploads_completes_nothing(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, upload = checkpoints(job, "execution-1"), S3Store.upload_dir

    def upload_dir(self: S3Store, *args: Any) -> Any:
        sent = upload(self, *args)
        claim(self, "execution-2")
        return sent

    monkeypatch.setattr(S3Store, "upload_dir", upload_dir)
    with pytest.raises(StageError) as caught:
        ours.save(captured(3))
    assert caught.value.reason is Reason.SUPERSEDED
    assert markers(job) == {}


def test_old_checkpoints_that_cannot_be_deleted_do_not_undo_a_new_one(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours = checkpoints(job, "execution-1", keep=1)
    ours.save(captured(3))

    def away(*_: Any) -> None:
        raise AWAY

    monkeypatch.setattr(S3Store, "delete", away)
    assert ours.save(captured(6)).marker.step == 6
    assert "old checkpoints stay for now" in caplog.text


def test_reading_a_checkpoint_waits_for_a_store_that_is_away_and_goes_on_with_what_is_here(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 5, 1, sigterm)
    with pytest.raises(Interrupted):
        train.run(job.context())
    monkeypatch.setattr(waiting, "pause", lambda _: None)
    download, fetched = S3Store.download_file, []

    def unsteady(self: S3Store, key: str, *args: Any) -> Any:
        if key.startswith(CHECKPOINTS_DIR):
            fetched.append(key)
            if len(fetched) == 3:
                raise AWAY
        return download(self, key, *args)

    monkeypatch.setattr(S3Store, "download_file", unsteady)
    train.run(job.context(execution="execution-2"))
    assert result(job).resumed_from_steps == [4]
    assert len(fetched) == len(set(fetched)) + 1, "what had arrived was not fetched again"


def test_a_checkpoint_that_is_written_late_holds_its_own_steps_only(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on while a slow store has the writer wait."""
    job = prepare_job(
        s3, tmp_path, tiny_model, **{**SPEC, "recovery": {"checkpoint": {"interval": {"steps": 3}, "keep": 9}}}
    )
    late: dict[int, Any] = {}
    weights: dict[int, list[dict[str, torch.Tensor]]] = defaultdict(list)

    def write_late(state: Captured, folder: Path) -> None:
        if state.step == 3 and not reached_six.is_set():
            weights[3].append({name: tensor.clone() for name, tensor in state.adapter.items()})
            assert reached_six.wait(60)
        write_files(state, folder)
        late[state.step] = json.loads((folder / "progress.json").read_text())
        weights[state.step].append({name: tensor.clone() for name, tensor in state.adapter.items()})

    reached_six = threading.Event()
    monkeypatch.setattr(module, "write_files", write_late)
    interrupt(monkeypatch, 6, 1, reached_six.set)
    train.run(job.context())
    for step, progress in late.items():
        assert [entry["step"] for entry in progress["log"]["steps"]] == list(range(1, step + 1))
        assert len(progress["blocked_seconds"]) <= step
    before, after = weights[3]
    assert all(torch.equal(before[name], after[name]) for name in before), "copies, which the steps since do not reach"
    assert not all(torch.equal(before[name], weights[6][0][name]) for name in before)


def test_a_process_that_was_started_again_does_not_take_the_job_back(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node was declared lost; it hung, and its supervisor starts it again while a later execution has the job."""
    store = job.context().workspace_store()
    claim(store, "execution-1")
    claim(store, "execution-2")
    aborted: list[str] = []
    monkeypatch.setattr(S3Store, "abort_orphans", lambda self, *_: aborted.append(self.uri()) or 0)
    ctx = job.context(execution="execution-1")
    (ctx.work_dir / train.CLAIMED_FILE).touch()
    with pytest.raises(StageError, match="execution-2") as caught:
        train.run(ctx)
    assert caught.value.reason is Reason.SUPERSEDED
    owner = read_owner(store)
    assert owner is not None
    assert owner.execution_id == "execution-2"
    assert aborted == []
    assert store.exists(TRAIN_OWNER)


EVALUATING = {
    **SPEC,
    "training": {"length": {"steps": 8}, "microBatchSequences": 4},
    "evaluation": {"intervalSteps": 2, "generation": {"prompts": 0}},
    "recovery": {"checkpoint": {"interval": {"steps": 2}, "keep": 1}},
}


def during_evaluation(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Once: do something in the middle of the ``number``-th evaluation (the base's is the first)."""
    original, seen = evaluate.held_out_loss, []

    def held_out_loss(*args: Any, **kwargs: Any) -> evaluate.HeldOutLoss:
        seen.append(1)
        if len(seen) == number:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluate, "held_out_loss", held_out_loss)


def measured(job: PreparedJob) -> dict[int, float]:
    lines = job.context().output_store().get_bytes("reports/metrics.jsonl").decode().splitlines()
    return {e["step"]: e["held_out_loss"] for e in map(json.loads, lines) if "held_out_loss" in e}


def test_sigterm_cuts_an_evaluation_short_and_whoever_goes_on_makes_good_for_it(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which weights are the best does not depend on when the run was interrupted."""
    job = prepare_job(s3, tmp_path, tiny_model, **EVALUATING)
    train.run(job.context())
    undisturbed, losses = adapter(job), measured(job)
    assert sorted(losses) == [0, 2, 4, 6, 8]
    forget_the_result(job)

    with monkeypatch.context() as patch:
        during_evaluation(patch, 3, sigterm)
        with pytest.raises(Interrupted) as stopped:
            train.run(job.context(execution="execution-1"))
    assert "checkpoint saved at step 4" in stopped.value.message
    assert stopped.value.result == {"step": 4, "checkpointStep": 4}
    assert markers(job)[folder_name(4, "execution-1")].held_out_loss is None

    with monkeypatch.context() as patch:
        interrupt(patch, 6, 1, sigterm)
        with pytest.raises(Interrupted):
            train.run(job.context(execution="execution-2"))
    found = {m.step: m.held_out_loss for m in markers(job).values()}
    assert found == {4: pytest.approx(losses[4]), 5: None}, "it is the best so far, and kept for that"

    train.run(job.context(execution="execution-3"))
    assert measured(job) == losses
    assert adapter(job) == undisturbed


def sigterm_at(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Have this process told to stop when it begins something."""
    if moment.endswith("evaluation"):
        during_evaluation(monkeypatch, 1 if moment == "base evaluation" else 2, sigterm)
        return
    module, name = {
        "loading": (train.model, "load_base"),
        "saving": (train.save, "upload_adapter"),
        "verifying": (train.verify, "load_freshly"),
    }[moment]
    original = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        sigterm()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize("moment", ["loading", "base evaluation", "final evaluation", "saving", "verifying"])
def test_sigterm_at_any_moment_loses_no_step(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    job = prepare_job(s3, tmp_path, tiny_model, **{**SPEC, "training": {"length": {"steps": 4}}})
    train.run(job.context())
    undisturbed = adapter(job)
    forget_the_result(job)

    def told(_signum: int, _frame: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGTERM, told)
    try:
        with monkeypatch.context() as patch:
            sigterm_at(patch, moment)
            with pytest.raises(Interrupted):
                train.run(job.context(execution="execution-1"))
    finally:
        signal.signal(signal.SIGTERM, before)
    computed: list[int] = []
    original = LoraTrainer.compute_loss

    def count(self: LoraTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        computed.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "compute_loss", count)
    train.run(job.context(execution="execution-2"))
    assert adapter(job) == undisturbed
    assert bool(computed) == (moment in ("loading", "base evaluation")), "what was computed is not computed again"


def test_checkpoints_hold_nothing_of_the_base(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    job = prepare_job(s3, tmp_path, tiny_model, **SPEC)
    train.run(job.context())
    store = job.context().workspace_store()
    newest = max(markers(job))
    path = tmp_path / "adapter.safetensors"
    store.download_file(f"{CHECKPOINTS_DIR}/{newest}/adapter_model.safetensors", path)
    with safe_open(path, framework="pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118 - safe_open is no mapping
    base = sum(p.stat().st_size for p in tiny_model.glob("*.safetensors"))
    assert sum(f.size for m in markers(job).values() for f in m.files if m.step == 12) < base
