"""What peft and transformers do without a word fails: weights that do not fit, types that lose updates, layers that are left."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune_api.failures import Reason
from finetune_api.results import TrainedWeights
from finetune_trainer.errors import StageError
from finetune_trainer.train import full, model, verify
from finetune_trainer.train.quantized import quantized_modules
from finetune_trainer.train.schedule import make_schedule
from finetune_trainer.train.trainer import LoraTrainer, training_arguments
from tests.support.tiny_model import build_tiny_model
from tests.trainer.test_train_trainer import CPU16, CPU32, rows_of, snapshot

UP = "model.layers.0.mlp.up_proj.weight"


def adapted(folder: Path, **lora: Any) -> PeftModel:
    run = snapshot(method={"lora": lora})
    return model.attach_adapter(model.load_base(folder, run, CPU32), run)


def test_one_trainable_weight_in_16_bit_is_noticed(tiny_model: Path) -> None:
    tuned = adapted(tiny_model)
    assert model.assert_trainables_float32(tuned) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    layer = tuned.get_base_model().model.layers[1].mlp.up_proj
    layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.bfloat16()
    with pytest.raises(AssertionError, match=r"not float32: .*layers\.1\.mlp\.up_proj\.lora_B"):
        model.assert_trainables_float32(tuned)


def test_a_model_without_trainable_weights_is_noticed(tiny_model: Path) -> None:
    with pytest.raises(AssertionError, match="nothing is trainable"):
        model.assert_trainables_float32(adapted(tiny_model).requires_grad_(False))


@pytest.mark.parametrize("method", ["LoRA", "Full"])
@pytest.mark.parametrize("change", ["one less", "one more"])
def test_a_file_with_other_tensors_is_not_taken_up(tiny_model: Path, method: str, change: str) -> None:
    """Neither by a fresh adapter from an initial one, nor from a checkpoint: peft leaves as drawn what the file lacks."""
    if method == "Full":
        base = model.load_base(tiny_model, snapshot(), CPU32)
        tuned = full.train_weights(base, TrainedWeights(tensors=[UP, UP.replace("up_", "down_")]), tiny_model)
        said = "other tensors"
    else:
        tuned = adapted(tiny_model)
        said = "lacks tensors of the adapter" if change == "one less" else "tensors that the model lacks"
    values = {name: torch.ones_like(value) for name, value in model.trained_state(tuned).items()}
    if change == "one less":
        wrong = dict(list(values.items())[1:])
    else:
        wrong = {**values, max(values).replace("layers.1", "layers.7").replace("layers.0", "layers.7"): torch.ones(1)}
    with pytest.raises(AssertionError, match=said):
        model.take_up(tuned, wrong)
    model.take_up(tuned, values)
    assert all((value == 1).all() for value in model.trained_state(tuned).values())


def test_an_initial_adapter_of_other_layers_is_not_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    adapted(tiny_model, targetModules=["q_proj"]).save_pretrained(tmp_path)
    run = snapshot(method={"lora": {"targetModules": ["v_proj"]}})
    with pytest.raises(AssertionError, match="lacks tensors of the adapter"):
        model.attach_adapter(model.load_base(tiny_model, run, CPU32), run, tmp_path / "adapter_model.safetensors")


def test_a_head_that_is_the_embedding_gets_no_adapter(tmp_path: Path) -> None:
    run = snapshot(method={"lora": {"targetModules": ["q_proj"]}})
    lora = run.plan.method.lora.model_copy(update={"target_modules": ["lm_head"]})
    for tied in (True, False):
        base = model.load_base(build_tiny_model(tmp_path / str(tied), tied=tied), run, CPU32)
        if not tied:
            model.refuse_tied_head(base, lora)
            continue
        with pytest.raises(StageError, match="lm_head, which this model shares with its input embeddings") as caught:
            model.refuse_tied_head(base, lora)
        assert caught.value.reason is Reason.INVALID_CONFIG


def test_an_adapter_that_peft_did_not_take_off_is_noticed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = adapted(tiny_model, modulesToSave=["norm"])
    monkeypatch.setattr(PeftModel, "unload", lambda self: self.get_base_model(), raising=False)
    with pytest.raises(AssertionError, match=r"adapter layers that were not removed: .*lora_"):
        model.detach_adapter(tuned, {}, torch.float32)


def test_no_second_adapter_lies_on_a_base_that_had_one(tiny_model: Path) -> None:
    """peft has only a warning for it, and both would count."""
    bare = model.detach_adapter(adapted(tiny_model), {}, torch.float32)
    assert not {"peft_config", "_hf_peft_config_loaded"} & bare.__dict__.keys()
    assert not any(p.requires_grad for p in bare.parameters())


def test_a_4_bit_weight_that_was_repacked_for_inference_is_noticed(tiny_model: Path) -> None:
    base = model.load_base(tiny_model, snapshot(method={"type": "QLoRA"}), CPU16)
    assert len(quantized_modules(base)) == 14
    base.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(AssertionError, match=r"layers\.0\.mlp\.up_proj was repacked for inference"):
        quantized_modules(base)


def test_a_stored_weight_of_another_shape_is_not_trained(tiny_model: Path) -> None:
    base = model.load_base(tiny_model, snapshot(), CPU32)
    base.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(AssertionError, match=r"up_proj\.weight is \[128, 64\] in its file, \[4, 4\] loaded"):
        full.train_weights(base, TrainedWeights(tensors=[UP]), tiny_model)


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
@pytest.mark.parametrize(
    "lacking", [[UP], [UP.replace("up_", f"{kind}_") for kind in ("up", "gate", "down")] + ["model.norm.weight"]]
)
def test_weights_that_the_files_lack_are_not_drawn(
    tiny_model: Path, tmp_path: Path, method: str, lacking: list[str]
) -> None:
    """transformers would draw them, with a warning."""
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    weights = load_file(tiny_model / "model.safetensors")
    save_file({n: t for n, t in weights.items() if n not in lacking}, tmp_path / "model.safetensors", {"format": "pt"})
    said = f"have no {', '.join(sorted(lacking)[:3])}"
    with pytest.raises(StageError, match=re.escape(said)) as caught:
        model.load_base(tmp_path, snapshot(method={"type": method}), CPU16)
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL
    assert ("and 1 more weights" in caught.value.message) == (len(lacking) > 3)


def test_an_adapter_file_without_tensors_is_not_whole(tiny_model: Path, tmp_path: Path) -> None:
    """Activation checkpointing by accelerate has peft write one, without an error."""
    adapted(tiny_model).save_pretrained(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(StageError, match="has 0 tensors; its configuration needs 28") as caught:
        verify.load_freshly(model.load_base(tiny_model, snapshot(), CPU32), tmp_path)
    assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_products_with_a_4_bit_base_are_in_the_computing_type(tiny_model: Path) -> None:
    """bitsandbytes' own default is float32."""
    base = model.load_base(tiny_model, snapshot(method={"type": "QLoRA"}), CPU16)
    layers = [module for module in base.modules() if isinstance(module, Linear4bit)]
    assert [layer.compute_dtype for layer in layers] == [torch.bfloat16] * 14


def test_several_gpus_that_a_process_sees_are_not_shared_out_by_transformers(tiny_model: Path, tmp_path: Path) -> None:
    """It would split each batch over them (nn.DataParallel)."""
    run, rows = snapshot(), rows_of(tiny_model, 8)
    schedule = make_schedule(len(rows), run.spec.training.length, 8, 0)
    arguments = training_arguments(run, CPU32, schedule.steps, tmp_path)
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2
    trainer = LoraTrainer(
        model=adapted(tiny_model), args=arguments, rows=rows, schedule=schedule, micro_batch=4, pad_id=0, compute=CPU32, callbacks=[]
    )  # fmt: skip
    assert trainer.args.n_gpu == 1
