"""The optimization with its checkpoints: from the newest one on, to the last step or to the moment it is told to stop."""
# ruff: noqa: ARG002 - signatures are transformers'

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune_api.failures import GPU_PATIENCE_SECONDS, Reason
from finetune_api.optimizers import SCHEDULE_FREE
from finetune_api.progress import Restart, Split
from finetune_api.spec import CheckpointInterval
from finetune_trainer import heartbeat, memory
from finetune_trainer.context import StageContext
from finetune_trainer.errors import Interrupted, StageError
from finetune_trainer.text import shorten
from finetune_trainer.train import evaluate
from finetune_trainer.train.averaging import averaged, to_average
from finetune_trainer.train.capture import OPTIMIZER_FILE, PROGRESS_FILE, Captured, capture, weights_file
from finetune_trainer.train.checkpoint_writer import CheckpointWriter
from finetune_trainer.train.checkpoints import Checkpoints, Restored, Saved
from finetune_trainer.train.device import Compute
from finetune_trainer.train.evaluate import HeldOutLoss
from finetune_trainer.train.held_out_curve import evaluation_line, is_enough
from finetune_trainer.train.model import causal_lm, take_up
from finetune_trainer.train.packing import keeps_rows_apart
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.rows import Rows
from finetune_trainer.train.schedule import Schedule
from finetune_trainer.train.step_log import StepLog
from finetune_trainer.train.stop import DeferredStop, TrainingStopped
from finetune_trainer.train.trainer import LoraTrainer, training_arguments
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)
T = TypeVar("T")
OUT_OF_MEMORY_UPLOAD_SECONDS = 60.0
"""A checkpoint after an out-of-memory error is on this pod's disk already: its upload is not waited for longer."""


@dataclass
class History:
    """What earlier executions did and this one goes on with."""

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    blocked_seconds: list[float] = field(default_factory=list)
    """How long each checkpoint held the step loop up."""
    warnings: list[str] = field(default_factory=list)
    """What a reader of the result should know."""


