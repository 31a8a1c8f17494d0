"""Adapters that begin at parts of the weights: the same training as with a changed base, published for the one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from finetune_trainer.prepare.initial_adapter import settings_of
from finetune_trainer.train import evaluate, model, verify
from finetune_trainer.train.offset_lora import OFFSET, lora_layers
from finetune_trainer.train.save import save_adapter
from finetune_trainer.train.schedule import make_schedule
from finetune_trainer.train.trainer import LoraTrainer, training_arguments
from tests.trainer.test_train_initialization import begun
from tests.trainer.test_train_trainer import CPU16, CPU32, rows_of, snapshot, weights_of

RANKS = {"rank": 4, "rankPattern": {"up_proj": 2, "down_proj": 6}, "alphaPattern": {"q_proj": 20}}
STEPS = {
    "length": {"steps": 4},
    "scheduler": "Constant",
    "warmup": {"steps": 0},
    "optimizer": {"learningRate": 5e-3},
}


def train(adapted: Any, folder: Path, tmp_path: Path, run: Any, compute: Any) -> list[float]:
    """The losses of a few steps."""
    rows, losses = rows_of(folder, 24), []
    schedule = make_schedule(len(rows), run.spec.training.length, 8, 0)
    trainer = LoraTrainer(
        model=adapted, args=training_arguments(run, compute, schedule.steps, tmp_path), rows=rows, schedule=schedule,
        micro_batch=4, pad_id=0, compute=compute, callbacks=[],
    )  # fmt: skip
    trainer.train()
    losses += [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses


def updates(adapted: Any) -> dict[str, torch.Tensor]:
    """By how much each layer's product changes the weight, with A0 and B0 taken into account."""
    found = {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            a, b = (getattr(module, f"lora_{n}")["default"].weight.detach() for n in "AB")
            a0, b0 = (getattr(module, f"{OFFSET}{n}")["default"].weight for n in "AB")
            found[name] = module.scaling["default"] * ((b0 + b) @ (a0 + a) - b0 @ a0)
    return found


@pytest.mark.parametrize("kind", ["PiSSA", "OLoRA"])
def test_the_steps_are_those_of_a_base_without_what_the_matrices_begin_with(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    """Reference: peft's own layers, A and B at A0 and B0, on a base that was changed to W - s·B0·A0."""
    run = snapshot(method={"lora": {**RANKS, "initialization": kind, "dropout": 0.0}}, training=STEPS)
    ours = begun(tiny_model, lora={**RANKS, "initialization": kind, "dropout": 0.0})
    plain = snapshot(method={"lora": {**RANKS, "dropout": 0.0}}, training=STEPS)
    theirs = model.attach_adapter(model.load_base(tiny_model, plain, CPU32), plain)
    first = {}
    for mine, other in zip(lora_layers(ours), lora_layers(theirs), strict=True):
        a0, b0 = (getattr(mine, f"{OFFSET}{n}")["default"].weight for n in "AB")
        assert a0.any()
        other.lora_A["default"].weight.data, other.lora_B["default"].weight.data = a0.clone(), b0.clone()
        other.get_base_layer().weight.data -= other.scaling["default"] * b0 @ a0
        first[other] = b0 @ a0
    losses = [train(m, tiny_model, tmp_path, run, CPU32) for m in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    moved = list(updates(ours).values())
    for (layer, start), update in zip(first.items(), moved, strict=True):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(update, layer.scaling["default"] * (b @ a - start), rtol=2e-2, atol=2e-4)


def test_olora_begins_as_pefts_does(tiny_model: Path) -> None:
    run = snapshot()
    theirs = get_peft_model(
        model.load_base(tiny_model, run, CPU32),
        LoraConfig(r=4, lora_alpha=8, init_lora_weights="olora", target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    ours = begun(tiny_model, lora={"rank": 4, "initialization": "OLoRA"})
    for mine, other in zip(lora_layers(ours), lora_layers(theirs), strict=True):
        for name in "AB":
            begin = getattr(mine, f"{OFFSET}{name}")["default"].weight
            torch.testing.assert_close(
                begin, getattr(other, f"lora_{name}")["default"].weight.data, rtol=1e-4, atol=1e-5
            )


def test_pissa_begins_with_the_largest_singular_values(tiny_model: Path) -> None:
    ours = begun(tiny_model, lora={"rank": 4, "initialization": "PiSSA"})
    for module in lora_layers(ours):
        a0, b0 = (getattr(module, f"{OFFSET}{n}")["default"].weight for n in "AB")
        weight = module.get_base_layer().weight.float()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        best = (left[:, :4] * values[:4]) @ right[:4]
        rest = torch.linalg.norm(weight - module.scaling["default"] * b0 @ a0)
        assert rest < 1.02 * torch.linalg.norm(weight - best)


def test_a_rank_that_a_matrix_does_not_have_is_filled_with_zeros(tiny_model: Path) -> None:
    """Such as that of a key projection with few heads."""
    for kind in ("PiSSA", "OLoRA"):
        ours = begun(tiny_model, lora={"rank": 100, "initialization": kind})
        shapes = {tuple(m.lora_offset_A["default"].weight.shape) for m in lora_layers(ours)}
        assert {rank for rank, _ in shapes} == {100}
        assert all(m.lora_offset_B["default"].weight[:, -1].count_nonzero() == 0 for m in lora_layers(ours))


@pytest.mark.parametrize(
    ("method", "kind"),
    [({"type": "LoRA"}, "PiSSA"), ({"type": "QLoRA"}, "PiSSA"), ({"type": "QLoRA"}, "OLoRA"),
     ({"type": "QLoRA", "quantization": {"type": "Int8"}}, "PiSSA")],
)  # fmt: skip
def test_the_first_loss_is_the_bases_to_the_bit(tiny_model: Path, method: dict[str, Any], kind: str) -> None:
    run = snapshot(method=method)
    rows = rows_of(tiny_model, 8)
    base = evaluate.held_out_loss(model.load_base(tiny_model, run, CPU16), rows, 0, CPU16)
    adapted = begun(tiny_model, CPU16, **method, lora={"rank": 8, "initialization": kind})
    assert evaluate.held_out_loss(adapted.get_base_model(), rows, 0, CPU16).loss == base.loss


@pytest.mark.parametrize(
    ("method", "lora", "exact"),
    [("LoRA", RANKS, True), ("QLoRA", RANKS, True), ("LoRA", {**RANKS, "useRslora": True}, False),
     ("LoRA", {"rank": 4, "modulesToSave": ["norm"]}, True)],
    ids=["patterns", "QLoRA", "rsLoRA", "modulesToSave"],
)  # fmt: skip
def test_what_is_published_is_a_plain_adapter_for_the_base_as_it_is(
    tiny_model: Path, tmp_path: Path, method: str, lora: dict[str, Any], exact: bool
) -> None:
    settings = {"type": method, "lora": {**lora, "initialization": "PiSSA"}}
    run = snapshot(method=settings, training=STEPS)
    adapted = begun(tiny_model, CPU16, **settings)
    train(adapted, tiny_model, tmp_path / "run", run, CPU16)
    rows = rows_of(tiny_model, 12)
    trained = evaluate.held_out_loss(adapted.get_base_model(), rows, 0, CPU16).loss
    folder = tmp_path / "adapter"
    save_adapter(adapted, model.load_tokenizer(tiny_model, run), folder)
    again = verify.load_freshly(model.load_base(tiny_model, run, CPU16), folder)
    assert not [name for name, _ in again.named_modules() if OFFSET in name]
    loss = evaluate.held_out_loss(again.get_base_model(), rows, 0, CPU16).loss
    assert loss == (trained if exact else pytest.approx(trained, rel=1e-3))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {
        n: tensors[f"base_model.model.model.layers.0.{n}.lora_A.weight"].shape[0]
        for n in ("mlp.up_proj", "self_attn.q_proj")
    }
    assert found == {"mlp.up_proj": 4 if "rankPattern" in lora else 8, "self_attn.q_proj": 8}
    if "modulesToSave" not in lora:
        modules = [n.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for n in tensors if "lora_A" in n]
        assert settings_of(config, run.spec.method.lora.__class__(), "s3://bucket/adapter", modules).rank == 8


def test_checkpoints_hold_what_the_matrices_began_with(tiny_model: Path) -> None:
    adapted = begun(tiny_model, lora={"rank": 4, "initialization": "PiSSA"})
    from peft import get_peft_model_state_dict

    stored = {n: t.clone() for n, t in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
    run = snapshot(method={"lora": {"rank": 4, "initialization": "PiSSA"}})
    fresh = model.attach_adapter(model.load_base(tiny_model, run, CPU32), run)
    model.take_up(fresh, stored)
    pairs = list(zip(lora_layers(adapted), lora_layers(fresh), strict=True))
    assert len(pairs) == 14
    for one, other in pairs:
        for name in "AB":
            mine, theirs = (getattr(m, f"{OFFSET}{name}")["default"].weight for m in (one, other))
            assert mine.any()
            assert torch.equal(mine, theirs)
    assert not any(OFFSET in name for name in weights_of(fresh)), "and it is not trained"


def test_dropout_leaves_the_weights_alone(tiny_model: Path) -> None:
    """It thins out the update's input, not what the matrices began with: the first training loss is the base's, too."""
    adapted = begun(tiny_model, lora={"rank": 8, "initialization": "PiSSA", "dropout": 0.5}).train()
    base = model.load_base(tiny_model, snapshot(), CPU32)
    ids = torch.tensor([rows_of(tiny_model, 2).ids(0)])
    assert isinstance(adapted, PeftModel)
    assert torch.equal(adapted(ids).logits, base(ids).logits)
