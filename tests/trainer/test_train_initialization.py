"""What an adapter begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file

from finetune_trainer.train import model
from finetune_trainer.train.initialization import factors, initialize
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.schedule import make_schedule
from tests.trainer.test_train_trainer import CPU16, CPU32, rows_of, snapshot, weights_of


def begun(folder: Path, compute: Any = CPU32, **method: Any) -> Any:
    """An adapter before its first step."""
    run = snapshot(method=method)
    rows, training = rows_of(folder, 24), run.spec.training
    adapted = model.attach_adapter(model.load_base(folder, run, compute), run)
    schedule = make_schedule(len(rows), training.length, training.global_batch_sequences, training.seed)
    initialize(adapted, run, folder, rows, schedule, run.split, 0, compute, Ranks())
    assert {p.dtype for p in weights_of(adapted).values()} == {torch.float32}
    return adapted


@pytest.mark.parametrize("rank", [1, 4])
def test_factors_are_the_best_approximation_of_their_rank(rank: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(40, 60)
    a, b = factors(matrix, rank)
    assert (a.shape, b.shape) == ((rank, 60), (40, rank))
    left, values, right = torch.linalg.svd(matrix)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert torch.linalg.norm(matrix - b @ a) < 1.02 * torch.linalg.norm(matrix - best)


def test_loftq_makes_good_for_what_4_bits_leave(tiny_model: Path) -> None:
    stored = load_file(tiny_model / "model.safetensors")
    adapted = begun(tiny_model, CPU16, type="QLoRA", lora={"initialization": "LoftQ", "rank": 8})
    seen = 0
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            weight = module.get_base_layer().weight
            held = dequantize_4bit(weight.data, weight.quant_state).float()
            update = module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
            before = stored[f"{name}.weight"].float() - held
            assert torch.linalg.norm(before - update) < 0.9 * torch.linalg.norm(before), name
            seen += 1
    assert seen == 14


def test_eva_looks_where_inputs_vary(tiny_model: Path) -> None:
    """Its directions explain more of a layer's inputs than those that are drawn do; the update is nothing at first, and ranks stay."""
    random, chosen = (begun(tiny_model, lora={"initialization": kind, "rank": 4}) for kind in ("Default", "EVA"))
    rows = rows_of(tiny_model, 24)
    name = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    hook = (
        random.get_base_model()
        .get_submodule(name)
        .register_forward_hook(lambda _m, i, _o: seen.append(i[0][0].detach()))
    )
    with torch.no_grad():
        for index in range(len(rows)):
            random.get_base_model()(torch.tensor([rows.ids(index)]))
    hook.remove()
    inputs = torch.cat(seen)

    def explained(adapted: Any) -> float:
        a = adapted.get_base_model().get_submodule(name).lora_A["default"].weight.detach()
        basis = torch.linalg.qr(a.T).Q
        return float(((inputs @ basis) ** 2).sum() / (inputs**2).sum())

    assert explained(chosen) > 1.5 * explained(random)
    for module in chosen.modules():
        if hasattr(module, "lora_A"):
            assert module.lora_A["default"].weight.shape[0] == 4
            assert not module.lora_B["default"].weight.any()


@pytest.mark.parametrize("kind", ["Gaussian", "Orthogonal"])
def test_peft_draws_the_others(tiny_model: Path, kind: str) -> None:
    default, other = (begun(tiny_model, lora={"initialization": k, "rank": 4}) for k in ("Default", kind))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert not torch.equal(weights_of(default)[name], weights_of(other)[name])