@dataclass
class Fit:
    """Everything that the optimization needs, and its history."""

    ctx: StageContext
    compute: Compute
    model: Any
    """With an adapter (PeftModel), or with weights of its own that are trained."""
    rows: Rows
    held_out: Rows
    pad_id: int
    schedule: Schedule
    split: Split
    checkpoints: Checkpoints
    steps: StepLog
    history: History
    ranks: Ranks = field(default_factory=Ranks)
    first_weights: Callable[[], None] = lambda: None
    """Called where there is no checkpoint."""

    def run(self) -> None:
        """Train to the last step. The newest checkpoint's state is taken up first, if there is one.

        Raises:
            Interrupted: told to stop; the last completed step is saved.
            StageError: NonFiniteLoss, Diverged, Superseded; what kept the last checkpoint from being stored.
        """
        restored = self.here(self.ranks.share(lambda: self.patiently(self.checkpoints.newest)))
        start = self._take_up(restored)
        self.ctx.reporter.report(resumed_from_step=start, step=start, total_steps=self.schedule.steps)
        if restored is None:
            self.first_weights()
        elif self._is_complete(restored):
            log.info("all %d steps are made: the weights are those of the last checkpoint", start)
            self.load(restored)
            return
        writer = CheckpointWriter(self.checkpoints, self._told, self._not_stored) if self.ranks.first else None
        trainer = self._trainer(start, writer)
        try:
            with DeferredStop() as stop:
                trainer.should_stop = lambda: stop.requested
                self._train(trainer, writer, restored)
                saved = writer.finish() if writer is not None else None
                if self.ranks.any(stop.requested):
                    raise _stopped(self.last_step, saved)
        finally:
            if writer is not None:
                writer.close()

    @property
    def last_step(self) -> int:
        """The newest step that was made, the last one once training has ended."""
        return int(self.steps.steps[-1]["step"])

    def is_enough(self) -> bool:
        """Whether evaluation.earlyStopping ends training here: by the first rank's evaluations, for all of them."""
        rule = self.ctx.snapshot.spec.evaluation.early_stopping
        return rule is not None and self.ranks.any(self.ranks.first and is_enough(self.history.evaluations, rule))

    def _is_complete(self, restored: Restored) -> bool:
        """Whether a checkpoint is the end of training."""
        if restored.marker.step == self.schedule.steps:
            return True
        if self.ranks.computes:
            self._measure(restored)
        return self.is_enough()

    def _train(self, trainer: LoraTrainer, writer: CheckpointWriter | None, restored: Restored | None) -> None:
        start = trainer.start_step
        try:
            trainer.train(resume_from_checkpoint=str(restored.folder) if restored else None)
        except TrainingStopped:
            # All ranks are here, at the same micro-batch.
            step = trainer.state.global_step
            states = self.ranks.gather(trainer.step_random)
            if writer is None:
                raise _stopped(step, None) from None
            if step > max(start, writer.submitted):
                writer.submit(self.capture(trainer, states))
            saved = writer.finish()
            if saved is None and restored is not None:
                saved = Saved(restored.marker)
            raise _stopped(step, saved) from None
        except torch.OutOfMemoryError:
            # Weights and optimizer are as the last completed step left them, unless it was the optimizer that ran out.
            if trainer.state.global_step > start and not trainer.updating:
                self._save_after_out_of_memory(trainer, writer)
            raise
        if self.averages:
            to_average(self.model, trainer.optimizer.state_dict())

    def _save_after_out_of_memory(self, trainer: LoraTrainer, writer: CheckpointWriter | None) -> None:
        """Any rank may be the one, and the others cannot be asked for their random states: the smaller split draws others anyway."""
        captured = self.capture(trainer, [trainer.step_random])
        self.checkpoints.save_locally(captured)
        if writer is None:
            return
        if captured.step > writer.submitted:
            writer.submit(captured)
        try:
            writer.finish(OUT_OF_MEMORY_UPLOAD_SECONDS)
        except StageError as error:
            if error.reason is Reason.SUPERSEDED:
                raise
            log.warning("the next process starts from this pod's disk: %s", error)

    @property
    def averages(self) -> bool:
        """Whether what was learned is the average of the weights that training goes on with."""
        return self.ctx.snapshot.spec.training.optimizer.name in SCHEDULE_FREE

    def load(self, restored: Restored) -> None:
        """A checkpoint's weights into the adapter, or into the model itself, as they are evaluated and published."""
        take_up(self.model, load_file(restored.folder / weights_file(isinstance(self.model, PeftModel))))
        if self.averages:
            to_average(self.model, torch.load(restored.folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True))

    def capture(
        self, trainer: LoraTrainer, states: list[dict[str, Any]], held_out_loss: float | None = None
    ) -> Captured:
        """The state after the last completed step, as training goes on with it."""
        progress = {
            "log": self.steps.as_progress(),
            "evaluations": list(self.history.evaluations),
            "resumed_from": list(self.history.resumed_from),
            "restarts": [r.to_json_dict() for r in self.history.restarts],
            "blocked_seconds": list(self.history.blocked_seconds),
            "warnings": list(self.history.warnings),
        }
        return capture(trainer, states, progress, held_out_loss)

    def evaluate(self, stopped: Callable[[], bool] = evaluate.never) -> HeldOutLoss:
        """Held-out loss of the model as it is.

        Raises:
            TrainingStopped: ``stopped`` said so between two batches.
        """
        base, divisor = causal_lm(self.model), self.split.evaluation_divisor

        def agreed() -> bool:
            return self.ranks.any(stopped()) if self.ranks.sharded else stopped()

        own = evaluate.held_out_loss(base, self.held_out, self.pad_id, self.compute, divisor=divisor, stopped=agreed)
        # On GPUs the last bits may differ, and what follows must not.
        return self.ranks.share(lambda: own) if self.ranks.sharded else own

    def here(self, restored: Restored | None) -> Restored | None:
        """A checkpoint that the first rank has restored, on this node's disk.

        Raises:
            StageError: RankFailure, if it has become incomplete meanwhile; what the store raises.
        """
        if restored is None or self.ranks.node is None:
            return restored
        name, marker = restored.folder.name, restored.marker
        found = self.ranks.on_node(lambda: self.patiently(lambda: self.checkpoints.restore(name, marker)))
        if found is None:
            raise StageError(
                Reason.RANK_FAILURE, f"checkpoint {name} was whole on the first node, and is not any more."
            )
        return found

    def patiently(self, call: Callable[[], T]) -> T:
        """A store that is away is waited for as long as a stage that holds a GPU may."""
        return wait_until_available(self.ctx, call, limit_seconds=GPU_PATIENCE_SECONDS)

    def _measure(self, restored: Restored) -> None:
        """Make good for an evaluation that was due at the step gone on from and was cut short: which weights are the best must not
        depend on when a run was interrupted."""
        step, every = restored.marker.step, self.ctx.snapshot.spec.evaluation.interval_steps
        if every is None or step % every or any(e["step"] == step for e in self.history.evaluations):
            return
        self.load(restored)
        heartbeat.begin("Evaluating")
        measured = self.evaluate()
        heartbeat.begin("Training")
        self.record(step, measured)
        if self.ranks.first:
            self.patiently(lambda: self.checkpoints.measured(restored, measured.loss))

    def record(self, step: int, measured: HeldOutLoss) -> None:
        """What was measured at a step."""
        self.history.evaluations.append(measured.line(step))
        self.ctx.reporter.report(held_out_loss=measured.loss)
        log.info("held-out loss at step %d: %.4f", step, measured.loss)

    def _take_up(self, restored: Restored | None) -> int:
        if restored is None:
            return 0
        progress = json.loads((restored.folder / PROGRESS_FILE).read_text())
        self.steps.restore(progress["log"])
        history, marker = self.history, restored.marker
        history.evaluations = progress["evaluations"]
        if marker.held_out_loss is not None and all(e["step"] != marker.step for e in history.evaluations):
            history.evaluations.append(evaluation_line(marker.step, marker.held_out_loss))
        history.blocked_seconds = progress["blocked_seconds"]
        history.warnings = progress.get("warnings", [])  # an image before this one kept none
        known = [Restart.model_validate(r) for r in progress["restarts"]]
        history.restarts = [*known, *(r for r in history.restarts if r not in known)]
        history.resumed_from = [*progress["resumed_from"], marker.step]
        log.info("goes on from the checkpoint of step %d by execution %s", marker.step, marker.execution_id)
        if marker.world_size != self.ranks.size:
            log.warning(
                "that checkpoint was made by %d ranks, this run has %d: same rows, same normaliser, other rounding",
                marker.world_size,
                self.ranks.size,
            )
        return marker.step

    def _trainer(self, start: int, writer: CheckpointWriter | None) -> LoraTrainer:
        spec = self.ctx.snapshot.spec
        saving = Checkpointing(self, writer, start, spec.recovery.checkpoint.interval, spec.evaluation.interval_steps)
        trainer = LoraTrainer(
            model=self.model,
            args=training_arguments(
                self.ctx.snapshot,
                self.compute,
                self.schedule.steps,
                self.ctx.work_dir / "trainer",
                self.split,
                self.ranks,
            ),
            rows=self.rows,
            schedule=self.schedule,
            micro_batch=self.split.micro_batch_sequences,
            pad_id=self.pad_id,
            compute=self.compute,
            callbacks=[self.steps, saving],
            start_step=start,
            ranks=self.ranks,
            packing=self._packing(),
            galore=self.ctx.snapshot.plan.galore,
            loraplus_lr_ratio=self.ctx.snapshot.plan.method.lora.loraplus_lr_ratio,
        )
        saving.trainer = trainer
        return trainer

    def _packing(self) -> bool:
        """Whether rows are packed: as asked for, if the model keeps them apart."""
        if not self.ctx.snapshot.spec.training.packing:
            return False
        base = causal_lm(self.model)
        apart = keeps_rows_apart(base, self.rows, self.compute)
        # On GPUs the last bits may differ, and what follows must not.
        apart = self.ranks.share(lambda: apart)
        if not apart:
            warning = (
                f"training.packing: {type(base).__name__} does not keep packed rows apart, so they were not packed"
            )
            log.warning("%s", warning)
            if warning not in self.history.warnings:
                self.history.warnings.append(warning)
        return apart

    def _told(self, saved: Saved) -> None:
        """Called in the writer's thread."""
        log.info("checkpoint of step %d is in the bucket (%.1f s)", saved.marker.step, saved.seconds)
        self.ctx.reporter.report(
            checkpoint_problem="",
            checkpoint_step=saved.marker.step,
            checkpoint_seconds=round(saved.seconds, 1),
            peak_memory_bytes=memory.peak_bytes(),
        )

    def _not_stored(self, error: StageError) -> None:
        """Called in the writer's thread."""
        self.ctx.reporter.report(checkpoint_problem=shorten(f"{error.reason}: {error.message}", 1024))


