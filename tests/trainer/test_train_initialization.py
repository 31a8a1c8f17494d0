"""What an adapter begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from finetune_api.targets import setting_of
from finetune_trainer.train import model
from finetune_trainer.train.initialization import factors, initialize
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.rows import Rows
from finetune_trainer.train.schedule import make_schedule
from tests.support.prepared import table
from tests.support.tiny_families import build_tiny_family
from tests.trainer.test_train_trainer import CPU16, CPU32, rows_of, snapshot, weights_of


def begun(folder: Path, compute: Any = CPU32, rows: Rows | None = None, training: Any = None, **method: Any) -> Any:
    """An adapter before its first step."""
    run = snapshot(method=method, training=training or {})
    rows, training = rows or rows_of(folder, 24), run.spec.training
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


def test_loftq_knows_names_and_shapes_of_gpt2s_files(tmp_path: Path) -> None:
    """There the model's own name is left out, and matrices lie the other way round."""
    base = build_tiny_family(tmp_path / "base", "gpt2")
    file = base / "model.safetensors"
    stored = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    adapted = begun(base, CPU16, rows_of(base, 4), type="QLoRA", lora={"initialization": "LoftQ", "rank": 8})
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            weight = module.get_base_layer().weight
            held = dequantize_4bit(weight.data, weight.quant_state).float()
            update = module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
            before = stored[f"{name.removeprefix('transformer.')}.weight"].float().T - held
            assert torch.linalg.norm(before - update) < 0.9 * torch.linalg.norm(before), name


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


def short_rows(folder: Path, count: int) -> Rows:
    """Rows of few tokens, of which one to three are learned."""
    return Rows(
        table([([5 + i, 6, 7 + i % 3, 8], [-100, 6, -100 if i % 2 else 7, -100 if i % 3 else 8]) for i in range(count)])
    )


def directions_of(adapted: Any) -> dict[str, torch.Tensor]:
    return {
        n: m.lora_A["default"].weight.detach()
        for n, m in adapted.get_base_model().named_modules()
        if isinstance(m, LoraLayer)
    }


@pytest.mark.parametrize(("rows", "rank"), [(24, 16), (4, 48)], ids=["a batch is less than the rank", "all rows are"])
def test_eva_ends_where_rows_are_short(tiny_model: Path, rows: int, rank: int) -> None:
    """Tokens of several batches make up for short ones; what the data has too few tokens for stays as it was drawn."""
    given = short_rows(tiny_model, rows)
    lora = {"initialization": "EVA", "rank": rank}
    training = {"microBatchSequences": 1, "length": {"epochs": 1}}
    chosen = directions_of(begun(tiny_model, rows=given, lora=lora, training=training))
    drawn = directions_of(begun(tiny_model, rows=given, lora={**lora, "initialization": "Default"}, training=training))
    learned = sum(label != -100 for i in range(rows) for label in given.labels(i))
    few = min(learned, rank)
    assert (few < rank) == (rows == 4)
    for name, weight in chosen.items():
        torch.testing.assert_close(weight[:few] @ weight[:few].T, torch.eye(few), rtol=0, atol=1e-3)
        assert torch.isfinite(weight).all()
        assert weight[few:].shape == drawn[name][few:].shape
        if few < rank:
            assert weight[few:].any(dim=1).all()


def test_every_layer_keeps_its_rank_with_eva(tiny_model: Path) -> None:
    """Layers with one input share the directions, not the ranks; the adapter's settings are those that a resumed run builds."""
    ranks = {"q_proj": 2, "v_proj": 12, "layers.1.mlp.gate_proj": 6}
    adapted = begun(tiny_model, lora={"initialization": "EVA", "rank": 4, "rankPattern": ranks})
    found = directions_of(adapted)
    for name, weight in found.items():
        assert len(weight) == setting_of(name, ranks, 4), name
    attention = "model.layers.1.self_attn"
    torch.testing.assert_close(found[f"{attention}.q_proj"], found[f"{attention}.v_proj"][:2])
    torch.testing.assert_close(found[f"{attention}.k_proj"], found[f"{attention}.v_proj"][:4])
    plain = begun(tiny_model, lora={"rank": 4, "rankPattern": ranks})
    assert adapted.peft_config["default"].rank_pattern == plain.peft_config["default"].rank_pattern


def test_eva_is_the_principal_components_of_the_learned_inputs(tiny_model: Path) -> None:
    rows = rows_of(tiny_model, 4)
    adapted = begun(tiny_model, rows=rows, lora={"initialization": "EVA", "rank": 3})
    name = "model.layers.0.self_attn.o_proj"
    seen: list[torch.Tensor] = []
    module = adapted.get_base_model().get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _m, i: seen.append(i[0][0].detach()))
    with torch.no_grad(), adapted.disable_adapter():
        for index in range(len(rows)):
            adapted.get_base_model()(torch.tensor([rows.ids(index)]))
    hook.remove()
    learned = torch.cat([torch.tensor(rows.labels(index)) for index in range(len(rows))]) != -100
    inputs = torch.cat(seen)[learned]
    _, values, axes = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
    alike = (directions_of(adapted)[name] * axes[:3]).sum(dim=1).abs()
    assert alike.min() > 0.95, (alike, values[:4])


@pytest.mark.parametrize("kind", ["Gaussian", "Orthogonal"])
def test_peft_draws_the_others(tiny_model: Path, kind: str) -> None:
    default, other = (begun(tiny_model, lora={"initialization": k, "rank": 4}) for k in ("Default", kind))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert not torch.equal(weights_of(default)[name], weights_of(other)[name])
