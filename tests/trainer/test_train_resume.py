"""Checkpoints and what goes on from them, in one process: after any interruption the result is the same bytes."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from finetune_api.failures import Reason
from finetune_api.progress import Split
from finetune_api.results import CHECKPOINTS_DIR, TRAIN_RESULT, CheckpointMarker, TrainResult
from finetune_api.spec import EarlyStopping
from finetune_trainer.context import StageContext
from finetune_trainer.errors import Interrupted, StageError
from finetune_trainer.supervisor.run import ENV_RESTARTS, ENV_SPLIT
from finetune_trainer.train import checkpoint_writer, evaluate, fit
from finetune_trainer.train import run as train
from finetune_trainer.train.checkpoints import Checkpoints
from finetune_trainer.train.held_out_curve import is_enough, overfitting
from finetune_trainer.train.owner import claim
from finetune_trainer.train.trainer import LoraTrainer
from tests.support.prepared import PreparedJob, RecordingReporter, prepare_job

STEPS = 12
# 24 rows, 8 to a step in micro-batches of 2: a step is four micro-batches, and an epoch three steps. Dropout draws random numbers.
SPEC: dict[str, Any] = {
    "method": {"type": "LoRA", "lora": {"rank": 4, "dropout": 0.2}},
    "training": {"length": {"steps": STEPS}, "microBatchSequences": 2},
    "recovery": {"checkpoint": {"interval": {"steps": 3}}},
}


@pytest.fixture
def job(s3: Any, tiny_model: Path, tmp_path: Path) -> PreparedJob:
    return prepare_job(s3, tmp_path, tiny_model, **SPEC)


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, micro_batch: int, act: Callable[[], None]) -> None:
    """Once: do something while step ``step`` (from 1) is in its micro-batch ``micro_batch`` (from 1)."""
    original = LoraTrainer.compute_loss
    seen = {"step": 0, "micro": 0, "done": 0}

    def compute_loss(self: LoraTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        now = self.state.global_step + 1
        seen["micro"] = seen["micro"] + 1 if now == seen["step"] else 1
        seen["step"] = now
        loss = original(self, *args, **kwargs)
        if (now, seen["micro"]) == (step, micro_batch) and not seen["done"]:
            seen["done"] = 1
            act()
        return loss

    monkeypatch.setattr(LoraTrainer, "compute_loss", compute_loss)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def adapter(job: PreparedJob) -> dict[str, bytes]:
    store = job.context().output_store()
    return {n: store.get_bytes(f"adapter/{n}") for n in ("adapter_model.safetensors", "adapter_config.json")}


def result(job: PreparedJob) -> TrainResult:
    return job.context().workspace_store().get_model(TRAIN_RESULT, TrainResult)


def curve(job: PreparedJob) -> list[float]:
    lines = job.context().output_store().get_bytes("reports/metrics.jsonl").decode().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def markers(job: PreparedJob) -> dict[str, CheckpointMarker]:
    store = job.context().workspace_store()
    found = [i.key for i in store.list(CHECKPOINTS_DIR) if i.key.endswith("/complete.json")]
    return {k.split("/")[1]: store.get_model(k, CheckpointMarker) for k in found}


def forget_the_result(job: PreparedJob) -> None:
    """Everything that a run leaves, so that the same job can run anew."""
    job.context().workspace_store().delete_prefix("train")
    job.context().workspace_store().delete_prefix(CHECKPOINTS_DIR)
    job.context().output_store().delete_prefix("adapter")


@pytest.mark.parametrize(
    ("method", "begun", "step", "micro_batch", "model"),
    [
        ("LoRA", "Default", 1, 2, {}),
        ("QLoRA", "Default", 5, 1, {"newTokens": ["about", "waits"]}),
        ("LoRA", "PiSSA", 8, 3, {}),
    ],
)
def test_a_run_that_was_told_to_stop_ends_with_the_same_bytes(
    s3: Any,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    begun: str,
    step: int,
    micro_batch: int,
    model: dict[str, Any],
) -> None:
    lora = {**SPEC["method"]["lora"], "initialization": begun}
    job = prepare_job(s3, tmp_path, tiny_model, **{**SPEC, "model": model, "method": {"type": method, "lora": lora}})
    train.run(job.context())
    undisturbed, losses = adapter(job), curve(job)
    forget_the_result(job)

    interrupt(monkeypatch, step, micro_batch, sigterm)
    with pytest.raises(Interrupted) as stopped:
        train.run(job.context(execution="execution-1"))
    # An unfinished step is not finished: what is saved is the last whole one.
    assert f"after step {step - 1}" in stopped.value.message
    if step > 1:
        assert f"checkpoint saved at step {step - 1}" in stopped.value.message
        assert max(m.step for m in markers(job).values()) == step - 1
    assert not job.context().output_store().exists("adapter/adapter_model.safetensors"), "nothing partial is published"

    train.run(job.context(execution="execution-2"))
    assert adapter(job) == undisturbed
    assert curve(job) == losses
    assert result(job).resumed_from_steps == ([step - 1] if step > 1 else [])


def test_optimizer_states_in_8_bit_resume_with_the_same_bytes(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes keeps matrices of 4,096 elements and more in 8 bit; with LoRA+ they are in groups of their own."""
    lora = {**SPEC["method"]["lora"], "rank": 64, "loraPlusLRRatio": 2}
    eight_bit = {**SPEC["training"], "optimizer": {"name": "adamw_8bit", "learningRate": 0.001}}
    job = prepare_job(s3, tmp_path, tiny_model, **{**SPEC, "method": {"lora": lora}, "training": eight_bit})
    train.run(job.context())
    undisturbed = adapter(job)
    forget_the_result(job)
    interrupt(monkeypatch, 6, 2, sigterm)
    with pytest.raises(Interrupted):
        train.run(job.context(execution="execution-1"))
    store = job.context().workspace_store()
    saved = max(i.key for i in store.list(CHECKPOINTS_DIR) if i.key.endswith("optimizer.pt"))
    states = tree_leaves(torch.load(io.BytesIO(store.get_bytes(saved)), weights_only=True))
    assert torch.uint8 in {state.dtype for state in states if isinstance(state, torch.Tensor) and state.numel() >= 4096}
    train.run(job.context(execution="execution-2"))
    assert adapter(job) == undisturbed


