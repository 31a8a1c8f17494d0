"""The streamed merge against peft's own, and the streamed forward against the whole model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_api.failures import Reason
from finetune_api.results import TrainMetrics
from finetune_api.spec import Quantization
from finetune_trainer.errors import StageError
from finetune_trainer.publish import safetensors_stream, written
from finetune_trainer.publish.adapter import Lora, read_adapter
from finetune_trainer.publish.check import TRAINED_ABSOLUTE, TRAINED_TOLERANCE, may_be_rounded_away, must_agree
from finetune_trainer.publish.merge import BaseWeights, merge, merged_config, write_companions
from finetune_trainer.publish.round_trip import RoundTrip
from finetune_trainer.publish.safetensors_stream import Checkpoint
from finetune_trainer.publish.streamed import StreamedModel
from finetune_trainer.publish.written import check_written
from finetune_trainer.train import device, evaluate, int8, model
from finetune_trainer.train.quantized import describe, describe_int8, quantized_modules
from finetune_trainer.train.rows import Rows
from tests.planner.simulator.tracker import LiveStorages
from tests.support.prepared import deep_merge, encode, job_spec, questions, snapshot_of, table
from tests.support.tiny_families import build_tiny_family
from tests.support.tiny_model import build_tiny_model

CPU32 = device.Compute(torch.device("cpu"), torch.float32, "cpu")


def adapter_for(base: Path, folder: Path, **settings: Any) -> Path:
    """A peft adapter with random weights on the base."""
    torch.manual_seed(1)
    settings = {"target_modules": "all-linear", **settings}
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05 if "lora_" in name else 0.5)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged(base: BaseWeights, adapter: Path, dtype: torch.dtype, folder: Path) -> dict[str, torch.Tensor]:
    merge(base, read_adapter(adapter), dtype, folder, lambda _: None)
    return {n: t for f in base.checkpoint.files for n, t in load_file(folder / f).items()}


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return dict(PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict())


@pytest.fixture(scope="module", params=["one file", "shards", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return build_tiny_model(folder, shards=3 if request.param == "shards" else 1, tied=request.param == "tied")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny matrix has several parts."""
    monkeypatch.setattr(safetensors_stream, "CHUNK_BYTES", 5 * 64 * 4)
    monkeypatch.setattr(safetensors_stream.rows_per_chunk, "__defaults__", (5 * 64 * 4,))
    monkeypatch.setattr(Checkpoint.read_rows, "__defaults__", (5 * 64 * 4,))
    monkeypatch.setattr(written, "CHECK_BYTES", 3 * 64 * 4)


WHOLE = {"modules_to_save": ["embed_tokens", "norm"], "ensure_weight_tying": True}
PATTERNS = {
    "rank_pattern": {"layers.1.mlp.up_proj": 2, "up_proj": 6, "q_proj": 3},
    "alpha_pattern": {"up_proj": 5, "o_proj": 1},
    "use_rslora": True,
}


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, PATTERNS, WHOLE],
    ids=["LoRA", "rsLoRA", "DoRA", "patterns", "whole modules"],
)
def test_the_merge_is_pefts_merge(base: Path, tmp_path: Path, settings: dict[str, Any], small_chunks: None) -> None:
    adapter = adapter_for(base, tmp_path / "adapter", **settings)
    ours = merged(BaseWeights(Checkpoint(base), None), adapter, torch.float32, tmp_path / "merged")
    theirs = peft_merged(base, adapter)
    assert set(ours) == set(Checkpoint(base).tensors)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


