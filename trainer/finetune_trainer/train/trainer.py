"""The optimization: transformers' Trainer, with our data schedule and our loss."""
# ruff: noqa: ARG002 - signatures are transformers'

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from finetune_api.failures import Reason
from finetune_api.snapshot import Snapshot
from finetune_api.spec import Scheduler
from finetune_trainer.errors import StageError
from finetune_trainer.train.device import Compute
from finetune_trainer.train.loss import LearnedTokenLoss, learned_tokens
from finetune_trainer.train.rows import Rows, collate
from finetune_trainer.train.schedule import Schedule

# Ours reports; transformers' own callback for the same purpose serves users' images.
os.environ["DISABLE_KUBEFLOW_INTEGRATION"] = "TRUE"

SCHEDULERS = {Scheduler.COSINE: "cosine", Scheduler.LINEAR: "linear", Scheduler.CONSTANT: "constant_with_warmup"}


class LoraTrainer(Trainer):  # type: ignore[misc]
    """One optimizer step = one step of the schedule, however it is cut into micro-batches.

    Why not trl's SFTTrainer: rows arrive tokenised and labelled, so its data handling has nothing to do, and the rest works
    against this design (trl 1.16): it casts trainables to bfloat16 on 4-bit bases after they were made float32, patches
    the model's forward for good, which evaluation and answers go through too, and computes entropy and accuracy over the whole
    vocabulary for every token, learned or not, at every step. Its loss, NLL by the sum of learned tokens, is the one below.
    """

    def __init__(
        self, *, model: Any, args: TrainingArguments, rows: Rows, schedule: Schedule, micro_batch: int, pad_id: int,
        compute: Compute, callbacks: list[TrainerCallback],
    ) -> None:  # fmt: skip
        args._n_gpu = min(1, args.n_gpu)  # several visible GPUs in one process would become nn.DataParallel
        super().__init__(model=model, args=args, callbacks=callbacks)
        self.remove_callback(PrinterCallback)  # StepLog logs
        # The loss is already divided by the learned tokens of the whole step (see compute_loss).
        self.model_accepts_loss_kwargs = True
        self.rows = rows
        self.schedule = schedule
        self.micro_batch = micro_batch
        self.pad_id = pad_id
        self.compute = compute
        self.nll = LearnedTokenLoss(model.get_base_model())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of the whole run, in the schedule's order, as one epoch of Trainer's."""
        return DataLoader(
            range(self.schedule.rows),  # type: ignore[arg-type]
            batch_sampler=_MicroBatches(self.schedule, self.micro_batch),
            collate_fn=lambda indices: collate(self.rows, indices, self.pad_id),
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """The normaliser of a step: its learned tokens, over all micro-batches."""
        return torch.tensor(sum(learned_tokens(b["labels"]) for b in batch_samples), device=device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This micro-batch's share of the step's mean NLL.

        Raises:
            StageError: NonFiniteLoss, before the weights take it in.
        """
        with self.compute.autocast():
            loss: torch.Tensor = self.nll(inputs) / num_items_in_batch.clamp(min=1)
        if not math.isfinite(loss.item()):
            raise StageError(
                Reason.NON_FINITE_LOSS,
                f"the training loss became {loss.item()} at step {self.state.global_step + 1} of {self.state.max_steps} "
                f"(learning rate {self._get_learning_rate():.3g}).",
            )
        return loss


class _MicroBatches(Sampler[list[int]]):
    """Row ids of each micro-batch. Every step but the last has the same number of them."""

    def __init__(self, schedule: Schedule, micro_batch: int) -> None:
        self._schedule = schedule
        self._micro_batch = micro_batch

    def __len__(self) -> int:
        full = self._schedule.steps - 1
        last = len(self._schedule.step_rows(full))
        return full * (self._schedule.global_batch // self._micro_batch) + math.ceil(last / self._micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._schedule.steps):
            yield from self._schedule.micro_batches(step, self._micro_batch)


class StepLog(TrainerCallback):  # type: ignore[misc]
    """Calls ``on_step`` with the numbers of each optimizer step and keeps them."""

    def __init__(self, schedule: Schedule, rows: Rows, on_step: Callable[[dict[str, float]], None]) -> None:
        self._schedule = schedule
        self._rows = rows
        self._on_step = on_step
        self._started = 0.0
        self.steps: list[dict[str, float]] = []
        self.tokens = 0
        """Tokens trained on, prompts included, padding not."""

    @property
    def seconds(self) -> float:
        """Since the first step began."""
        return time.monotonic() - self._started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Trainer logs once a step, and once more, without a loss, at the end."""
        if "loss" not in logs:
            return
        step = state.global_step
        self.tokens += sum(self._rows.length(i) for i in self._schedule.step_rows(step - 1))
        seconds = self.seconds
        entry = {
            "step": step,
            "total_steps": self._schedule.steps,
            "epoch": round(self._schedule.epoch_after(step - 1), 4),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs.get("grad_norm", math.nan)),
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / seconds, 1),
            "eta_seconds": round(seconds / step * (self._schedule.steps - step), 1),
        }
        self.steps.append(entry)
        self._on_step(entry)


def training_arguments(snapshot: Snapshot, compute: Compute, steps: int, folder: Path) -> TrainingArguments:
    """The spec in transformers' words. Nothing is saved, evaluated or sent anywhere by Trainer itself."""
    training = snapshot.spec.training
    optimizer = training.optimizer
    warmup = training.warmup
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=snapshot.plan.micro_batch_sequences,
        gradient_accumulation_steps=snapshot.plan.gradient_accumulation_steps,
        learning_rate=snapshot.plan.learning_rate,
        lr_scheduler_type=SCHEDULERS[training.scheduler],
        # Rounded down: transformers rounds a share up, which makes a run of few steps waste its first one at rate 0.
        warmup_steps=warmup.steps if warmup.steps is not None else int((warmup.fraction or 0.0) * steps),
        optim=optimizer.name,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        seed=training.seed,
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        fp16=compute.dtype is torch.float16,
        use_cpu=compute.device.type == "cpu",
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        log_level="warning",
    )
