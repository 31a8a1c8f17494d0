"""The optimization: transformers' Trainer, with our data schedule and our loss."""
# ruff: noqa: ARG002 - signatures are transformers'

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from finetune_api.failures import Reason
from finetune_api.optimizers import SCHEDULE_FREE, OptimizerName
from finetune_api.progress import Split
from finetune_api.snapshot import Snapshot
from finetune_api.spec import GaLore, Scheduler
from finetune_trainer import heartbeat
from finetune_trainer.errors import StageError
from finetune_trainer.train.averaging import name_parameters
from finetune_trainer.train.capture import random_states, restore_random_states, weights_file
from finetune_trainer.train.device import Compute
from finetune_trainer.train.galore import GaLoreAdamW, galore_groups
from finetune_trainer.train.loss import LearnedTokenLoss, learned_tokens
from finetune_trainer.train.micro_batches import AsDrawn, MicroBatches, PackedMicroBatches
from finetune_trainer.train.model import causal_lm, take_up
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.rows import Rows
from finetune_trainer.train.schedule import Schedule
from finetune_trainer.train.stop import TrainingStopped

# Ours reports; transformers' own callback for the same purpose serves users' images.
os.environ["DISABLE_KUBEFLOW_INTEGRATION"] = "TRUE"

SCHEDULERS = {
    Scheduler.COSINE: "cosine",
    Scheduler.COSINE_WITH_MIN_LR: "cosine_with_min_lr",
    Scheduler.LINEAR: "linear",
    Scheduler.CONSTANT: "constant_with_warmup",
    Scheduler.INVERSE_SQRT: "inverse_sqrt",
    Scheduler.WARMUP_STABLE_DECAY: "warmup_stable_decay",
}
A_TENTH = 0.1
GROUP_SETTINGS: dict[str, dict[str, Any]] = {
    # The warm-up is the schedule's, as with all others. Training begins in this mode, and leaves it nowhere (see averaging).
    **{name: {"warmup_steps": 0, "train_mode": True} for name in SCHEDULE_FREE},
    # Its kernels are compiled when they are first used, and the image has no compiler (torch-optimi 0.3.3).
    OptimizerName.STABLE_ADAMW: {"triton": False},
}
"""What transformers (5.23) has no way to say of an optimizer."""


