"""A training run's state as copies in host memory: all that the step loop waits for.

What is frozen (the base) is not part of it. File names and contents are transformers' own, so that ``Trainer`` loads them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers.trainer_pt_utils import safe_globals

from finetune_api.results import WEIGHTS_FILE
from finetune_trainer.train.model import trained_state

PROGRESS_FILE = "progress.json"
ADAPTER_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"


@dataclass(frozen=True, eq=False)
class Captured:
    """The state after ``step`` optimizer steps. Each is equal to itself only: tensors have no truth value."""

    step: int
    adapter: dict[str, torch.Tensor]
    """Or the model's own weights that are trained."""
    adapter_config: dict[str, Any] | None
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    random: list[dict[str, Any]]
    """By rank."""
    trainer_state: str
    progress: dict[str, Any]
    held_out_loss: float | None = None


def weights_file(adapter: bool) -> str:
    """What is trained, in a checkpoint's folder."""
    return ADAPTER_FILE if adapter else WEIGHTS_FILE


def random_states() -> dict[str, Any]:
    """Every generator's state, in transformers' form."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state()
    return states


def restore_random_states(folder: Path, rank: int) -> None:
    """A rank's states from a checkpoint; its own seed's where the checkpoint has none of it."""
    path = folder / random_file(rank)
    if not path.exists():
        return
    with safe_globals():
        states = torch.load(path, weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.random.set_rng_state(states["cuda"])


def random_file(rank: int) -> str:
    """transformers looks for the first one's."""
    return "rng_state.pth" if rank == 0 else f"rng_state_{rank}.pth"


def capture(
    trainer: Any, states: list[dict[str, Any]], progress: dict[str, Any], held_out_loss: float | None = None
) -> Captured:
    """Copy the state of ``trainer`` (a transformers Trainer) after its last completed step.

    Args:
        states: :func:`random_states` of each rank as they were at that step's end; micro-batches of a later, unfinished step have moved them.
    """
    model = trainer.model
    scaler = getattr(trainer.accelerator, "scaler", None)
    return Captured(
        step=trainer.state.global_step,
        adapter=_on_host(trained_state(model)),
        adapter_config=adapter_config(model) if isinstance(model, PeftModel) else None,
        optimizer=_on_host(trainer.optimizer.state_dict()),
        scheduler=_on_host(trainer.lr_scheduler.state_dict()),
        scaler=_on_host(scaler.state_dict()) if scaler is not None else None,
        random=states,
        trainer_state=_trainer_state(trainer.state),
        progress=progress,
        held_out_loss=held_out_loss,
    )


def adapter_config(model: PeftModel) -> dict[str, Any]:
    """peft's configuration as JSON, its sets in order: they differ from process to process otherwise."""
    config = model.peft_config[model.active_adapter].to_dict()
    return {k: in_order(v) for k, v in config.items()}


def in_order(value: Any) -> Any:
    """Sets as sorted lists."""
    return sorted(value) if isinstance(value, set | frozenset) else value


def write_files(captured: Captured, folder: Path) -> None:
    """The checkpoint's files, into an empty folder."""
    folder.mkdir(parents=True)
    save_file(captured.adapter, folder / weights_file(captured.adapter_config is not None), metadata={"format": "pt"})
    if captured.adapter_config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(captured.adapter_config, indent=1, default=str))
    _save(captured.optimizer, folder / OPTIMIZER_FILE)
    _save(captured.scheduler, folder / "scheduler.pt")
    if captured.scaler is not None:
        _save(captured.scaler, folder / "scaler.pt")
    for rank, states in enumerate(captured.random):
        _save(states, folder / random_file(rank))
    (folder / "trainer_state.json").write_text(captured.trainer_state)
    (folder / PROGRESS_FILE).write_text(json.dumps(captured.progress))


def _save(state: object, path: Path) -> None:
    """Through a file of Python's: torch's own says "iostream error" where the disk is full, and nothing more."""
    with path.open("wb") as file:
        torch.save(state, file)


def _trainer_state(state: Any) -> str:
    """transformers' TrainerState without its log, which the step log has and which grows."""
    fields = {k: v for k, v in vars(state).items() if k in state.__dataclass_fields__}
    return json.dumps({**fields, "log_history": [], "stateful_callbacks": {}}, default=str)


def _on_host(value: Any) -> Any:
    """Copies of all tensors in a state dict, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _on_host(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_host(v) for v in value)
    return value
