"""A plan follows from what is asked for: more work never needs less memory, and parts of a whole add up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.planner import Attention, Batch, Request, Tuning, parse_config, plan, request_of
from finetune_api.planner.distributed import Layout
from finetune_api.planner.fit import quantized, with_batch
from finetune_api.planner.weights import optimizer_bytes
from finetune_api.spec import FineTuneJobSpec
from tests.planner.cases import model
from tests.planner.simulator.golden import read_config

NAMES = ["smollm2-135m", "gpt2", "pythia-1.4b", "gemma-3-1b", "gemma-2-2b", "falcon-7b", "phi-3-mini", "mixtral-8x7b"]
GIB = 1 << 30


def request(name: str, **fields: Any) -> Request:
    arch, shapes = model(name)
    return Request(architecture=arch, shapes=shapes, **fields)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    batch = Batch(
        sequence_tokens=draw(st.integers(16, 8192)),
        micro_batch_sequences=draw(st.integers(1, 16)),
        gradient_checkpointing=draw(st.booleans()),
        attention=draw(st.sampled_from(Attention)),
    )
    tuning = Tuning(
        rank=draw(st.integers(1, 256)), dropout=draw(st.sampled_from([0.0, 0.1])), quantized=draw(st.booleans())
    )
    return request(draw(st.sampled_from(NAMES)), batch=batch, tuning=tuning)


@settings(max_examples=60, deadline=None)
@given(asked=requests())
def test_longer_rows_more_rows_and_higher_ranks_never_need_less(asked: Request) -> None:
    peak = plan(asked).peak_allocated_bytes
    batch, tuning = asked.batch, asked.tuning
    longer = with_batch(asked, sequence_tokens=2 * batch.sequence_tokens)
    wider = with_batch(asked, micro_batch_sequences=2 * batch.micro_batch_sequences)
    richer = asked.model_copy(update={"tuning": tuning.model_copy(update={"rank": 2 * tuning.rank})})
    assert all(plan(more).peak_allocated_bytes >= peak for more in (longer, wider, richer))


@settings(max_examples=60, deadline=None)
@given(asked=requests())
def test_checkpointing_never_keeps_more_and_4_bit_never_weighs_more(asked: Request) -> None:
    planned, packed = plan(asked), plan(quantized(asked))
    assert packed.weight_bytes + packed.quantization_constant_bytes <= 2 * planned.total_parameters
    checkpointed = with_batch(asked, gradient_checkpointing=True)
    kept = with_batch(asked, gradient_checkpointing=False)
    assert plan(checkpointed).activation_bytes == planned.activation_bytes_with_checkpointing
    assert plan(kept).activation_bytes == planned.activation_bytes_without_checkpointing


@settings(max_examples=60, deadline=None)
@given(asked=requests())
def test_a_peak_is_at_least_the_sum_of_what_is_held(asked: Request) -> None:
    p = plan(asked)
    held = p.weight_bytes + p.quantization_constant_bytes + p.adapter_bytes + p.gradient_bytes + p.optimizer_bytes
    assert p.peak_allocated_bytes >= held
    assert p.needed_bytes >= p.peak_training_bytes >= p.peak_allocated_bytes + p.context_bytes


@pytest.mark.parametrize("name", ["falcon-7b", "mixtral-8x7b"])
def test_what_transformers_does_not_quantize_is_planned_in_16_bit(name: str) -> None:
    full, packed = plan(request(name)), plan(request(name, tuning=Tuning(quantized=True)))
    assert packed.weight_bytes > 0.95 * full.weight_bytes


def test_shards_hold_their_part_of_weights_and_constants() -> None:
    asked = request("llama-3-70b", tuning=Tuning(quantized=True))
    one = plan(asked)
    four = plan(asked.model_copy(update={"layout": Layout.FSDP, "gpus": 4}))
    assert four.weight_bytes * 4 == pytest.approx(one.weight_bytes, rel=1e-6)
    assert four.quantization_constant_bytes * 4 == pytest.approx(one.quantization_constant_bytes, rel=1e-6)
    assert four.optimizer_bytes == one.optimizer_bytes, "what is trained is whole on every GPU"
    assert four.gathered_bytes > 0
    assert not four.verified


def test_an_offloaded_base_is_on_the_host_and_takes_its_time_to_come() -> None:
    asked = request(
        "llama-3-70b", tuning=Tuning(quantized=True), batch=Batch(sequence_tokens=1024), run_tokens=1_024_000
    )
    here = plan(asked, sustained_tflops=100.0)
    there = plan(asked.model_copy(update={"layout": Layout.CPU_OFFLOAD}), sustained_tflops=100.0)
    base = here.weight_bytes + here.quantization_constant_bytes
    assert there.weight_bytes == there.quantization_constant_bytes == 0
    assert base <= there.offloaded_bytes < 2 * base, "pinned memory is taken in powers of two"
    assert there.host_memory_bytes - here.host_memory_bytes == there.offloaded_bytes
    assert here.work.seconds is not None
    # 1,000 micro-batches, each with two passes over the whole base at 12 GB/s
    assert there.work.seconds == pytest.approx(here.work.seconds + 1000 * 2 * base / 12e9)
    half = plan(asked.model_copy(update={"layout": Layout.CPU_OFFLOAD, "gpus": 2}))
    assert half.offloaded_bytes < there.offloaded_bytes
    assert not there.verified


def test_tied_embeddings_stay_on_the_gpu() -> None:
    planned = plan(request("llama-3.2-1b", layout=Layout.CPU_OFFLOAD))
    assert planned.weight_bytes == 2 * 128256 * 2048 + 2 * 2048, "and so does the last norm"


def test_the_constants_of_a_70b_are_a_gigabyte() -> None:
    """Measured: about 1.1 GB with double quantization, which bitsandbytes and FSDP alone would leave whole on every rank."""
    planned = plan(request("llama-3-70b", tuning=Tuning(quantized=True)))
    assert 1.0e9 < planned.quantization_constant_bytes < 1.2e9


def test_a_token_costs_about_six_operations_a_weight_with_checkpointing_and_four_without() -> None:
    asked = request("llama-3-8b", batch=Batch(sequence_tokens=512))
    weights = 7.5e9  # without the input embeddings
    checkpointed = plan(asked).work.flop_per_token / weights
    kept = plan(with_batch(asked, gradient_checkpointing=False)).work.flop_per_token / weights
    assert 6.0 < checkpointed < 6.4
    assert 4.0 < kept < 4.3


def test_however_many_prompts_there_are_few_are_answered_at_once() -> None:
    """As the trainer does it; a long answer counts, with the keys and values of all its tokens."""
    few = plan(request("llama-3-8b", generation_prompts=3))
    many = plan(request("llama-3-8b", generation_prompts=100))
    assert many.peak_evaluation_bytes == few.peak_evaluation_bytes == plan(request("llama-3-8b")).peak_evaluation_bytes
    longer = plan(request("llama-3-8b", generation_prompts=1, generation_new_tokens=100_000))
    assert longer.peak_evaluation_bytes > few.peak_evaluation_bytes


def test_time_is_operations_by_speed() -> None:
    asked = request("llama-3-8b", run_tokens=1_000_000, gpus=2, layout=Layout.DDP)
    measured = plan(asked, sustained_tflops=100.0).work
    assert measured.seconds == pytest.approx(measured.flop_total / 2e14)
    assert measured.gpu_hours == pytest.approx(measured.flop_total / 1e14 / 3600)
    assert plan(asked).work.seconds is None


def test_an_optimizer_that_is_not_known_is_planned_as_adamw() -> None:
    assert optimizer_bytes("novel", 1000) == optimizer_bytes("adamw_torch_fused", 1000) == 8000
    assert optimizer_bytes("paged_adamw_8bit", 1_000_000) < 2_100_000


@pytest.mark.parametrize(
    "change",
    [
        {"new_decoder_architecture": True, "num_kv_heads": 8},
        {"alibi": True},
        {"parallel_attn": False},
        {"mlp_bias": True},
    ],
)
def test_variants_of_a_known_family_are_not_taken_for_it(change: dict[str, Any]) -> None:
    assert parse_config(read_config("falcon-7b")).known
    assert not parse_config({**read_config("falcon-7b"), **change}).known


def test_a_spec_says_what_is_planned() -> None:
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"uri": "hf://org/model"},
            "data": {"train": [{"uri": "s3://bucket/train.jsonl"}]},
            "output": {"uri": "s3://bucket/out"},
            "method": {"type": "QLoRA", "lora": {"rank": 8, "targetModules": ["q_proj"]}},
            "training": {"length": {"steps": 10}, "globalBatchSequences": 4, "maxSequenceTokens": 100},
        }
    )
    asked = request_of(spec, *model("smollm2-135m"))
    assert asked.tuning.rank == 8
    assert asked.tuning.target_modules == ["q_proj"]
    assert asked.run_tokens == 10 * 4 * 100
    assert request_of(spec, *model("smollm2-135m"), run_tokens=7).run_tokens == 7


def test_experts_with_adapters_are_copied_for_each_pass() -> None:
    """One layer's copy and its gradient with checkpointing; without, the copies of all layers stay."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    bare = plan(request("mixtral-8x7b", tuning=Tuning(dropout=0)))
    adapted = plan(request("mixtral-8x7b", tuning=Tuning(dropout=0, target_parameters=experts)))
    layer, trained = 2 * 8 * 3 * 4096 * 14336, 32 * 16 * 8 * (4096 + 2 * 14336 + 14336 + 4096)
    assert adapted.trainable_parameters - bare.trainable_parameters == trained
    with_it = adapted.activation_bytes_with_checkpointing - bare.activation_bytes_with_checkpointing
    assert with_it == 2 * layer
    without = adapted.activation_bytes_without_checkpointing - bare.activation_bytes_without_checkpointing
    assert without == 33 * layer + 2 * trained, "and autocast's copies of the matrices"
    assert adapted.peak_evaluation_bytes - bare.peak_evaluation_bytes == 16 * trained + layer + 2 * trained
    assert not adapted.verified