class Checkpointing(TrainerCallback):  # type: ignore[misc]
    """Evaluates and checkpoints when it is time. Stands behind the step log, whose entry of the step is part of a checkpoint."""

    def __init__(
        self,
        fit: Fit,
        writer: CheckpointWriter | None,
        start: int,
        interval: CheckpointInterval,
        evaluate_every: int | None,
    ) -> None:
        self._fit = fit
        self._writer = writer
        self._first = start + 1
        self._interval = interval
        self._evaluate_every = evaluate_every
        self._last = time.monotonic()
        self.trainer: LoraTrainer | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """After each step.

        Raises:
            StageError: Superseded.
        """
        if "loss" not in logs:
            return
        if self._writer is not None and self._writer.failure is not None:
            raise self._writer.failure
        assert self.trainer is not None
        fit, step, total = self._fit, state.global_step, self._fit.schedule.steps
        measure = self._evaluate_every is not None and step % self._evaluate_every == 0 and step < total
        held_out = self._evaluate(step) if measure and fit.ranks.computes else None
        if measure and fit.is_enough():
            log.info("the held-out loss no longer falls: training ends after step %d of %d", step, total)
            control.should_training_stop = True
        began = time.monotonic()
        # By the first one's clock.
        due = held_out is not None or is_due(step, total, self._first, self._interval, began - self._last)
        if not fit.ranks.any(fit.ranks.first and due):
            return
        self._last = began
        states = fit.ranks.gather(self.trainer.step_random)
        if self._writer is not None:
            self._writer.submit(fit.capture(self.trainer, states, held_out))
            fit.history.blocked_seconds.append(round(time.monotonic() - began, 4))

    def _evaluate(self, step: int) -> float | None:
        """None when training is to stop: an evaluation may take longer than the grace period. Whoever goes on measures again."""
        assert self.trainer is not None
        heartbeat.begin("Evaluating")
        learned = (
            averaged(self._fit.model, self.trainer.optimizer.state_dict()) if self._fit.averages else nullcontext()
        )
        try:
            with learned:
                measured = self._fit.evaluate(self.trainer.should_stop)
        except TrainingStopped:
            return None
        finally:
            heartbeat.begin("Training")
        self._fit.record(step, measured)
        return measured.loss


def is_due(step: int, total: int, first: int, interval: CheckpointInterval, seconds: float) -> bool:
    """Whether a step is to be checkpointed: the first of an execution (which also measures how long one takes), the last, and
    every so many steps or seconds between."""
    if step in (first, total):
        return True
    if interval.steps is not None:
        return step % interval.steps == 0
    assert interval.seconds is not None
    return seconds >= interval.seconds


def _stopped(step: int, saved: Saved | None) -> Interrupted:
    told = f"told to stop (SIGTERM) after step {step}"
    if saved is None:
        return Interrupted(f"{told}; nothing to save yet", {"step": step})
    kept = saved.marker.step
    text = f"{told}; checkpoint saved at step {kept} in {saved.seconds:.0f} s"
    return Interrupted(text, {"step": step, "checkpointStep": kept})
