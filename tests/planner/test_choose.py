"""LoRA where it fits, QLoRA where it does not, and always the global batch as it was asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.planner import Batch, Request, choose, find_gpu, plan, rounds
from finetune_api.planner.choose import micro_batches
from finetune_api.planner.distributed import Layout
from finetune_api.planner.fit import limit
from finetune_api.spec import FineTuneJobSpec, MethodType
from tests.planner.cases import model

GIB = 1 << 30


def request(name: str, tokens: int = 2048, gpus: int = 1) -> Request:
    arch, shapes = model(name)
    return Request(architecture=arch, shapes=shapes, batch=Batch(sequence_tokens=tokens), gpus=gpus)


@pytest.mark.parametrize(
    ("gpu", "method"), [("A100-SXM4-40GB", MethodType.LORA), ("T4", MethodType.QLORA), ("H200", MethodType.LORA)]
)
def test_llama_3_8b_is_tuned_in_16_bit_where_there_is_room(gpu: str, method: MethodType) -> None:
    choice = choose(request("llama-3-8b"), find_gpu(gpu).usable_bytes, 16)
    assert choice.fit.fits
    assert choice.method is method
    assert choice.planned == plan(choice.request)


def test_the_reason_says_what_the_better_method_would_need() -> None:
    choice = choose(request("llama-3-8b"), find_gpu("T4").usable_bytes, 16)
    assert choice.reason.startswith("QLoRA (it fits): ")
    assert "LoRA would need " in choice.reason
    assert "does not fit with the 5 % margin (13.8 GiB)." in choice.reason


@pytest.mark.parametrize(
    ("method", "layouts"),
    [
        ({}, [Layout.DDP, Layout.FSDP]),
        ({"lora": {"initialization": "PiSSA"}}, [Layout.DDP]),
        ({"lora": {"initialization": "OLoRA"}}, [Layout.DDP]),
        ({"type": "QLoRA", "quantization": {"type": "Int8"}}, [Layout.DDP]),
        ({"quantization": {"type": "Int8"}}, [Layout.DDP, Layout.FSDP]),
    ],
)
def test_what_needs_the_whole_base_is_never_sharded(method: dict[str, Any], layouts: list[Layout]) -> None:
    uris = {
        "model": {"uri": "hf://a/b"},
        "data": {"train": [{"uri": "s3://bucket/x"}]},
        "output": {"uri": "s3://bucket"},
    }
    spec = FineTuneJobSpec.model_validate({**uris, "method": method, "compute": {"gpusPerNode": 4}})
    assert rounds(spec) == [tuple(layouts)]


def test_a_method_asked_for_is_kept_though_it_does_not_fit() -> None:
    choice = choose(request("llama-3-8b"), find_gpu("T4").usable_bytes, 16, MethodType.LORA)
    assert choice.method is MethodType.LORA
    assert not choice.fit.fits
    assert any(a.method == "QLoRA" for a in choice.fit.alternatives)


@pytest.mark.parametrize("gpus", range(1, 9))
@pytest.mark.parametrize("batch", [1, 5, 7, 8, 15, 16, 17, 48, 100])
def test_micro_batches_cover_the_global_batch_on_any_number_of_gpus(batch: int, gpus: int) -> None:
    """A GPU's share is rounded up, and the micro-batch is the largest of its divisors that is efficient: 4 rows of 2,048 tokens."""
    choice = choose(request("qwen2.5-0.5b", gpus=gpus), 80 * GIB, batch, MethodType.LORA)
    micro, accumulation = choice.micro_batch_sequences, choice.gradient_accumulation_steps
    assert 0 <= micro * accumulation * gpus - batch < gpus
    assert micro == max(rows for rows in (1, 2, 3, 4) if math.ceil(batch / gpus) % rows == 0)
    assert choice.request.batch.micro_batch_sequences == micro
    assert f"micro-batch {micro}." in choice.reason


@settings(max_examples=200)
@given(per_gpu=st.integers(1, 512), tokens=st.integers(16, 65536), most=st.none() | st.integers(1, 64))
def test_every_micro_batch_divides_the_batch_and_one_sequence_is_always_possible(
    per_gpu: int, tokens: int, most: int | None
) -> None:
    rows = list(micro_batches(per_gpu, tokens, most))
    assert rows[-1] == 1
    assert rows == sorted(rows, reverse=True)
    assert all(per_gpu % r == 0 and r <= (most or per_gpu) for r in rows)


@settings(max_examples=25, deadline=None)
@given(gibibytes=st.integers(1, 120), batch=st.sampled_from([1, 6, 16, 64]), tokens=st.sampled_from([256, 2048, 8192]))
def test_what_is_chosen_fits_or_nothing_smaller_would(gibibytes: int, batch: int, tokens: int) -> None:
    asked = request("qwen2.5-0.5b", tokens)
    choice = choose(asked, gibibytes * GIB, batch)
    assert batch % choice.micro_batch_sequences == 0
    assert choice.fit.fits == (choice.planned.needed_bytes <= limit(gibibytes * GIB))
    if not choice.fit.fits:
        assert choice.method is MethodType.QLORA
        assert choice.micro_batch_sequences == 1


def test_several_gpus_hold_whole_copies_if_those_fit_and_shards_if_not() -> None:
    whole = choose(request("llama-2-7b", gpus=2), find_gpu("RTX 4090").usable_bytes, 16)
    sharded = choose(request("llama-2-70b", 1024, gpus=4), find_gpu("RTX 4090").usable_bytes, 16)
    assert whole.request.layout is Layout.DDP
    assert sharded.request.layout is Layout.FSDP
    assert sharded.fit.fits


def test_evaluation_takes_no_more_than_training_where_the_trainer_follows_the_plan() -> None:
    usable = find_gpu("NVIDIA RTX A6000").usable_bytes
    asked = request("llama-3-70b", tokens=1024)
    fixed = choose(asked, usable, 16)
    follows = choose(asked, usable, 16, evaluation_follows=True)
    assert not fixed.fit.fits
    assert follows.fit.fits
    assert follows.request.evaluation_tokens < fixed.request.evaluation_tokens