def test_any_number_of_interruptions_ends_with_the_same_bytes(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(job.context())
    undisturbed = adapter(job)
    forget_the_result(job)
    for number, step in enumerate((2, 4, 5, 9, 12)):
        with monkeypatch.context() as patch:
            interrupt(patch, step, 3, sigterm)
            with pytest.raises(Interrupted):
                train.run(job.context(execution=f"execution-{number}"))
    train.run(job.context(execution="execution-9"))
    assert adapter(job) == undisturbed
    assert result(job).resumed_from_steps == [1, 3, 4, 8, 11]
    assert len(markers(job)) == 2, "the newest two are kept"


def test_what_was_computed_once_is_not_computed_again(job: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 12, 3, sigterm)
    original, calls = evaluate.greedy_answers, []

    def count(*args: Any, **kwargs: Any) -> list[str]:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluate, "greedy_answers", count)
    with pytest.raises(Interrupted):
        train.run(job.context())
    steps: list[int] = []
    monkeypatch.setattr(train, "report_step", lambda ctx, entry: steps.append(int(entry["step"])))
    train.run(job.context(execution="execution-2"))
    assert steps == [12]
    assert len(calls) == 2, "once for the base, once for the tuned model"


def test_a_pod_lost_after_the_last_step_trains_nothing_again(job: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(train.save, "upload_adapter", lost)
        with pytest.raises(Interrupted):
            train.run(job.context())
    monkeypatch.setattr(LoraTrainer, "compute_loss", lambda *_, **__: pytest.fail("trained again"))
    train.run(job.context(execution="execution-2"))
    assert result(job).resumed_from_steps == [STEPS]
    assert len(curve(job)) == STEPS


def corrupt_newest(job: PreparedJob, file: str) -> None:
    store = job.context().workspace_store()
    key = f"{CHECKPOINTS_DIR}/{max(markers(job))}/{file}"
    data = bytearray(store.get_bytes(key))
    data[len(data) // 2] ^= 1
    store.put_bytes(key, bytes(data))


def truncate_newest(job: PreparedJob) -> None:
    store = job.context().workspace_store()
    key = f"{CHECKPOINTS_DIR}/{max(markers(job))}/optimizer.pt"
    store.put_bytes(key, store.get_bytes(key)[:-100])


def lose_a_file_of_the_newest(job: PreparedJob) -> None:
    job.context().workspace_store().delete(f"{CHECKPOINTS_DIR}/{max(markers(job))}/rng_state.pth")


def lose_the_newest_marker(job: PreparedJob) -> None:
    job.context().workspace_store().delete(f"{CHECKPOINTS_DIR}/{max(markers(job))}/complete.json")


def unreadable_marker(job: PreparedJob) -> None:
    job.context().workspace_store().put_bytes(f"{CHECKPOINTS_DIR}/{max(markers(job))}/complete.json", b'{"step": ')


@pytest.mark.parametrize(
    "damage",
    [
        lambda job: corrupt_newest(job, "adapter_model.safetensors"),
        lambda job: corrupt_newest(job, "optimizer.pt"),
        truncate_newest,
        lose_a_file_of_the_newest,
        lose_the_newest_marker,
        unreadable_marker,
    ],
    ids=["adapter", "optimizer", "truncated", "lost-file", "no-marker", "torn-marker"],
)
def test_a_torn_or_corrupt_checkpoint_gives_way_to_the_newest_valid_one(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch, damage: Callable[[PreparedJob], None]
) -> None:
    train.run(job.context())
    undisturbed = adapter(job)
    forget_the_result(job)
    interrupt(monkeypatch, 8, 2, sigterm)
    with pytest.raises(Interrupted):
        train.run(job.context())
    before = sorted(m.step for m in markers(job).values())
    assert before == [6, 7]
    damage(job)
    train.run(job.context(execution="execution-2"))
    assert result(job).resumed_from_steps == [6]
    assert adapter(job) == undisturbed


def test_a_checkpoint_of_another_configuration_is_never_taken_up(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 8, 2, sigterm)
    with pytest.raises(Interrupted):
        train.run(job.context())
    store = job.context().workspace_store()
    for name, marker in markers(job).items():
        store.put_model(
            f"{CHECKPOINTS_DIR}/{name}/complete.json", marker.model_copy(update={"snapshot_digest": "0" * 64})
        )
    train.run(job.context(execution="execution-2"))
    assert result(job).resumed_from_steps == []


def test_an_execution_that_another_has_replaced_writes_nothing_more(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 5, 1, lambda: claim(job.context().workspace_store(), "execution-2") and None)
    with pytest.raises(StageError, match="execution-2") as caught:
        train.run(job.context(execution="execution-1"))
    assert caught.value.reason is Reason.SUPERSEDED
    assert max(m.step for m in markers(job).values()) <= 4
    assert not job.context().output_store().exists("adapter/adapter_model.safetensors")
    assert not job.context().workspace_store().exists(TRAIN_RESULT)


@pytest.mark.parametrize(
    ("module", "name", "published"),
    [(train.select, "evaluate_and_select", False), (train.verify, "load_freshly", True)],
    ids=["before the adapter", "before the result"],
)
def test_an_execution_that_is_replaced_after_its_last_step_writes_nothing_more(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, published: bool
) -> None:
    original = getattr(module, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        claim(job.context().workspace_store(), "execution-2")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, replaced)
    with pytest.raises(StageError, match="execution-2") as caught:
        train.run(job.context(execution="execution-1"))
    assert caught.value.reason is Reason.SUPERSEDED
    assert job.context().output_store().exists("adapter/adapter_model.safetensors") == published
    assert not job.context().workspace_store().exists(TRAIN_RESULT)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_out_of_memory_goes_on_from_the_last_step_with_a_smaller_split(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(job.context())
    losses = curve(job)
    forget_the_result(job)
    interrupt(monkeypatch, 8, 3, out_of_memory)
    ctx = job.context()
    with pytest.raises(torch.OutOfMemoryError):
        train.run(ctx)
    smaller = Split(
        micro_batch_sequences=1, gradient_accumulation_steps=8, gradient_checkpointing=False, max_sequence_tokens=128
    )
    monkeypatch.setenv(ENV_SPLIT, json.dumps(smaller.to_json_dict()))
    restarts = [{"at": "2026-01-01T00:00:00Z", "reason": "OutOfMemory", "message": "smaller"}]
    monkeypatch.setenv(ENV_RESTARTS, json.dumps(restarts))
    train.run(ctx)  # the same pod: its disk has the checkpoint of step 7
    found = result(job)
    assert found.resumed_from_steps == [7]
    assert found.split == smaller
    assert [r.reason for r in found.restarts] == ["OutOfMemory"]
    assert {"split": smaller} in posts(ctx), "status tells what was changed"
    # Without dropout the curves would be equal; with it, the masks of a smaller micro-batch are other draws.
    assert curve(job)[:7] == losses[:7]
    monkeypatch.delenv(ENV_SPLIT)
    monkeypatch.delenv(ENV_RESTARTS)
    assert train.choose_split(job.snapshot.split, job.context().workspace_store(), {}) == smaller, (
        "a later pod knows it too"
    )


def test_running_out_of_memory_inside_the_optimizer_saves_no_half_changed_weights(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(job.context())
    undisturbed = adapter(job)
    forget_the_result(job)
    original, made = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        done = original(self, *args, **kwargs)
        made.append(1)
        if len(made) == 8:
            out_of_memory()
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    ctx = job.context()
    with pytest.raises(torch.OutOfMemoryError):
        train.run(ctx)
    train.run(ctx)  # the same pod, and its disk
    assert result(job).resumed_from_steps == [6], "the newest whole one: step 8's weights had begun to change"
    assert adapter(job) == undisturbed


def test_with_shorter_sequences_less_of_a_row_is_trained_on(job: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = job.snapshot.split.model_copy(update={"max_sequence_tokens": 16})
    monkeypatch.setenv(ENV_SPLIT, json.dumps(shorter.to_json_dict()))
    longest = []
    original = LoraTrainer.compute_loss

    def compute_loss(self: LoraTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        longest.append(inputs["input_ids"].shape[1])
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "compute_loss", compute_loss)
    train.run(job.context())
    assert max(longest) == 16
    assert result(job).split == shorter


def test_what_a_checkpoint_took_and_why_one_could_not_be_stored_is_told(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status warns of a grace period that is too short by it."""
    monkeypatch.setattr(checkpoint_writer, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("finetune_trainer.memory.peak_bytes", lambda: 123)
    save, failures = Checkpoints.save, [StageError(Reason.STORAGE_FULL, "no more")]

    def saving(self: Checkpoints, *args: Any) -> Any:
        if failures:
            raise failures.pop()
        return save(self, *args)

    monkeypatch.setattr(Checkpoints, "save", saving)
    ctx = job.context()
    train.run(ctx)
    told = [p for p in posts(ctx) if "checkpoint_problem" in p]
    assert told[0] == {"checkpoint_problem": "StorageFull: no more"}
    assert told[1]["checkpoint_problem"] == ""
    assert told[-1]["checkpoint_step"] == STEPS
    assert all(p["checkpoint_seconds"] >= 0 and p["peak_memory_bytes"] == 123 for p in told[1:])


def test_uploads_that_an_earlier_execution_left_are_removed_when_training_begins(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    for key in (f"{job.snapshot.output.key}/adapter/x", f"{job.snapshot.workspace.key}/checkpoints/1/x"):
        s3.client.create_multipart_upload(Bucket=job.bucket, Key=key)
    interrupt(monkeypatch, 1, 1, sigterm)
    with pytest.raises(Interrupted):
        train.run(job.context())
    assert not s3.client.list_multipart_uploads(Bucket=job.bucket).get("Uploads")


def test_checkpoints_by_time_are_made_when_it_is_over(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = {"checkpoint": {"interval": {"seconds": 50}, "keep": 9}}
    job = prepare_job(s3, tmp_path, tiny_model, **{**SPEC, "recovery": recovery})
    clock = Clock()
    monkeypatch.setattr(fit, "time", clock)
    original = LoraTrainer.compute_loss

    def compute_loss(self: LoraTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        clock.now = 20.0 * (self.state.global_step + 1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "compute_loss", compute_loss)
    captured: list[int] = []
    capture = fit.Fit.capture
    monkeypatch.setattr(
        fit.Fit,
        "capture",
        lambda self, trainer, *args: captured.append(trainer.state.global_step) or capture(self, trainer, *args),
    )
    train.run(job.context())
    assert captured == [1, 4, 7, 10, 12], "the first, the last, and one whenever 50 seconds of 20 a step are over"


class Clock:
    """Stands for the module ``time``."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def posts(ctx: StageContext) -> list[dict[str, Any]]:
    assert isinstance(ctx.reporter, RecordingReporter)
    return list(ctx.reporter.posts)


def test_the_curve_after_a_smaller_split_is_the_undisturbed_one(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same rows, same normaliser: without dropout only rounding is left."""
    job = prepare_job(
        s3, tmp_path, tiny_model, **{**SPEC, "method": {"type": "LoRA", "lora": {"rank": 4, "dropout": 0}}}
    )
    train.run(job.context())
    losses = curve(job)
    forget_the_result(job)
    interrupt(monkeypatch, 6, 2, sigterm)
    with pytest.raises(Interrupted):
        train.run(job.context())
    smaller = Split(
        micro_batch_sequences=1, gradient_accumulation_steps=8, gradient_checkpointing=True, max_sequence_tokens=128
    )
    monkeypatch.setenv(ENV_SPLIT, json.dumps(smaller.to_json_dict()))
    train.run(job.context(execution="execution-2"))
    assert curve(job) == pytest.approx(losses, rel=2e-2)
    assert curve(job)[:5] == losses[:5]


def test_a_run_that_diverges_fails_and_says_so(job: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.train.step_log import refuse_divergence

    refuse_divergence([3.0] * 20 + [3.9] * 20)
    refuse_divergence([0.1] * 20 + [0.9] * 20)
    refuse_divergence([3.0] * 20 + [9.0] * 9)
    with pytest.raises(StageError, match=r"was 3.000 at the beginning and is 9.000 now") as caught:
        refuse_divergence([3.0] * 20 + [9.0] * 20)
    assert caught.value.reason is Reason.DIVERGED


def spoil_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Noise on the weights before each micro-batch of a step (from 1)."""
    original = LoraTrainer.compute_loss

    def spoil(self: LoraTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step - 1:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data += torch.randn_like(parameter)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "compute_loss", spoil)


def test_the_best_weights_are_kept_and_chosen(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are spoilt before step 6 of 8."""
    spec = {
        **SPEC,
        "training": {"length": {"steps": 8}, "microBatchSequences": 8},
        "recovery": {"checkpoint": {"interval": {"steps": 1}, "keep": 1}},
        "evaluation": {"intervalSteps": 1},
    }
    job = prepare_job(s3, tmp_path, tiny_model, **spec)
    spoil_before(monkeypatch, step=6)
    train.run(job.context())
    found = result(job)
    lines = job.context().output_store().get_bytes("reports/metrics.jsonl").decode().splitlines()
    measured = {e["step"]: e["held_out_loss"] for e in map(json.loads, lines) if "held_out_loss" in e and e["step"] > 0}
    assert sorted(measured) == list(range(1, 9))
    assert all(0 <= e["token_accuracy"] <= 1 for e in map(json.loads, lines) if "held_out_loss" in e)
    best = min(measured, key=lambda step: measured[step])
    assert best <= 5
    assert found.selected_step == best
    assert found.metrics.held_out_loss == pytest.approx(measured[best], rel=1e-6)
    assert {m.step for m in markers(job).values()} == {best, 8}


def test_training_ends_when_the_held_out_loss_no_longer_falls(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are spoilt before step 6 of 12: the evaluations of steps 6 and 7 bring nothing. An execution that finds all that done
    makes no step more."""
    spec = {
        **SPEC,
        "training": {"length": {"steps": STEPS}, "microBatchSequences": 8},
        "recovery": {"checkpoint": {"interval": {"steps": 1}, "keep": 1}},
        "evaluation": {"intervalSteps": 1, "earlyStopping": {"patience": 2}},
    }
    job = prepare_job(s3, tmp_path, tiny_model, **spec)
    spoil_before(monkeypatch, step=6)
    train.run(job.context())
    first = result(job)
    assert first.metrics.early_stop_step == first.metrics.steps == 7
    assert first.metrics.epochs == pytest.approx(7 / 3)
    assert first.selected_step == 5
    assert len(curve(job)) == 7
    assert "the held-out loss was lowest at step 5" in first.warnings[0]

    job.context().workspace_store().delete(TRAIN_RESULT)
    train.run(job.context(execution="execution-2"))
    second = result(job)
    assert second.metrics.early_stop_step == 7
    assert second.resumed_from_steps == [7]
    assert second.adapter_files == first.adapter_files
    assert len(curve(job)) == 7


def losses_at(*losses: float) -> list[dict[str, Any]]:
    return [{"step": 10 * (n + 1), "held_out_loss": loss} for n, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "rule", "enough"),
    [
        ([3.0, 2.0, 2.1], EarlyStopping(patience=2), False),
        ([3.0, 2.0, 2.1, 2.0], EarlyStopping(patience=2), True),
        ([3.0, 2.0, 2.1, 1.9], EarlyStopping(patience=2), False),
        ([3.0, 2.0, 1.95, 1.92], EarlyStopping(patience=2, threshold=0.1), True),
        ([3.0, 2.0, 1.95, 1.84], EarlyStopping(patience=2, threshold=0.1), False),
        ([1.0, 0.994, 0.988, 0.982], EarlyStopping(patience=3, threshold=0.01), True),
        ([3.0], EarlyStopping(patience=1), False),
        ([], EarlyStopping(patience=1), False),
        ([1.0, 2.0, 3.0, 4.0], None, False),
    ],
)
def test_what_is_enough(losses: list[float], rule: EarlyStopping | None, enough: bool) -> None:
    assert is_enough(losses_at(*losses), rule) is enough
    assert is_enough(list(reversed(losses_at(*losses))), rule) is enough


def test_too_much_training_is_told() -> None:
    assert overfitting(losses_at(2.0, 1.5, 1.51), 3.0, 20) == []
    [best] = overfitting(losses_at(2.0, 1.5, 1.9), 3.0, 20)
    assert "lowest at step 20 (1.5000) and 1.9000 at step 30; the result is what step 20 gave" in best
    [last] = overfitting(losses_at(2.0, 1.5, 1.9), 3.0, None)
    assert "the result is what step 30 gave" in last
    [worse] = overfitting(losses_at(3.3), 3.0, None)
    assert "rose from 3.0000 to 3.3000" in worse
    assert overfitting(losses_at(2.9), 3.0, None) == []
