"""Merging into models whose files have other names than the model, weights stored the other way round, or a tensor for each expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.publish.adapter import Adapter, in_files, read_adapter
from finetune_trainer.publish.merge import BaseWeights, merge, write_companions
from finetune_trainer.publish.merged import with_stored_name
from finetune_trainer.publish.round_trip import RoundTrip
from finetune_trainer.publish.safetensors_stream import Checkpoint, element_size
from finetune_trainer.publish.stored_weights import StoredWeights, empty_model
from finetune_trainer.publish.streamed import StreamedModel
from finetune_trainer.publish.written import check_written
from finetune_trainer.train import device, evaluate, model
from finetune_trainer.train.quantized import quantized_modules
from finetune_trainer.train.rows import Rows
from tests.support.prepared import deep_merge, encode, job_spec, questions, snapshot_of, table
from tests.support.tiny_families import build_tiny_family
from tests.trainer.test_publish_merge import CPU32

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h"],
    "falcon": ["query_key_value", "dense_4h_to_h"],
}
IDS = torch.tensor([[1, 50, 17, 60, 200, 31, 2]])


def build(folder: Path, family: str) -> Path:
    """A tiny model with the names and the sharding of the Hub's."""
    base = build_tiny_family(folder, family)
    tensors = load_file(base / "model.safetensors")
    if family == "gpt2":
        # openai-community/gpt2: of the bare model, with the causal mask of each layer.
        tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        tensors |= {f"h.{n}.attn.bias": torch.ones(1, 1, 8, 8).tril() for n in range(2)}
    if family == "gpt_neox":
        # EleutherAI/pythia-*: buffers that transformers makes anew.
        tensors |= {f"gpt_neox.layers.{n}.attention.bias": torch.ones(1, 1, 8, 8).tril().bool() for n in range(2)}
        tensors |= {f"gpt_neox.layers.{n}.attention.masked_bias": torch.tensor(-torch.inf).half() for n in range(2)}
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, base / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {n: file for file, part in files.items() for n in part}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base


def random_adapter(plain: Any, folder: Path, targets: list[str], **settings: Any) -> Path:
    """A peft adapter with random weights on the model."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, **settings}
    tuned = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05 if "lora_" in name else 0.5)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


def plain_model(folder: Path) -> Any:
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def stored_of(base: Path) -> StoredWeights:
    return StoredWeights(empty_model(base, torch.float32), Checkpoint(base).tensors)


def write_merged(base: Path, weights: BaseWeights, adapter: Path, folder: Path) -> Adapter:
    """As the publish stage does; what was merged, by the files' names."""
    found = in_files(read_adapter(adapter), stored_of(base))
    merge(weights, found, torch.float32, folder, lambda _: None)
    write_companions(base, sorted(p.name for p in base.iterdir()), adapter, torch.float32, folder)
    check_written(weights, found, folder)
    return found


