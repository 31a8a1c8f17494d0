"""What training holds of host or GPU memory, and need not."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from finetune_trainer import memory
from finetune_trainer.train import model
from finetune_trainer.train.loss import LearnedTokenLoss
from finetune_trainer.train.rows import collate
from tests.support.own_memory import anonymous_bytes
from tests.trainer.test_train_trainer import CPU16, rows_of, snapshot

MEBIBYTE = 2**20


def pass_of(folder: Path, method: dict[str, Any], casting: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes kept for the backward pass of a micro-batch, and its gradients."""
    run = snapshot(method=method)
    tuned = model.attach_adapter(model.load_base(folder, run, CPU16), run)
    torch.manual_seed(1)
    for name, module in tuned.named_modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled |= casting
        elif ".lora_B." in name:
            torch.nn.init.normal_(module.weight)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = collate(rows_of(folder, 4), range(4), pad_id=0)
    with CPU16.autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = LearnedTokenLoss(model.causal_lm(tuned))(batch)
    loss.backward()
    return sum(kept.values()), {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
def test_adapters_keep_no_copies_of_their_inputs_and_gradients_are_the_same_to_the_bit(
    tiny_model: Path, kind: str
) -> None:
    (kept, gradients), (with_copies, expected) = [pass_of(tiny_model, {"type": kind}, casting) for casting in (0, 1)]
    assert kept < 0.9 * with_copies
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert any(gradient.any() for gradient in expected.values())


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"useDora": True}])
def test_what_computes_with_an_input_gets_it_in_float32(tiny_model: Path, lora: dict[str, Any]) -> None:
    run = snapshot(method={"lora": lora})
    tuned = model.attach_adapter(model.load_base(tiny_model, run, CPU16), run)
    assert all(m.cast_input_dtype_enabled for m in tuned.modules() if isinstance(m, LoraLayer))


def left_of_tensors() -> int:
    """What stays of 64 MiB of tensors that were freed, among small ones that were not; after a large block has been freed."""
    torch.ones(4 * MEBIBYTE)
    before = anonymous_bytes()
    large, small = [], []
    for _ in range(32):
        large.append(torch.ones(MEBIBYTE // 2))
        small.append(torch.ones(MEBIBYTE // 32))  # too large for holes elsewhere, so that it stands between two of them
    large.clear()
    return anonymous_bytes() - before


def test_of_large_tensors_nothing_stays_when_they_are_freed() -> None:
    """In a process of its own: the setting is for good."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(left_of_tensors).result() > 32 * MEBIBYTE, "glibc's heap does not keep them any more"
        pool.submit(memory.map_large_blocks).result()
        assert pool.submit(left_of_tensors).result() < 8 * MEBIBYTE


def test_what_a_thread_has_freed_is_given_back() -> None:
    last: list[bytearray] = []

    def use() -> None:
        blocks = [bytearray(b"x") * 65_536 for _ in range(1024)]
        last.append(blocks[-1])  # otherwise all of the heap's end is free, which glibc gives back itself

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    held = anonymous_bytes()
    memory.give_back()
    assert held - anonymous_bytes() > 32 * MEBIBYTE
