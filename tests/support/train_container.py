"""The training container as processes: ``python -m tests.support.train_container ROOT`` is its first process.

ROOT holds what the operator mounts (snapshot/, secrets/, pvc/) and ``pods/<execution>/``, each pod's own disk. As in the image, the
first process imports no torch.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.names import Stage
from finetune_trainer.context import StageContext, load_context
from finetune_trainer.entrypoint import main
from finetune_trainer.supervisor import run as supervisor
from finetune_trainer.supervisor.place import ENV_RANK


def context(root: Path, stage: Stage) -> StageContext:
    """A pod's surroundings, from folders."""
    return load_context(
        stage,
        snapshot_dir=root / "snapshot",
        secrets_dir=root / "secrets",
        pvc_dir=root / "pvc",
        work_dir=root / "pods" / os.environ[names.ENV_POD_UID],
        token_dir=root / "token",
    )


ENV_MOST_ROWS = "TEST_MOST_ROWS"
"""A GPU that holds no more rows at once than this, from the fifth step on."""


def pretend_small_gpu(most_rows: int) -> None:
    """Raise what torch raises where a micro-batch does not fit."""
    import torch

    from finetune_trainer.train.trainer import LoraTrainer

    original = LoraTrainer.compute_loss

    def compute_loss(self: LoraTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step >= 4 and len(inputs["input_ids"]) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, model, inputs, *args, **kwargs)

    LoraTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


ENV_CHUNK_BYTES = "TEST_CHUNK_BYTES"
"""Of a chunk of logits: with few, a head as small as a test's is called as often as a real one."""


def pretend_large_vocabulary(chunk_bytes: int) -> None:
    """Few positions a chunk."""
    from finetune_trainer.train.loss import LearnedTokenLoss

    LearnedTokenLoss.__init__.__defaults__ = (chunk_bytes,)


ENV_FLOAT32 = "TEST_FLOAT32"
"""Compute in float32 also where the CPU has bfloat16, so that only the order of sums rounds."""


def in_float32() -> None:
    """Whatever the CPU."""
    import torch

    from finetune_trainer.train import device

    device.cpu_dtype = lambda: torch.float32


ENV_STANDS_STILL = "TEST_STANDS_STILL"
"""RANK MOMENT: that rank stands still (SIGSTOP) at that moment, once in a job's life."""
STANDS_STILL = "stands still"
"""What it says before."""
FIFTH = 5

ENV_OBSERVED = "TEST_OBSERVED"
"""What each rank sends while something is saved, and what it writes, is told in ``observed-RANK.json`` (tests.support.observed)."""


def stand_still(root: Path, moment: str) -> None:
    """Where the others cannot get past their next collective without this rank."""
    from finetune_trainer.train import run as stage
    from finetune_trainer.train import save
    from finetune_trainer.train.trainer import LoraTrainer

    places: dict[str, tuple[Any, str, int]] = {
        "Loading": (stage, "load", 1),
        "Training": (LoraTrainer, "compute_loss", FIFTH),
        "Uploading": (save, "save_adapter", 1),
    }
    owner, name, call = places[moment]
    setattr(owner, name, standing_still(getattr(owner, name), call, root / STANDS_STILL))


def standing_still(original: Callable[..., Any], call: int, done: Path) -> Callable[..., Any]:
    """At the call of that number, unless it is done."""
    calls = itertools.count(1)

    @wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call and not done.exists():
            done.touch()
            print(STANDS_STILL, file=sys.stderr, flush=True)  # noqa: T201
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*args, **kwargs)

    return called


def run(root: Path, arguments: list[str]) -> int:
    """What the image's entry point does."""
    if arguments == ["worker"] and ENV_MOST_ROWS in os.environ:
        pretend_small_gpu(int(os.environ[ENV_MOST_ROWS]))
    if arguments == ["worker"] and ENV_CHUNK_BYTES in os.environ:
        pretend_large_vocabulary(int(os.environ[ENV_CHUNK_BYTES]))
    if arguments == ["worker"] and ENV_FLOAT32 in os.environ:
        in_float32()
    who, _, moment = os.environ.get(ENV_STANDS_STILL, "").partition(" ")
    if arguments == ["worker"] and moment and who == os.environ[ENV_RANK]:
        stand_still(root, moment)
    if arguments == ["worker"] and ENV_OBSERVED in os.environ:
        from tests.support.observed import observe

        observe(root / f"observed-{os.environ[ENV_RANK]}.json")
    command = [sys.executable, "-m", "tests.support.train_container", str(root), "worker"]
    pod = root / "pods" / os.environ[names.ENV_POD_UID]
    pod.mkdir(parents=True, exist_ok=True)
    return main(
        arguments or ["train"],
        termination_log=pod / "termination-log",
        context=partial(context, root),
        stage_function=lambda _: partial(supervisor.run, command=command),
    )


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