@pytest.mark.parametrize("settings", [{"use_dora": True, "use_rslora": True}, {"bias": "all"}], ids=["DoRA", "biases"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_merge_keeps_names_and_files_and_is_pefts_merge(tmp_path: Path, family: str, settings: Any) -> None:
    base = build(tmp_path / "base", family)
    adapter = random_adapter(plain_model(base), tmp_path / "adapter", TARGETS.get(family, ATTENTION), **settings)
    folder = tmp_path / "merged"
    weights = BaseWeights(Checkpoint(base), None, stored_of(base).conv1d)
    found = write_merged(base, weights, adapter, folder)
    theirs = PeftModel.from_pretrained(plain_model(base), adapter).merge_and_unload()
    torch.testing.assert_close(logits(plain_model(folder)), logits(theirs), rtol=1e-4, atol=1e-5)
    ours, before = Checkpoint(folder), weights.checkpoint
    assert {n: (t.file, t.shape) for n, t in ours.tensors.items()} == {
        n: (t.file, t.shape) for n, t in before.tensors.items()
    }
    changed = {name for name in ours.tensors if not torch.equal(ours.read(name), before.read(name))}
    assert changed == {f"{module}.weight" for module in found.modules} | found.replaced
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: t.file for name, t in ours.tensors.items()}
    sizes = {name: element_size(t) * t.elements for name, t in ours.tensors.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert {n: t.code for n, t in ours.tensors.items()} == {n: t.code for n, t in before.tensors.items()}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt2", "NF4"), ("gpt2", "Int8"), ("gpt_neox", "NF4"), ("mixtral", "NF4"), ("qwen2_moe", "NF4")],
)
def test_after_qlora_the_merged_base_is_what_training_saw(tmp_path: Path, family: str, kind: str) -> None:
    """Proven by training's own records, whatever the files call the weights and however they are stored."""
    base = build(tmp_path / "base", family)
    changes = {"method": {"type": "QLoRA", "quantization": {"type": kind}}}
    run = snapshot_of(deep_merge(job_spec(None, "bucket"), changes), "u" * 32)
    held = model.load_base(base, run, device.Compute(torch.device("cpu"), torch.bfloat16, "cpu"))
    records = quantized_modules(held)
    assert not any("experts." in record.name or record.name.endswith("mlp.gate") for record in records)
    stored = stored_of(base)
    quantization = run.plan.method.quantization
    assert quantization is not None
    round_trip = RoundTrip(quantization, [with_stored_name(r, stored.alone) for r in records], torch.bfloat16)
    seen = plain_model(base)
    for record in records:
        weight = held.get_submodule(record.name).weight
        if kind == "Int8":
            value = (weight.data * (weight.SCB / 127)[:, None]).bfloat16()
        else:
            value = dequantize_4bit(weight.data, weight.quant_state)
        own = seen.get_submodule(record.name)
        own.weight.data = (value.T if isinstance(own, Conv1D) else value).float().contiguous()
    adapter = random_adapter(plain_model(base), tmp_path / "adapter", TARGETS.get(family, ATTENTION), use_dora=True)
    weights = BaseWeights(Checkpoint(base), round_trip, stored.conv1d)
    write_merged(base, weights, adapter, tmp_path / "merged")
    assert not round_trip.inexact
    theirs = PeftModel.from_pretrained(seen, adapter).merge_and_unload()
    torch.testing.assert_close(logits(plain_model(tmp_path / "merged")), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon", "mixtral", "qwen2_moe"])
def test_the_streamed_forward_is_the_models_own(tmp_path: Path, tiny_model: Path, family: str) -> None:
    base = build(tmp_path / "base", family)
    adapter = random_adapter(plain_model(base), tmp_path / "adapter", TARGETS.get(family, ATTENTION), use_dora=True)
    tokenizer = model.load_tokenizer(tiny_model, snapshot_of(job_spec(None, "bucket"), "u" * 32))
    rows = Rows(table([encode(tokenizer, q) for q in questions(4)]))
    tuned = PeftModel.from_pretrained(plain_model(base), adapter).get_base_model()
    checkpoint = Checkpoint(base)
    found = in_files(read_adapter(adapter), stored_of(base))
    streamed = StreamedModel(base, set(checkpoint.tensors), checkpoint.read, torch.float32, adapter=found)
    expected = evaluate.held_out_loss(tuned, rows, 0, CPU32).loss
    assert streamed.loss(rows, list(range(len(rows))), 0) == pytest.approx(expected, rel=1e-5)
    bare = evaluate.held_out_loss(plain_model(base), rows, 0, CPU32).loss
    assert abs(bare - expected) > 1e-3


@pytest.mark.parametrize(
    ("family", "stored", "head"),
    [("gpt_neox", [], "embed_out.weight"), ("falcon", [], None), ("falcon", ["lm_head.weight"], "lm_head.weight")],
)
def test_the_head_is_known_by_the_files_name(tmp_path: Path, family: str, stored: list[str], head: str | None) -> None:
    base = build_tiny_family(tmp_path / "base", family)
    assert StoredWeights(empty_model(base, torch.float32), {*Checkpoint(base).tensors, *stored}).head == head


GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("family", "parameters"),
    [("mixtral", [DOWN, GATE_UP]), ("qwen2_moe", [GATE_UP]), ("qwen3_moe", ["layers.1.mlp.experts.down_proj"])],
)
def test_updates_of_experts_are_merged_expert_by_expert(
    tmp_path: Path, tiny_model: Path, family: str, parameters: list[str]
) -> None:
    base = build(tmp_path / "base", family)
    adapter = random_adapter(
        plain_model(base), tmp_path / "adapter", ["q_proj"], target_parameters=parameters, use_rslora=True
    )
    folder = tmp_path / "merged"
    weights = BaseWeights(Checkpoint(base), None)
    found = write_merged(base, weights, adapter, folder)
    theirs = PeftModel.from_pretrained(plain_model(base), adapter).merge_and_unload()
    torch.testing.assert_close(logits(plain_model(folder)), logits(theirs), rtol=1e-4, atol=1e-5)
    for name, parameter in plain_model(folder).named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-5, atol=1e-6)
    ours, before = Checkpoint(folder), weights.checkpoint
    changed = {name for name in ours.tensors if not torch.equal(ours.read(name), before.read(name))}
    kinds = {GATE_UP: ("w1", "w3", "gate_proj", "up_proj"), DOWN: ("w2", "down_proj")}
    layers = [1] if parameters[0].startswith("layers.1.") else [0, 1]
    wanted = {kind for p in parameters for kind in kinds["mlp." + p.rpartition("mlp.")[2]]}
    experts = {
        n for n in ours.tensors if ".experts." in n and n.split(".")[-2] in wanted and int(n.split(".")[2]) in layers
    }
    assert len(experts) == 4 * len(layers) * sum(
        {GATE_UP: 2, DOWN: 1}["mlp." + p.rpartition("mlp.")[2]] for p in parameters
    )
    assert changed == experts | {f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)}

    tokenizer = model.load_tokenizer(tiny_model, snapshot_of(job_spec(None, "bucket"), "u" * 32))
    rows = Rows(table([encode(tokenizer, q) for q in questions(2)]))
    streamed = StreamedModel(base, set(before.tensors), before.read, torch.float32, adapter=found)
    expected = evaluate.held_out_loss(theirs, rows, 0, CPU32).loss
    assert streamed.loss(rows, list(range(len(rows))), 0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spoilt", ["a B is missing", "another rank", "a parameter is missing"])
def test_an_adapter_that_lacks_experts_updates_is_not_whole(tmp_path: Path, spoilt: str) -> None:
    base = build_tiny_family(tmp_path / "base", "mixtral")
    adapter = random_adapter(plain_model(base), tmp_path / "adapter", ["q_proj"], target_parameters=[DOWN])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    experts = sorted(name for name in tensors if ".experts." in name)
    if spoilt == "a B is missing":
        tensors.pop(experts[1])
    elif spoilt == "another rank":
        for name in experts:
            tensors[name] = tensors[name][:-1].contiguous() if "lora_A" in name else tensors[name][:, :-1].contiguous()
    else:
        tensors = {name: value for name, value in tensors.items() if name not in experts}
    save_file(tensors, file)
    with pytest.raises(StageError, match=r"not whole: .*mlp\.experts\.down_proj") as caught:
        read_adapter(adapter)
    assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_updates_of_experts_that_the_base_has_not_fail(tmp_path: Path) -> None:
    base = build_tiny_family(tmp_path / "base", "mixtral")
    adapter = random_adapter(plain_model(base), tmp_path / "adapter", ["q_proj"], target_parameters=[DOWN])
    dense = stored_of(build_tiny_family(tmp_path / "dense", "qwen3"))
    with pytest.raises(StageError, match="the base has no such experts") as caught:
        in_files(read_adapter(adapter), dense)
    assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_files_that_lack_an_experts_tensor_are_refused(tmp_path: Path) -> None:
    base = build_tiny_family(tmp_path / "base", "mixtral")
    names = {n for n in Checkpoint(base).tensors if ".1.block_sparse_moe.experts" not in n}
    with pytest.raises(
        StageError, match=r"2 weights of MixtralForCausalLM \(such as model\.layers\.1\.mlp\."
    ) as caught:
        StoredWeights(empty_model(base, torch.float32), names)
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL
