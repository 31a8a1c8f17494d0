"""Ranks that load their parts of a base, as processes over gloo: ``python -m tests.support.loading_ranks BASE TOLD``.

They are forked from one process, so that torch is imported once for all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import bitsandbytes  # noqa: F401  before the fork, as the model's code below
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from pydantic import BaseModel
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from finetune_api.results import QuantizedModule
from finetune_trainer.train import sharded
from finetune_trainer.train.device import Compute
from finetune_trainer.train.ranks import Ranks
from tests.planner.simulator.tracker import ResizedStorages
from tests.support.prepared import job_spec, snapshot_of
from tests.support.train_process import ROOT

CPU16 = Compute(torch.device("cpu"), torch.bfloat16, "cpu")
METHODS = ("LoRA", "QLoRA")
SIZES = (2, 4)
PATIENCE = timedelta(minutes=2)


class Held(BaseModel):
    """Of one rank."""

    part_bytes: int
    """Its parameters, when all is loaded."""
    peak_bytes: int
    """The most that tensors ever were, those in the files' own type not counted: on a GPU they stay in host memory."""
    quantized: list[QuantizedModule]


def held_by_ranks(base: Path, told: Path) -> dict[str, dict[int, list[Held]]]:
    """What the ranks tell that load ``base``: by method, by their number, by rank."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", __name__, str(base), str(told)], env=environ, cwd=ROOT, check=True)
    return {
        method: {
            size: [Held.model_validate_json(path_of(told, method, size, rank).read_bytes()) for rank in range(size)]
            for size in SIZES
        }
        for method in METHODS
    }


def path_of(told: Path, method: str, size: int, rank: int) -> Path:
    """Where a rank tells what it held."""
    return told / f"{method}-{rank}-of-{size}.json"


def load(rank: int, size: int, base: Path, told: Path) -> None:
    """One rank: measure, and tell."""
    distributed.init_process_group(
        "gloo", init_method=(told / f"meet-{size}").as_uri(), rank=rank, world_size=size, timeout=PATIENCE
    )
    for method in METHODS:
        snapshot = snapshot_of(job_spec(None, "bucket", method={"type": method}), "u" * 32)
        with ResizedStorages() as live:
            loaded, records = sharded.load_sharded(base, snapshot, CPU16, Ranks(rank, size, sharded=True))
        held = Held(part_bytes=part_bytes(loaded), peak_bytes=live.peak_bytes, quantized=records)
        path_of(told, method, size, rank).write_text(held.model_dump_json())
    distributed.destroy_process_group()


def part_bytes(module: torch.nn.Module) -> int:
    """What a rank holds of a module's parameters."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return sum(p.untyped_storage().nbytes() for p in parts)


if __name__ == "__main__":
    for size in SIZES:
        start_processes(load, (size, *map(Path, sys.argv[1:])), nprocs=size, start_method="fork")