EVERYTHING = {"use_dora": True, **PATTERNS}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("phi3", {"rank_pattern": {"qkv_proj": 6}, "use_dora": True}),
        ("gemma3_text", EVERYTHING),
        ("qwen3", {**EVERYTHING, "bias": "all", "attention_bias": True}),
        ("qwen2", {**EVERYTHING, "bias": "none"}),
        ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    ],
    ids=["fused layers", "Gemma", "every bias", "biases of layers with DoRA", "biases of adapted layers"],
)
def test_the_merge_is_pefts_merge_in_other_families(
    tmp_path: Path, family: str, settings: dict[str, Any], small_chunks: None
) -> None:
    settings = dict(settings)
    own = {name: settings.pop(name) for name in ("attention_bias",) if name in settings}
    base = build_tiny_family(tmp_path / "base", family, **own)
    adapter = adapter_for(base, tmp_path / "adapter", **settings)
    weights = BaseWeights(Checkpoint(base), None)
    ours = merged(weights, adapter, torch.float32, tmp_path / "merged")
    theirs = peft_merged(base, adapter)
    assert set(ours) == set(Checkpoint(base).tensors)
    changed = 0
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(value, weights.checkpoint.read(name))
    expected = len(read_adapter(adapter).modules) + len(read_adapter(adapter).replaced)
    assert changed == expected
    write_companions(base, sorted(p.name for p in base.iterdir()), adapter, torch.float32, tmp_path / "merged")
    check_written(weights, read_adapter(adapter), tmp_path / "merged")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_is_rounded_once_at_the_end(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = adapter_for(base, tmp_path / "adapter")
    exact = merged(BaseWeights(Checkpoint(base), None), adapter, torch.float32, tmp_path / "exact")
    rounded = merged(BaseWeights(Checkpoint(base), None), adapter, dtype, tmp_path / "rounded")
    assert {t.dtype for t in rounded.values()} == {dtype}
    assert all(torch.equal(rounded[n], exact[n].to(dtype)) for n in exact)


def test_the_merged_folder_loads_in_plain_transformers(base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(base, tmp_path / "adapter")
    folder = tmp_path / "merged"
    merged(BaseWeights(Checkpoint(base), None), adapter, torch.bfloat16, folder)
    write_companions(base, sorted(p.name for p in base.iterdir()), adapter, torch.bfloat16, folder)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    assert {p.name for p in folder.iterdir()} >= {"config.json", "generation_config.json", "tokenizer.json"}
    assert not (folder / "adapter_config.json").exists()
    if (base / "model.safetensors.index.json").exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        tensors = Checkpoint(folder).tensors
        assert index["metadata"]["total_size"] == sum(2 * t.elements for t in tensors.values())
        assert index["weight_map"] == {n: t.file for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("settings", "quantized"), [({}, False), ({"use_dora": True}, False), ({}, True)], ids=["LoRA", "DoRA", "QLoRA"]
)
def test_what_a_merge_holds_is_two_shards_and_the_adapter_and_does_not_grow_with_the_model(
    tmp_path: Path, settings: dict[str, Any], quantized: bool
) -> None:
    def held(layers: int) -> int:
        base = build_tiny_model(tmp_path / f"base-{layers}", layers=layers, shards=layers)
        adapter = adapter_for(base, tmp_path / f"adapter-{layers}", **settings)
        round_trip = quantized_by_training(base, {})[1] if quantized else None
        with LiveStorages() as live:
            whole = BaseWeights(Checkpoint(base), round_trip)
            merge(whole, read_adapter(adapter), torch.bfloat16, tmp_path / f"merged-{layers}", lambda _: None)
        shard = max(path.stat().st_size for path in base.glob("*.safetensors"))
        assert live.peak_bytes <= 2 * shard + (adapter / "adapter_model.safetensors").stat().st_size
        return live.peak_bytes

    assert held(8) <= 1.1 * held(2)


def quantized_by_training(base: Path, quantization: dict[str, Any]) -> tuple[Any, RoundTrip]:
    """A QLoRA's base, and what the merge is told of it."""
    run = snapshot_of(
        deep_merge(job_spec(None, "bucket"), {"method": {"type": "QLoRA", "quantization": quantization}}), "u" * 32
    )
    loaded = model.load_base(base, run, device.Compute(torch.device("cpu"), torch.bfloat16, "cpu"))
    return loaded, RoundTrip(Quantization.model_validate(quantization), quantized_modules(loaded), torch.bfloat16)


def test_the_configuration_names_the_merged_type_and_no_quantization() -> None:
    config = {"torch_dtype": "float32", "quantization_config": {"a": 1}, "text_config": {"dtype": "float32", "x": 1}}
    assert merged_config(config, torch.bfloat16) == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "x": 1},
    }
    assert merged_config({}, torch.float16) == {"dtype": "float16"}


