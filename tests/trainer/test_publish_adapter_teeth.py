"""What publish reads of an adapter and of training's records has teeth: anything that would be merged otherwise than it was trained fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file

from finetune_api.failures import Reason
from finetune_api.results import WEIGHTS_FILE, TrainedWeights
from finetune_api.spec import Quantization
from finetune_trainer.errors import StageError
from finetune_trainer.lora_files import UNKNOWN_SETTINGS
from finetune_trainer.publish.adapter import Adapter, read_adapter, read_weights
from finetune_trainer.publish.merge import BaseWeights
from finetune_trainer.publish.round_trip import RoundTrip
from finetune_trainer.publish.safetensors_stream import Checkpoint, StreamWriter, TensorInfo
from finetune_trainer.publish.streamed import streamed_modules
from finetune_trainer.publish.tokens import grown
from finetune_trainer.train.quantized import describe
from tests.support.tiny_model import build_tiny_model
from tests.trainer.test_publish_merge import adapter_for, merged

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UP = "base_model.model.model.layers.1.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapter_for(base, tmp_path / "adapter")


def configure(adapter: Path, **settings: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **settings}))


def fails(adapter: Path, said: str) -> None:
    with pytest.raises(StageError, match=said) as caught:
        read_adapter(adapter)
    assert caught.value.reason is Reason.VERIFICATION_FAILED


@pytest.mark.parametrize("setting", UNKNOWN_SETTINGS)
def test_a_setting_that_changes_what_tensors_mean_is_not_merged(adapter: Path, setting: str) -> None:
    read_adapter(adapter)
    configure(adapter, **{setting: {"some": 1}})
    fails(adapter, f"configuration sets {setting}, which cannot be merged")


def test_another_kind_of_adapter_is_not_merged(adapter: Path) -> None:
    configure(adapter, peft_type="LOHA")
    fails(adapter, "peft_type is 'LOHA', not LORA")


@pytest.mark.parametrize(
    "settings",
    [{"r": 8}, {"rank_pattern": {"up_proj": 2}}, {"use_dora": True}],
    ids=["rank", "rank of a module", "DoRA"],
)
def test_other_settings_than_the_tensors_have_fail(adapter: Path, settings: dict[str, Any]) -> None:
    """An update's scaling is alpha / rank."""
    configure(adapter, **settings)
    fails(adapter, "the adapter is not whole: 14 lora_A, 14 lora_B and 0 magnitude tensors, ranks")


def without(half: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != f"{UP}.{half}.weight"}


def nothing_left(tensors: Tensors) -> Tensors:
    return {n: t for n, t in tensors.items() if "lora_" not in n} | {
        "base_model.model.model.norm.weight": torch.ones(64)
    }


def a_magnitude_more(tensors: Tensors) -> Tensors:
    return {**tensors, f"{UP}.lora_magnitude_vector": torch.ones(128)}


@pytest.mark.parametrize(
    "change",
    [without("lora_A"), without("lora_B"), nothing_left, a_magnitude_more],
    ids=["no A", "no B", "nothing", "a magnitude"],
)
def test_an_adapter_with_other_tensors_than_configured_is_not_whole(
    adapter: Path, change: Callable[[Tensors], Tensors]
) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    fails(adapter, "the adapter is not whole")


