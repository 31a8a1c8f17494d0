"""What sharding adds to a training step: planned, and counted in a run on a CPU whose other rank is pretended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from finetune_api.planner import Batch, Request, Tuning, describe, parse_config, plan
from finetune_api.planner.distributed import NCCL_BYTES, Layout
from finetune_trainer.train import model, sharded
from finetune_trainer.train.device import Compute
from finetune_trainer.train.loss import LearnedTokenLoss
from finetune_trainer.train.ranks import Ranks
from tests.planner.simulator.step import micro_batch
from tests.planner.simulator.tracker import ResizedStorages
from tests.support import tiny_model
from tests.support.prepared import job_spec, snapshot_of

CPU = Compute(torch.device("cpu"), torch.bfloat16, "cpu")
HIDDEN, RANK, LAYERS, TOKENS = 512, 4, 4, 4
"""So few tokens that weights are what there is to see."""


@pytest.fixture
def two() -> Iterator[Ranks]:
    """The first of two ranks: what the other one sends is never looked at."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield Ranks(0, 2, sharded=True)
    distributed.destroy_process_group()


def build(folder: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> Path:
    for name, value in (("VOCABULARY", vocabulary), ("HIDDEN", HIDDEN), ("INTERMEDIATE", 2 * HIDDEN)):
        monkeypatch.setattr(tiny_model, name, value)
    return tiny_model.build_tiny_model(folder, layers=LAYERS)


def ready_to_train(folder: Path, ranks: Ranks, method: str) -> LearnedTokenLoss:
    """The loss of a model with an adapter, of which this rank has all, or its part."""
    snapshot = snapshot_of(job_spec(None, "bucket", method={"type": method, "lora": {"rank": RANK}}), "u" * 32)
    if ranks.sharded:
        base, _ = sharded.load_sharded(folder, snapshot, CPU, ranks)
        sharded.ready_for_adapter(base)
    else:
        base = model.load_base(folder, snapshot, CPU)
    tuned = model.attach_adapter(base, snapshot)
    tuned.train()
    tuned.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    loss = LearnedTokenLoss(tuned.get_base_model())
    loss.head_apart = True
    return loss


def step_bytes(folder: Path, ranks: Ranks, method: str) -> int:
    """The most of a step beyond what is held between steps."""
    with ResizedStorages() as live:
        loss = ready_to_train(folder, ranks, method)
        for _ in range(2):  # the first ones make gradients
            micro_batch(loss, 1, TOKENS)
        held = live.live_bytes
        live.reset_peak()
        micro_batch(loss, 1, TOKENS)
        return live.peak_bytes - held


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
@pytest.mark.parametrize("vocabulary", [500, 20_000], ids=["layers are the largest", "the head is"])
def test_a_sharded_step_needs_what_is_planned(
    two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: int, method: str
) -> None:
    folder = build(tmp_path / "model", monkeypatch, vocabulary)
    arch = parse_config(json.loads((folder / "config.json").read_text()))
    planned = plan(
        Request(
            architecture=arch,
            shapes=describe(arch),
            tuning=Tuning(rank=RANK, quantized=method == "QLoRA"),
            batch=Batch(sequence_tokens=TOKENS),
            layout=Layout.FSDP,
            gpus=2,
        )
    )
    gathered = planned.gathered_bytes + planned.communication_bytes - NCCL_BYTES
    added = step_bytes(folder, two, method) - step_bytes(folder, Ranks(), method)
    assert 0.95 * gathered <= added <= gathered


def test_the_message_that_brings_embeddings_or_head_is_gone_before_they_compute(
    two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, vocabulary = build(tmp_path / "model", monkeypatch, 20_000), 20_000
    whole: list[int] = []
    with ResizedStorages() as live:
        loss = ready_to_train(folder, two, "LoRA")
        for end in (loss.model.get_input_embeddings(), loss.head):
            # Called after FSDP has gathered: it counts the whole matrix, and the message if that is still there.
            end.register_forward_pre_hook(lambda *_: whole.append(live.count(2 * vocabulary * HIDDEN)))
        micro_batch(loss, 1, TOKENS)
        micro_batch(loss, 1, TOKENS)
    assert whole == [1, 1] * 2