@pytest.mark.parametrize(("double", "kind"), [(True, "NF4"), (False, "NF4"), (True, "FP4"), (None, "Int8")])
def test_after_qlora_exactly_the_quantized_weights_make_the_round_trip(
    base: Path, tmp_path: Path, double: bool | None, kind: str
) -> None:
    quantization = {"type": kind, "doubleQuantization": double}
    loaded, round_trip = quantized_by_training(base, quantization)
    records = quantized_modules(loaded)
    assert len(records) == 14
    adapter = adapter_for(base, tmp_path / "adapter")
    ours = merged(BaseWeights(Checkpoint(base), round_trip), adapter, torch.float32, tmp_path / "merged")
    assert not round_trip.inexact
    # The reference: training's own quantized weights, dequantized, merged by peft.
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for record in records:
        module = loaded.get_submodule(record.name)
        if kind == "Int8":
            held = (module.weight.data * (module.weight.SCB / 127)[:, None]).bfloat16()
        else:
            held = dequantize_4bit(module.weight.data, module.weight.quant_state)
        plain.get_submodule(record.name).weight.data = held.float()
    theirs = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
    original = Checkpoint(base)
    assert torch.equal(ours["model.embed_tokens.weight"], original.read("model.embed_tokens.weight"))
    assert torch.equal(ours["model.norm.weight"], original.read("model.norm.weight"))


def test_another_weight_than_training_quantized_fails_and_a_rounding_difference_warns() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    record = describe("layer", packed, state)
    tie = packed.clone()
    tie.view(-1)[7] ^= 1  # one code, one step off: a tie broken the other way
    elsewhere = describe("layer", tie, state)
    assert elsewhere.sha256 != record.sha256
    assert elsewhere.offset is not None
    rounding = elsewhere.model_copy(update={"offset": elsewhere.offset * (1 + 1e-6)})
    round_trip = RoundTrip(Quantization(), [rounding], torch.bfloat16)
    round_trip("layer", weight)
    assert round_trip.inexact == {"layer"}
    with pytest.raises(StageError, match="quantizes to other values") as caught:
        RoundTrip(Quantization(), [record], torch.bfloat16)("layer", torch.randn(256, 512, dtype=torch.bfloat16))
    assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_the_same_of_8_bit_weights() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512, dtype=torch.bfloat16)
    codes, scales = int8.quantized(weight)
    record = describe_int8("layer", codes, scales)
    in_8_bit = Quantization.model_validate({"type": "Int8"})
    round_trip = RoundTrip(in_8_bit, [record], torch.bfloat16)
    assert torch.equal(round_trip("layer", weight), int8.dequantized(codes, scales, torch.bfloat16))
    assert not round_trip.inexact
    tie = codes.clone()
    tie[0, 0] += 1
    round_trip = RoundTrip(in_8_bit, [describe_int8("layer", tie, scales)], torch.bfloat16)
    round_trip("layer", weight)
    assert round_trip.inexact == {"layer"}
    for other in (torch.randn(256, 512, dtype=torch.bfloat16), weight * 1.01):
        with pytest.raises(StageError, match="quantizes to other values") as caught:
            RoundTrip(in_8_bit, [record], torch.bfloat16)("layer", other)
        assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_trained_biases_are_merged(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    base = tmp_path / "base"
    Qwen2ForCausalLM(config).save_pretrained(base)
    adapter = adapter_for(base, tmp_path / "adapter", bias="all")
    ours = merged(BaseWeights(Checkpoint(base), None), adapter, torch.float32, tmp_path / "merged")
    theirs = peft_merged(base, adapter)
    assert float(ours["model.layers.0.self_attn.q_proj.bias"].abs().max()) > 0.1
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_left_over_and_misfit_tensors_fail(base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n.replace("layers.1.", "layers.7."): t for n, t in tensors.items()}, path)
    with pytest.raises(StageError, match="fit nothing in the base") as caught:
        merged(BaseWeights(Checkpoint(base), None), adapter, torch.float32, tmp_path / "merged")
    assert caught.value.reason is Reason.VERIFICATION_FAILED
    save_file({n.replace(".layers.", ".blocks."): t for n, t in tensors.items()}, path)
    with pytest.raises(StageError, match="none of the adapter's modules") as caught:
        merged(BaseWeights(Checkpoint(base), None), adapter, torch.float32, tmp_path / "merged")
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL
    save_file({n: t for n, t in tensors.items() if "layers.1.mlp.up_proj.lora_B" not in n}, path)
    with pytest.raises(StageError, match="not whole"):
        read_adapter(adapter)


