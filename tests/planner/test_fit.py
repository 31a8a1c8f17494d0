"""A verdict is about the GPU's memory, and what it offers instead does fit."""

from __future__ import annotations

import pytest

from finetune_api.planner import Batch, Request, Tuning, find_gpu, fit, known_gpus, misfit_sentence, plan
from finetune_api.planner.distributed import Layout
from finetune_api.planner.fit import Alternative, alternatives, limit, quantized, with_batch
from finetune_api.planner.plan import Decisive
from finetune_api.planner.sentences import alternative_phrase
from finetune_api.spec import QuantizationType
from tests.planner.cases import model

GIB = 1 << 30


def request(name: str, **batch: int | bool) -> Request:
    arch, shapes = model(name)
    return Request(architecture=arch, shapes=shapes, batch=Batch(**batch))


def changed(base: Request, alternative: Alternative) -> Request:
    if alternative.method == "QLoRA":
        base = quantized(base)
        if alternative.gpus or alternative.cpu_offload:
            base = with_batch(base, micro_batch_sequences=1, gradient_checkpointing=True)
    settings = {
        "sequence_tokens": alternative.sequence_tokens,
        "micro_batch_sequences": alternative.micro_batch_sequences,
        "gradient_checkpointing": alternative.gradient_checkpointing,
    }
    base = with_batch(base, **{k: v for k, v in settings.items() if v is not None})
    if alternative.gpus:
        base = base.model_copy(update={"gpus": alternative.gpus, "layout": Layout.FSDP})
    if alternative.cpu_offload:
        base = base.model_copy(update={"layout": Layout.CPU_OFFLOAD})
    return base


def test_a_plan_fits_up_to_the_margin_and_not_beyond() -> None:
    asked = request("smollm2-135m")
    planned = plan(asked)
    enough = int(planned.needed_bytes / 0.95) + 1
    assert fit(asked, planned, enough).fits
    verdict = fit(asked, planned, enough - GIB)
    assert not verdict.fits
    assert verdict.missing_bytes == planned.needed_bytes - limit(enough - GIB)


@pytest.mark.parametrize(
    ("name", "batch", "gibibytes"),
    [
        ("llama-3-8b", {"micro_batch_sequences": 8}, 22),
        ("llama-3-8b", {"sequence_tokens": 8192}, 16),
        ("llama-3-8b", {"gradient_checkpointing": False}, 24),
        ("qwen2.5-32b", {}, 40),
        ("llama-3-70b", {"sequence_tokens": 4096}, 24),
    ],
)
def test_whatever_is_offered_does_fit(name: str, batch: dict[str, int | bool], gibibytes: int) -> None:
    asked = request(name, **batch)
    planned = plan(asked)
    bound = limit(gibibytes * GIB)
    offered = list(alternatives(asked, planned, bound))
    assert offered
    for alternative in offered:
        needed = plan(changed(asked, alternative)).needed_bytes
        assert needed == alternative.needed_bytes
        if alternative.gpu_products:
            assert all(needed <= limit(find_gpu(p).usable_bytes) for p in alternative.gpu_products)
        else:
            assert needed <= bound


def test_a_misfit_says_by_how_much_and_what_to_write_instead() -> None:
    asked = request("llama-3-8b", micro_batch_sequences=8)
    gpu = find_gpu("a10g")
    sentence = misfit_sentence("Llama-3-8B", asked, fit(asked, plan(asked), gpu.usable_bytes), gpu)
    assert sentence.startswith("Llama-3-8B, LoRA, 2048 tokens, micro-batch 8 needs ")
    assert "NVIDIA A10G has 20.9 GiB to use with the 5 % margin" in sentence
    assert "training.microBatchSequences: 2 (" in sentence
    assert "method.type: QLoRA (" in sentence


def test_evaluation_is_named_where_it_needs_the_most() -> None:
    """A 70B in 4 bit, with one short row a step: the 16,384 tokens of an evaluation batch are more."""
    arch, shapes = model("llama-3-70b")
    asked = Request(architecture=arch, shapes=shapes, tuning=Tuning(quantized=True), batch=Batch(sequence_tokens=1024))
    planned = plan(asked)
    assert planned.decisive is Decisive.EVALUATION
    gpu = find_gpu("a40")
    assert "evaluation, in batches of 16384 tokens and 0 prompts, needs the most" in misfit_sentence(
        "Llama 3 70B", asked, fit(asked, planned, gpu.usable_bytes), gpu
    )


def test_4_bit_is_offered_where_8_do_not_fit() -> None:
    arch, shapes = model("llama-3-8b")
    tuning = Tuning(quantized=True, quantization=QuantizationType.INT8)
    asked = Request(architecture=arch, shapes=shapes, tuning=tuning, batch=Batch(sequence_tokens=1024))
    planned, offered = plan(asked), alternatives(asked, plan(asked), 9 * GIB)
    packed, *shared = [a for a in offered if a.quantization]
    assert {a.method for a in shared} == {None}
    assert all(a.gpus or a.cpu_offload for a in shared), "8 bit cannot be shared out, 4 bit can"
    assert packed.needed_bytes <= 9 * GIB < planned.needed_bytes
    assert alternative_phrase(packed).startswith("method.quantization.type: NF4 (")


def test_loading_can_need_more_than_training() -> None:
    """A 4-bit base is read a tensor at a time in 16 bit; with a tiny batch that is the most."""
    arch, shapes = model("gemma-3-1b")
    tuning = Tuning(quantized=True, rank=1, target_modules=["k_proj"])
    asked = Request(
        architecture=arch, shapes=shapes, tuning=tuning, batch=Batch(sequence_tokens=16), evaluation_tokens=16
    )
    planned = plan(asked)
    assert (
        planned.peak_loading_bytes - planned.context_bytes > planned.weight_bytes + planned.quantization_constant_bytes
    )


def test_known_gpus_are_found_by_label_and_by_name() -> None:
    for name in ("NVIDIA-A10G", "NVIDIA A10G", "a10g", "NVIDIA-A10G-SHARED"):
        assert find_gpu(name).product == "NVIDIA-A10G"
    assert find_gpu("RTX 4090").product == "NVIDIA-GeForce-RTX-4090"
    sizes = [gpu.usable_bytes for gpu in known_gpus()]
    assert sizes == sorted(sizes)
