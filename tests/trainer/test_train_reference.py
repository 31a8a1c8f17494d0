"""Training against a loop that anybody could write by hand, of torch, transformers and peft alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune_api.results import IGNORED
from finetune_trainer.train.model import keep_training_layout
from finetune_trainer.train.rows import Rows
from finetune_trainer.train.schedule import make_schedule
from tests.trainer.test_train_trainer import fit, rows_of, snapshot, weights_of

STEPS, BATCH, RATE, CLIP, DECAY, SEED = 6, 7, 0.01, 0.5, 0.1, 42
METHOD = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "targetModules": ["q_proj", "v_proj", "up_proj"]}}


def reference(folder: Path, rows: Rows, quantized: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and the adapter: one row at a time, summed over the step's learned tokens, cosine decay without warm-up."""
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=four_bit if quantized else None
    )
    keep_training_layout(base)
    torch.manual_seed(SEED)
    lora = METHOD["lora"]
    model = get_peft_model(
        base,
        LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targetModules"], task_type="CAUSAL_LM"
        ),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    order = make_schedule(len(rows), snapshot_length(), BATCH, SEED)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        ids = order.step_rows(step)
        tokens = sum(rows.learned_tokens(i) for i in ids)
        total = 0.0
        optimizer.zero_grad()
        for index in ids:
            logits = model(torch.tensor([rows.ids(index)])).logits[0, :-1]
            loss = (
                cross_entropy(logits, torch.tensor(rows.labels(index)[1:]), ignore_index=IGNORED, reduction="sum")
                / tokens
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        losses.append(total)
    return losses, weights_of(model)


def training() -> dict[str, Any]:
    return {
        "length": {"steps": STEPS},
        "globalBatchSequences": BATCH,
        "microBatchSequences": 3,
        "seed": SEED,
        "computeDtype": "float32",
        "optimizer": {"name": "adamw_torch", "learningRate": RATE, "maxGradNorm": CLIP, "weightDecay": DECAY},
    }


def snapshot_length() -> Any:
    return snapshot(training=training()).spec.training.length


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_the_loss_curve_and_the_adapter_are_those_of_a_loop_written_by_hand(
    tiny_model: Path, tmp_path: Path, method: str
) -> None:
    rows = rows_of(tiny_model, 20)
    expected, weights = reference(tiny_model, rows, method == "QLoRA")
    ours, log = fit(tiny_model, tmp_path, snapshot(method={"type": method, **METHOD}, training=training()), rows=rows)
    assert [step["loss"] for step in log.steps] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
    for name, weight in weights_of(ours).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)