def test_a_skipped_shard_fails(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base", shards=3)
    adapter = adapter_for(base, tmp_path / "adapter")
    checkpoint = Checkpoint(base)
    skipped = checkpoint.files.pop()
    checkpoint.tensors = {n: t for n, t in checkpoint.tensors.items() if t.file != skipped}
    with pytest.raises(StageError, match="fit nothing in the base"):
        merged(BaseWeights(checkpoint, None), adapter, torch.float32, tmp_path / "merged")


def small_gain(base: Path, folder: Path) -> Path:
    """An adapter whose update is about a hundredth of the weights."""
    adapter_for(base, folder)
    path = folder / "adapter_model.safetensors"
    save_file({n: t * 0.1 if "lora_B" in n else t for n, t in load_file(path).items()}, path)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_was_merged_passes_as_written(base: Path, tmp_path: Path, dtype: torch.dtype, small_chunks: None) -> None:
    for number, make in enumerate((adapter_for, small_gain, partial(adapter_for, use_dora=True))):
        adapter = make(base, tmp_path / f"adapter-{number}")
        folder = tmp_path / f"merged-{number}"
        weights = BaseWeights(Checkpoint(base), None)
        merged(weights, adapter, dtype, folder)
        write_companions(base, sorted(p.name for p in base.iterdir()), adapter, dtype, folder)
        check_written(weights, read_adapter(adapter), folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lost", ["the adapter", "one module", "one row", "half the scaling", "another tensor changed"])
def test_a_merge_that_loses_even_a_little_of_a_small_adapter_fails(
    base: Path, tmp_path: Path, dtype: torch.dtype, lost: str
) -> None:
    adapter = small_gain(base, tmp_path / "adapter")
    weights = BaseWeights(Checkpoint(base), None)
    folder = tmp_path / "merged"
    merged(weights, adapter, dtype, folder)
    write_companions(base, sorted(p.name for p in base.iterdir()), adapter, dtype, folder)
    victim = "model.layers.1.mlp.up_proj.weight"
    for file in weights.checkpoint.files:
        tensors = load_file(folder / file)
        for name, value in tensors.items():
            original = weights.read(name)
            if lost == "the adapter" or (lost == "one module" and name == victim):
                tensors[name] = original.to(dtype)
            elif lost == "one row" and name == victim:
                value[3] = original[3].to(dtype)
            elif lost == "half the scaling" and name.endswith("_proj.weight"):
                tensors[name] = ((original.float() + value.float()) / 2).to(dtype)
            elif lost == "another tensor changed" and name == "model.norm.weight":
                value[0] *= 1.1
        save_file(tensors, folder / file)
    with pytest.raises(StageError, match=r"not base \+ adapter within rounding: model\.") as caught:
        check_written(weights, read_adapter(adapter), folder)
    assert caught.value.reason is Reason.VERIFICATION_FAILED
    if lost in ("the adapter", "one module"):
        assert " 0 % of its update arrived" in caught.value.message.replace("-0 %", "0 %")


def test_a_merge_without_doras_magnitudes_fails(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_for(base, tmp_path / "adapter", use_dora=True)
    weights = BaseWeights(Checkpoint(base), None)
    with monkeypatch.context() as forgetful:
        forgetful.setattr(Lora, "merged", Lora.sum_with)
        merged(weights, adapter, torch.bfloat16, tmp_path / "merged")
    write_companions(base, sorted(p.name for p in base.iterdir()), adapter, torch.bfloat16, tmp_path / "merged")
    with pytest.raises(StageError, match=r"not base \+ adapter within rounding"):
        check_written(weights, read_adapter(adapter), tmp_path / "merged")


def test_an_adapter_that_lost_a_magnitude_is_not_whole(base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(base, tmp_path / "adapter", use_dora=True)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if name.endswith("lora_magnitude_vector")))
    save_file(tensors, file)
    with pytest.raises(StageError, match=r"the adapter is not whole: 14 lora_A, 14 lora_B and 13 magnitude tensors"):
        read_adapter(adapter)


def test_a_merged_file_without_a_tensor_fails(base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(base, tmp_path / "adapter")
    weights = BaseWeights(Checkpoint(base), None)
    merged(weights, adapter, torch.bfloat16, tmp_path / "merged")
    write_companions(base, sorted(p.name for p in base.iterdir()), adapter, torch.bfloat16, tmp_path / "merged")
    file = tmp_path / "merged" / weights.checkpoint.files[0]
    tensors = load_file(file)
    gone = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != gone}, file)
    with pytest.raises(StageError, match=f"not the same tensors: {gone}"):
        check_written(weights, read_adapter(adapter), tmp_path / "merged")


@pytest.mark.parametrize(
    ("found", "expected", "passes"),
    [(0.0520, 0.0510, True), (0.0540, 0.0510, False), (2.01, 2.0, True), (2.02, 2.0, False)],
)
def test_low_losses_may_differ_by_what_a_device_rounds(found: float, expected: float, passes: bool) -> None:
    if passes:
        must_agree("training measured", found, expected, TRAINED_TOLERANCE, 8, TRAINED_ABSOLUTE)
        return
    with pytest.raises(StageError, match="allowed"):
        must_agree("training measured", found, expected, TRAINED_TOLERANCE, 8, TRAINED_ABSOLUTE)


@pytest.mark.parametrize(
    ("base_loss", "loss", "allowed"),
    [(4.2, 3.98, 0.22), (4.0, 1.0, 0.1), (1.0, 1.2, 0.0)],
    ids=["a short training", "a long one", "nothing learned"],
)
def test_rounding_may_take_what_was_learned_and_not_much(base_loss: float, loss: float, allowed: float) -> None:
    metrics = TrainMetrics(
        held_out_loss_base=base_loss, held_out_loss=loss, perplexity_base=1, perplexity=1, final_train_loss=1, steps=1,
        epochs=1, tokens=1, tokens_per_second=1, train_seconds=1,
    )  # fmt: skip
    assert may_be_rounded_away(metrics, loss) == pytest.approx(allowed)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2"])
def test_the_streamed_forward_is_the_models_own(tmp_path: Path, tiny_model: Path, family: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        family, vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=family in ("qwen2", "gemma2"),
    )  # fmt: skip
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in whole.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    base = tmp_path / "base"
    whole.save_pretrained(base, max_shard_size="20KB")
    adapter = adapter_for(base, tmp_path / "adapter")
    tokenizer = model.load_tokenizer(tiny_model, snapshot_of(job_spec(None, "bucket"), "u" * 32))
    rows = Rows(table([encode(tokenizer, q) for q in questions(5)]))
    checkpoint = Checkpoint(base)
    names, everything = set(checkpoint.tensors), list(range(len(rows)))

    plain = StreamedModel(base, names, checkpoint.read, torch.float32)
    assert plain.loss(rows, everything, 0) == pytest.approx(
        evaluate.held_out_loss(whole, rows, 0, CPU32).loss, rel=1e-5
    )
    assert all(p.is_meta for p in plain.model.parameters())

    tuned = PeftModel.from_pretrained(whole, adapter).get_base_model()
    streamed = StreamedModel(base, names, checkpoint.read, torch.float32, adapter=read_adapter(adapter))
    assert streamed.loss(rows, everything, 0) == pytest.approx(
        evaluate.held_out_loss(tuned, rows, 0, CPU32).loss, rel=1e-5
    )


def test_the_streamed_forward_refuses_weights_under_other_names(base: Path) -> None:
    with pytest.raises(StageError, match="are not in the model's files") as caught:
        StreamedModel(base, {"model.norm.weight", "model.embed_tokens.weight"}, lambda _: torch.zeros(1), torch.float32)
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL
