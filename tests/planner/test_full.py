"""Full weights by plan: counts against models on the meta device, state against the optimizers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_api.full_weights import stand_ins
from finetune_api.planner import (
    Alternative,
    Batch,
    Layout,
    Request,
    Tuning,
    choose,
    describe,
    fit,
    host_memory_misfit,
    parse_config,
    plan,
    possible,
    request_of,
    rounds,
)
from finetune_api.planner.gpus import find_gpu
from finetune_api.planner.linears import UnknownTarget
from finetune_api.planner.sentences import alternative_phrase, plan_sentence
from finetune_api.spec import FineTuneJobSpec, Full, GaLore, MethodType, Spectrum
from finetune_trainer.train.full import trained_parameters
from finetune_trainer.train.galore import GaLoreAdamW, galore_groups
from tests.planner.cases import read_config

GIB = 1 << 30
HALF, QUARTER = Full(spectrum=Spectrum(fraction=0.5)), Full(spectrum=Spectrum(fraction=0.25))


def meta_model(name: str) -> Any:
    config = AutoConfig.for_model(**read_config(name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def request(name: str, full: Full, **changes: Any) -> Request:
    arch = parse_config(read_config(name))
    return Request(
        architecture=arch, shapes=describe(arch), tuning=Tuning(full=full, galore_rank=changes.pop("rank", None)),
        batch=Batch(sequence_tokens=1024), **changes,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-0.5b", "phi-3-mini"])
@pytest.mark.parametrize("full", [Full(), QUARTER, Full(modules=["mlp"])], ids=["all", "Spectrum", "modules"])
def test_counts_and_bytes_are_those_of_the_model(name: str, full: Full) -> None:
    model, asked = meta_model(name), request(name, full)
    chosen = set(stand_ins(asked.shapes, full))
    for n, p in model.named_parameters():
        p.requires_grad_(n in chosen)
    trained = trained_parameters(model)
    count, total = sum(p.numel() for p in trained.values()), sum(p.numel() for p in model.parameters())
    planned = plan(asked)
    assert len(trained) == len(chosen)
    assert (planned.trainable_parameters, planned.total_parameters) == (count, total)
    assert planned.weight_bytes == 2 * (total - count)
    assert (planned.adapter_bytes, planned.gradient_bytes, planned.optimizer_bytes) == (4 * count, 4 * count, 8 * count)
    assert planned.peak_allocated_bytes > 2 * (total - count) + 16 * count


def test_a_quarter_is_a_quarter_of_each_kind() -> None:
    """Llama-3-8B has 32 layers: 8 of each of its seven kinds of matrix."""
    assert plan(request("llama-3-8b", QUARTER)).trainable_parameters == 8 * (
        2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    )


def test_galores_state_is_what_the_optimizer_keeps() -> None:
    """Of a real step on a small model, tensor by tensor; the counters of steps are left out."""
    config = {
        **read_config("llama-3-8b"),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": 50,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config.pop("head_dim", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).float()
    groups = galore_groups(model, [{"params": list(model.parameters()), "weight_decay": 0.0}])
    made = GaLoreAdamW(
        groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, settings=GaLore(rank=16), same=lambda t: t
    )
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    made.step()
    kept = sum(v.nbytes for state in made.state.values() for k, v in state.items() if k != "step")
    arch = parse_config(config)
    asked = Request(
        architecture=arch, shapes=describe(arch), tuning=Tuning(full=Full(), galore_rank=16), optimizer="galore_adamw"
    )
    assert plan(asked).optimizer_bytes == kept


def test_an_unknown_module_is_told() -> None:
    with pytest.raises(UnknownTarget, match="w3 is no module"):
        plan(request("llama-3-8b", Full(modules=["w3"])))


def test_what_would_fit_instead_is_offered_and_does() -> None:
    asked = request("llama-3-8b", Full())
    verdict = fit(asked, plan(asked), 80 * GIB)
    phrases = [alternative_phrase(a) for a in verdict.alternatives]
    assert phrases[0].startswith("method.full.spectrum.fraction: 0.5 ")
    assert any(p.startswith("method.type: LoRA") for p in phrases)
    assert plan(request("llama-3-8b", HALF)).needed_bytes == verdict.alternatives[0].needed_bytes < verdict.limit_bytes


def job(**changes: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"uri": "hf://org/m"},
            "data": {"train": [{"uri": "s3://bucket/t.jsonl"}]},
            "output": {"uri": "s3://bucket/o"},
            **changes,
        }
    )


def test_sharing_out_is_offered_with_a_method_that_can_be_shared_out() -> None:
    adapter, full = (Alternative(method=method, gpus=4, needed_bytes=1) for method in ("QLoRA", None))
    assert possible(job(method={"type": "Full"}), [adapter, full]) == [adapter]
    assert possible(job(method={"type": "Full"}), [adapter, full], shardable=False) == []
    asked = request("llama-2-70b", Full())
    assert {"LoRA", "QLoRA"} & {a.method for a in fit(asked, plan(asked), 40 * GIB).alternatives if a.gpus}


def test_full_weights_are_whole_on_each_gpu_and_auto_never_becomes_full() -> None:
    spec = job(method={"type": "Full", "full": {"spectrum": {"fraction": 0.125}}}, compute={"gpusPerNode": 2})
    assert rounds(spec) == [(Layout.DDP,)]
    arch = parse_config(read_config("llama-3-8b"))
    asked = request_of(spec, arch, describe(arch), gpus=2)
    choice = choose(asked, 80 * GIB, 16, MethodType.FULL, several=(Layout.DDP,))
    assert choice.fit.fits
    assert plan_sentence(choice.request, choice.planned, find_gpu("NVIDIA A100-SXM4-80GB")).startswith(
        "Full (Spectrum 0.125) on 2 ×"
    )
    auto = choose(request_of(job(method={"type": "Auto"}), arch, describe(arch)), 640 * GIB, 16)
    assert auto.method is MethodType.LORA


@pytest.mark.parametrize("gpus", [1, 2])
def test_host_memory_must_hold_the_checkpoints_that_are_being_written_and_wait(gpus: int) -> None:
    """Four on the first process, one on each other; 12 bytes a weight."""
    arch = parse_config(read_config("qwen2.5-0.5b"))
    method = {"type": "Full", "full": {"spectrum": {"fraction": 0.5}}}
    asked = request_of(job(method=method), arch, describe(arch), gpus=gpus)
    choice = choose(asked, 80 * GIB, 16, MethodType.FULL)
    copies = 12 * choice.planned.trainable_parameters * (3 + gpus)
    few, enough = (copies // GIB + 4 * gpus + extra for extra in (0, 2))
    words = host_memory_misfit(job(method=method, compute={"memory": f"{few}Gi", "gpusPerNode": gpus}), choice)
    assert words.startswith("method.type: Full needs ")
    assert f"compute.memory: {few}Gi is" in words
    assert not host_memory_misfit(job(method=method, compute={"memory": f"{enough}Gi", "gpusPerNode": gpus}), choice)


def test_what_is_trained_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a search of every name for every module, and a plan is made for each alternative."""
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return stand_ins(*arguments)

    monkeypatch.setattr("finetune_api.planner.full.stand_ins", counted)
    plan(request("qwen2.5-0.5b", QUARTER))
    assert len(calls) == 1
