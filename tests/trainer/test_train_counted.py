"""What is trained is what the prepare stage counted, and told the user, for each way to say what is trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.trained_tokens import trained_tokens
from finetune_trainer.train import full, model
from finetune_trainer.train.counted import must_be_as_counted
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.tokens import make_room
from tests.support.prepared import count, full_weights, headers_of, prepare_job
from tests.support.tiny_families import build_tiny_family
from tests.support.tiny_model import build_tiny_model
from tests.trainer.test_train_trainer import CPU16, CPU32, snapshot

DENSE = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "falcon", "gpt2", "gpt_neox"]
TOKENS: dict[str, Any] = {
    "model": {"newTokens": ["about", "waits"]},
    "method": {"lora": {"trainableTokens": ["<|im_end|>"]}},
}


def counts(folder: Path, **spec: Any) -> tuple[int, int]:
    """Weights that would be trained, and that prepare counts."""
    run = snapshot(**spec)
    base = model.load_base(folder, run, CPU16 if run.plan.method.quantization else CPU32)
    tokens = trained_tokens(AutoTokenizer.from_pretrained(folder), run.spec, headers_of(folder))
    make_room(base, tokens, Ranks())
    adapted = model.attach_adapter(base, run, token_ids=tokens.ids if tokens is not None else ())
    return model.assert_trainables_float32(adapted), count(run, folder, tokens).trainable


def must_be_exact(folder: Path, spec: dict[str, Any]) -> None:
    found, counted = counts(folder, **spec)
    must_be_as_counted(found, counted, folder, own_code=False)
    for other in (counted - 1, counted + 1):
        with pytest.raises(StageError, match=f"{found:,} weights would be trained, and the prepare stage counted") as e:
            must_be_as_counted(found, other, folder, own_code=False)
        assert e.value.reason is Reason.VERIFICATION_FAILED
    must_be_as_counted(found, counted + 1, folder, own_code=True)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"method": {"type": "QLoRA"}},
        {"method": {"type": "QLoRA", "quantization": {"type": "Int8"}}},
        {"method": {"lora": {"bias": "LoRAOnly", "useDora": True}}},
        {"method": {"lora": {"modulesToSave": ["norm", "embed_tokens"]}}},
        {"method": {"lora": {"initialization": "PiSSA", "rankPattern": {"q_proj": 2}}}},
        {"method": {"type": "QLoRA", "lora": {"initialization": "OLoRA"}}},
        {"method": {"lora": {"initialization": "EVA", "rank": 8}}},
        {"method": {"lora": {"targetModules": ["*.[qv]_proj", "up_proj"], "layersToTransform": [1]}}},
        {"method": {"lora": {"excludeModules": ["layers.0.*"], "rankPattern": {"layers.1.mlp.down_proj": 3}}}},
        TOKENS,
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_what_is_trained_is_what_prepare_counts(tmp_path: Path, spec: dict[str, Any], tied: bool) -> None:
    must_be_exact(build_tiny_model(tmp_path, tied=tied), spec)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("bias", ["All", "LoRAOnly"])
def test_it_is_in_all_dense_families(tmp_path: Path, family: str, bias: str) -> None:
    must_be_exact(build_tiny_family(tmp_path, family), {"method": {"lora": {"bias": bias}}})


@pytest.mark.parametrize(
    "lora",
    [
        {"useDora": True, "targetModules": ["h.0.attn.c_attn", "c_fc"], "rankPattern": {"h.1.mlp.c_fc": 2}},
        {"modulesToSave": ["ln_f"], "targetModules": ["*.c_proj"], "layersToTransform": [1]},
    ],
    ids=str,
)
def test_it_is_where_files_leave_the_models_name_out(tmp_path: Path, lora: dict[str, Any]) -> None:
    folder = build_tiny_family(tmp_path, "gpt2")
    file = folder / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    must_be_exact(folder, {"method": {"lora": lora}})


def test_masks_in_the_files_of_gpt_neox_are_no_biases(tmp_path: Path) -> None:
    """Old files have them; transformers makes them anew."""
    folder = build_tiny_family(tmp_path, "gpt_neox")
    stored = load_file(folder / "model.safetensors")
    masks = {f"gpt_neox.layers.{n}.attention.bias": torch.ones(1, 1, 64, 64).tril() for n in (0, 1)}
    save_file({**stored, **masks}, folder / "model.safetensors", metadata={"format": "pt"})
    must_be_exact(folder, {"method": {"lora": {"bias": "All"}}})


@pytest.mark.parametrize(
    "of",
    [{"modules": ["up_proj", "norm"]}, {"spectrum": {"fraction": 0.3}}, {}],
    ids=["modules", "Spectrum", "all"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_full_weights_are_as_counted(s3: Any, tmp_path: Path, of: dict[str, Any], tied: bool) -> None:
    folder = build_tiny_model(tmp_path / "base", tied=tied)
    job = prepare_job(s3, tmp_path, folder, method={"type": "Full", "full": of})
    weights = full_weights(job, folder)
    assert weights is not None
    base = full.train_weights(model.load_base(folder, job.snapshot, CPU32), weights, folder)
    assert model.assert_trainables_float32(base) == count(job.snapshot, folder).trainable


def more_in_the_files(folder: Path) -> None:
    """As after PPO: a head that transformers leaves out."""
    tensors = load_file(folder / "model.safetensors")
    tensors["v_head.summary.weight"] = torch.ones(1, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "another"}))


@pytest.mark.parametrize("change", [more_in_the_files, other_family])
def test_where_files_may_have_more_than_the_model_a_difference_is_logged_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    folder = build_tiny_model(tmp_path)
    found, counted = counts(folder)
    change(folder)
    with caplog.at_level(logging.WARNING):
        must_be_as_counted(found, counted, folder, own_code=False)
        assert not caplog.messages
        must_be_as_counted(found, counted + 260, folder, own_code=False)
    assert caplog.messages == [
        f"{found:,} weights are trained; by the shapes in the model's files it would be {counted + 260:,}"
    ]


def test_a_head_that_the_model_has_not_does_not_end_the_job(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path)
    more_in_the_files(folder)
    found, counted = counts(folder)
    assert counted > found
    must_be_as_counted(found, counted, folder, own_code=False)


def test_experts_are_not_counted_by_their_files(tmp_path: Path) -> None:
    folder = build_tiny_family(tmp_path, "mixtral")
    found, counted = counts(folder)
    must_be_as_counted(found, counted + 1, folder, own_code=False)