@pytest.mark.parametrize(
    ("half", "keep"),
    [("lora_B", lambda t: t[:-1]), ("lora_A", lambda t: t[:, :-1]), ("lora_B", lambda t: torch.cat([t, t]))],
    ids=["outputs", "inputs", "more outputs"],
)
def test_an_update_of_another_shape_is_not_merged(
    base: Path, adapter: Path, tmp_path: Path, half: str, keep: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Twice the rows would be merged by their first half."""
    tensors = load_file(adapter / WEIGHTS)
    name = f"{UP}.{half}.weight"
    save_file({**tensors, name: keep(tensors[name]).contiguous()}, adapter / WEIGHTS)
    said = r"layers\.1\.mlp\.up_proj\.weight is \[128, 64\] in the base; the adapter's update is"
    with pytest.raises(StageError, match=said) as caught:
        merged(BaseWeights(Checkpoint(base), None), adapter, torch.bfloat16, tmp_path / "merged")
    assert caught.value.reason is Reason.VERIFICATION_FAILED


@pytest.mark.parametrize("ids", [[5, 3], [3, 3], [3]], ids=["no order", "twice", "one row for two"])
def test_rows_that_are_configured_otherwise_fail(adapter: Path, ids: list[int]) -> None:
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 64)}
    save_file({**load_file(adapter / WEIGHTS), **rows}, adapter / WEIGHTS)
    configure(adapter, trainable_token_indices={"model.embed_tokens": [3, 5]})
    assert read_adapter(adapter).tokens == {"model.embed_tokens.weight": (3, 5)}
    configure(adapter, trainable_token_indices={"model.embed_tokens": ids})
    fails(adapter, "the adapter is not whole: it has trained rows of")


@pytest.mark.parametrize(("ids", "rows"), [([3], 10), ([3, 10, 11], 12), ([11], None), ([10, 12], None)])
def test_new_rows_follow_those_that_are_there(ids: list[int], rows: int | None) -> None:
    info = TensorInfo("model.embed_tokens.weight", "model.safetensors", "F32", (10, 4))
    if rows is not None:
        assert grown(info, ids).shape == (rows, 4)
        return
    with pytest.raises(StageError, match=f"has 10 rows in the base; the adapter's new ones, from {ids[0]}") as caught:
        grown(info, ids)
    assert caught.value.reason is Reason.VERIFICATION_FAILED


@pytest.mark.parametrize("has", [["a"], ["a", "b", "c"], ["a", "c"]])
def test_other_full_weights_than_were_trained_are_not_merged(tmp_path: Path, has: list[str]) -> None:
    weights = TrainedWeights(tensors=["a", "b"])
    file = tmp_path / WEIGHTS_FILE
    save_file({name: torch.ones(2) for name in weights.tensors}, file)
    assert read_weights(tmp_path, weights, ["a", "b"], tied=False).replaced == {"a", "b"}
    save_file({name: torch.ones(2) for name in has}, file)
    with pytest.raises(StageError, match=f"has {len(has)} tensors; 2 were trained") as caught:
        read_weights(tmp_path, weights, ["a", "b"], tied=False)
    assert caught.value.reason is Reason.VERIFICATION_FAILED


@pytest.mark.parametrize("doubled", [True, False])
def test_constants_and_codes_must_both_be_trainings(doubled: bool) -> None:
    """A weight times 1.01 has the same codes, and one of the other sign the same constants."""
    torch.manual_seed(0)
    weight = torch.randn(256, 512, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, compress_statistics=doubled, quant_type="nf4")
    record = describe("layer", packed, state)
    quantization = Quantization(double_quantization=doubled)
    same = RoundTrip(quantization, [record], torch.bfloat16)
    same("layer", weight)
    assert not same.inexact
    for other, said in ((weight * 1.01, r"(9[5-9]|100) % of the sampled codes agree"), (-weight, r"\b\d % of")):
        with pytest.raises(StageError, match=f"quantizes to other values than in training: {said}") as caught:
            RoundTrip(quantization, [record], torch.bfloat16)("layer", other)
        assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_a_file_that_is_written_with_less_than_announced_is_noticed(tmp_path: Path) -> None:
    info = TensorInfo("a", "f.safetensors", "F32", (4, 2))
    with StreamWriter(tmp_path / "f.safetensors", [info]) as writer:
        writer.write(torch.zeros(3, 2))
        with pytest.raises(AssertionError, match="bytes written"):
            writer.record("f.safetensors")
        writer.write(torch.zeros(1, 2))
        record = writer.record("f.safetensors")
    assert record.size == (tmp_path / "f.safetensors").stat().st_size


def test_a_model_without_a_list_of_its_layers_is_not_streamed(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    assert len(streamed_modules(model)) == 2 + 3
    model.config.num_hidden_layers = 3
    with pytest.raises(StageError, match="LlamaForCausalLM has no list of 3 layers") as caught:
        streamed_modules(model)
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL


def test_a_head_is_the_same_as_the_embedding_only_if_all_of_it_is(tmp_path: Path) -> None:
    """peft writes a head that is tied to trained embeddings once more, which then fits nothing in the base, and need not."""
    keys = {"model.embed_tokens.weight": "e", "lm_head.weight": "h"}
    rows = torch.ones(4, 2)
    for other, same in ((rows.clone(), True), (rows * 2, False), (rows[:3].clone(), False)):
        save_file({"e": rows, "h": other}, tmp_path / WEIGHTS)
        read = Adapter(tmp_path, {}, frozenset(keys), keys)
        assert read.repeats("lm_head.weight", ["model.embed_tokens.weight"]) is same
