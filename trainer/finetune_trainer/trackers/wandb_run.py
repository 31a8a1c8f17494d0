"""A run in Weights & Biases."""

from __future__ import annotations

from typing import Any

import wandb

from finetune_trainer.trackers.lines import EVALUATION_STEP, STEP_METRIC, Known, Line, is_evaluation, metrics
from finetune_trainer.trackers.places import address
from finetune_trainer.trackers.protocol import Opening, TrackerError

OPEN_SECONDS = 45


class WandbRun:
    """The run with the FineTuneJob's UID as its id."""

    def __init__(self, opening: Opening, secret: dict[str, str]) -> None:
        if not secret.get("WANDB_API_KEY"):
            raise TrackerError(f"Secret {opening.secret_name} lacks WANDB_API_KEY")
        settings = wandb.Settings(
            base_url=address(opening.type, opening.endpoint, secret),
            init_timeout=OPEN_SECONDS,
            login_timeout=OPEN_SECONDS,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            entity=secret.get("WANDB_ENTITY"),
            project=opening.project,
            name=opening.run_name,
            id=opening.run_id,
            resume="allow",
            dir=opening.work_dir,
            config=opening.config,
            settings=settings,
        )
        # An evaluation may come after later steps, and W&B's own step only grows: evaluations have an axis of their own.
        for metric, axis in (("train/*", STEP_METRIC), ("eval/*", EVALUATION_STEP)):
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(metric, step_metric=axis)
        self.url = self._run.url
        self.known = Known(self._run.starting_step - 1, int(self._run.summary.get(EVALUATION_STEP, -1)))
        self._step = self._run.starting_step

    def log(self, lines: list[Line]) -> None:
        """Steps below the last one would be dropped without an error: an evaluation of such a step is logged at the last one."""
        for line in lines:
            step = int(line["step"])
            self._step = max(self._step, step)
            axis = EVALUATION_STEP if is_evaluation(line) else STEP_METRIC
            self._run.log({**metrics(line), axis: step}, step=self._step)

    def finish(self, summary: dict[str, Any], failed: bool) -> None:
        """Waits until all is uploaded."""
        self._run.summary.update(summary)
        self._run.finish(exit_code=1 if failed else 0)