class LoraTrainer(Trainer):  # type: ignore[misc]
    """One optimizer step = one step of the schedule, however it is cut into micro-batches.

    Why not trl's SFTTrainer: rows arrive tokenised and labelled, so its data handling has nothing to do, and the rest works
    against this design (trl 1.16): it casts trainables to bfloat16 on 4-bit bases after they were made float32, patches
    the model's forward for good, which evaluation and answers go through too, and computes entropy and accuracy over the whole
    vocabulary for every token, learned or not, at every step. Its loss, NLL by the sum of learned tokens, is the one below.
    """

    def __init__(
        self, *, model: Any, args: TrainingArguments, rows: Rows, schedule: Schedule, micro_batch: int, pad_id: int,
        compute: Compute, callbacks: list[TrainerCallback], start_step: int = 0,
        should_stop: Callable[[], bool] = lambda: False, ranks: Ranks | None = None,
        loraplus_lr_ratio: float | None = None, packing: bool = False, galore: GaLore | None = None,
    ) -> None:  # fmt: skip
        """``start_step`` steps are behind us (see ``train(resume_from_checkpoint)``). ``should_stop`` is asked before each
        micro-batch."""
        args._n_gpu = min(1, args.n_gpu)  # several visible GPUs in one process would become nn.DataParallel
        ends = StepEnds()
        super().__init__(model=model, args=args, callbacks=[ends, *callbacks])
        ends.trainer = self
        self.remove_callback(PrinterCallback)  # StepLog logs
        # The loss is already divided by the learned tokens of the whole step (see compute_loss).
        self.model_accepts_loss_kwargs = True
        self.rows = rows
        self.schedule = schedule
        self.micro_batch = micro_batch
        self.pad_id = pad_id
        self.compute = compute
        self.start_step = start_step
        self.ranks = ranks or Ranks()
        self.should_stop = should_stop
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.packing = packing
        self.galore = galore
        self.updating = False
        """The optimizer is changing the weights: what an error leaves now is no step's state."""
        self.step_random = random_states()
        """As the last completed step left them."""
        self.nll = LearnedTokenLoss(causal_lm(model))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of the run from ``start_step`` on, as one epoch of Trainer's.

        With a generator of its own: a DataLoader draws a seed whenever it is iterated, and a run that was resumed iterates anew.
        """
        kind = PackedMicroBatches if self.packing else MicroBatches
        batches = kind(self.schedule, self.rows, self.micro_batch, self.start_step, self.ranks)
        return DataLoader(
            AsDrawn(self.schedule.rows),
            batch_sampler=batches,
            collate_fn=lambda indices: batches.collate(indices, self.pad_id),
            generator=torch.Generator(),
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's; with LoRA+ its groups are split, and those of the matrices B have a learning rate of their own.

        Not peft's function for it, which takes every vector (norms, biases, DoRA's magnitudes) for a matrix B.
        """
        if self.galore is not None:
            return self._galore_optimizer(self.galore)
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if not fresh:
            return optimizer
        if self.loraplus_lr_ratio is not None:
            in_b = {id(p) for n, p in self.model.named_parameters() if ".lora_B." in n}
            groups = []
            for group in optimizer.param_groups:
                for factor, chosen in ((1.0, False), (self.loraplus_lr_ratio, True)):
                    if parameters := [p for p in group["params"] if (id(p) in in_b) is chosen]:
                        groups.append({**group, "params": parameters, "lr": group["lr"] * factor})
            optimizer.param_groups[:] = groups
        if self.args.optim in SCHEDULE_FREE:
            name_parameters(optimizer, self.model)
        for group in optimizer.param_groups:
            group.update(GROUP_SETTINGS.get(self.args.optim, {}))
        return optimizer

    def _galore_optimizer(self, settings: GaLore) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer | None = getattr(self, "optimizer")  # noqa: B009 - transformers has no type for it
        if made is None:
            args, decaying = self.args, set(self.get_decay_parameter_names(self.model))
            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            groups: list[dict[str, Any]] = [
                {"params": [p for n, p in trained.items() if n in decaying], "weight_decay": args.weight_decay},
                {"params": [p for n, p in trained.items() if n not in decaying], "weight_decay": 0.0},
            ]
            made = self.optimizer = GaLoreAdamW(
                galore_groups(self.model, groups), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon, weight_decay=0.0, settings=settings, same=self.ranks.as_first_has,
            )  # fmt: skip
        return made

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, unless training is to stop: then what its step has accumulated is thrown away.

        Raises:
            TrainingStopped: weights and optimizer are as the last completed step left them.
        """
        heartbeat.beat()
        if self.ranks.any(self.should_stop()):
            raise TrainingStopped
        loss = torch.zeros((), device=self.args.device)
        if inputs["input_ids"].numel():  # packed rows may need fewer micro-batches: none of the ranks has rows then
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.ranks.add_gradients(model.parameters())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The loss of a step is the sum of its parts on all ranks."""
        if "loss" in logs:
            logs["loss"] = self.ranks.total(logs["loss"])
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """transformers knows whole models and adapters; a checkpoint here may have only those of a model's weights that are trained."""
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            take_up(self.model, load_file(Path(resume_from_checkpoint) / weights_file(adapter=False)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Every rank has drawn its own random numbers. A rank that a checkpoint of fewer knows nothing of begins from its seed."""
        if self.ranks.first:
            super()._load_rng_state(checkpoint)
        elif checkpoint is not None:
            restore_random_states(Path(checkpoint), self.ranks.rank)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """The normaliser of a step: its learned tokens, over all micro-batches of all ranks."""
        own = sum(learned_tokens(b["labels"]) for b in batch_samples)
        return torch.tensor(int(self.ranks.total(own)), device=device)

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


class StepEnds(TrainerCallback):  # type: ignore[misc]
    """Marks the moments at which the run's state is that of a whole step."""

    def __init__(self) -> None:
        self.trainer: LoraTrainer | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights begin to change."""
        assert self.trainer is not None
        self.trainer.updating = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights, optimizer and scheduler have moved on."""
        assert self.trainer is not None
        self.trainer.step_random = random_states()
        self.trainer.updating = False


class LayerwiseArguments(TrainingArguments):  # type: ignore[misc]
    """For a base that comes a layer at a time: it says itself where its parameters lie, and moving them fails, or undoes an offload."""

    @property
    def place_model_on_device(self) -> bool:
        """Trainer must not."""
        return False


def scheduler_settings(scheduler: Scheduler, steps: int, warmup_steps: int) -> dict[str, Any] | None:
    """What transformers must be told of a schedule beside its name, as the spec's documentation has it."""
    if scheduler is Scheduler.COSINE_WITH_MIN_LR:
        return {"min_lr_rate": A_TENTH}
    if scheduler is Scheduler.WARMUP_STABLE_DECAY:
        return {"num_decay_steps": max(1, round(A_TENTH * steps))}
    if scheduler is Scheduler.INVERSE_SQRT:
        return {
            "timescale": max(1, warmup_steps)
        }  # without a warm-up transformers takes 10,000: a constant rate for most runs
    return None


def training_arguments(
    snapshot: Snapshot,
    compute: Compute,
    steps: int,
    folder: Path,
    split: Split | None = None,
    ranks: Ranks | None = None,
) -> TrainingArguments:
    """The spec in transformers' words. Nothing is saved, evaluated or sent anywhere by Trainer itself.

    The accumulation follows from the ranks that are there, which may be others than those planned for.
    """
    training = snapshot.spec.training
    optimizer = training.optimizer
    warmup = training.warmup
    split, ranks = split or snapshot.split, ranks or Ranks()
    together = split.micro_batch_sequences * ranks.size
    warmup_steps = warmup.steps if warmup.steps is not None else int((warmup.fraction or 0.0) * steps)
    return (LayerwiseArguments if ranks.sharded else TrainingArguments)(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=split.micro_batch_sequences,
        gradient_accumulation_steps=math.ceil(training.global_batch_sequences / together),
        learning_rate=snapshot.plan.learning_rate,
        lr_scheduler_type=SCHEDULERS[training.scheduler],
        lr_scheduler_kwargs=scheduler_settings(training.scheduler, steps, warmup_steps),
        neftune_noise_alpha=training.neftune_noise_alpha,
        # Rounded down: transformers rounds a share up, which makes a run of few steps waste its first one at rate 0.
        warmup_steps=warmup_steps,
        optim=optimizer.name,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        seed=training.seed + ranks.rank,
        activation_checkpointing=split.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        fp16=compute.dtype is torch.float16,
        use_cpu=compute.device.type == "cpu",
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        # The data schedule begins at the right step by itself.
        ignore_data_skip=True,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        log_level="warning",
    )
