"""What method Full trains: Spectrum's ratios and choice, names, and what prepare refuses."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finetune_api.failures import Reason
from finetune_api.full_weights import chosen_count, most_signal, named_tensors, ranked_matrices
from finetune_api.planner import describe, parse_config
from finetune_api.results import PREPARE_RESULT, PrepareResult
from finetune_api.spec import Full
from finetune_trainer.errors import StageError
from finetune_trainer.prepare import full_weights, singular
from finetune_trainer.prepare.full_weights import count_full, refuse_others
from finetune_trainer.prepare.trained_tokens import is_tied
from finetune_trainer.publish.safetensors_stream import Checkpoint
from tests.support.prepare_bench import ROWS, Bench
from tests.support.tiny_model import build_tiny_model


def by_spectrums_own_formula(weights: torch.Tensor) -> float:
    """As its authors' code computes it: singular value decomposition, σ from the interquartile range, threshold σ √(1 + √β)²."""
    values = torch.linalg.svdvals(weights.double())
    iqr = torch.quantile(values, 0.75) - torch.quantile(values, 0.25)
    beta = min(weights.shape) / max(weights.shape)
    threshold = float(iqr) / 1.349 * np.sqrt((1 + np.sqrt(beta)) ** 2)
    return float(values[values > threshold].sum() / values[values <= threshold].sum() / values[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96)], ids=["tall", "wide"])
def test_ratios_are_those_of_a_whole_decomposition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(singular, "ROWS", 7)
    torch.manual_seed(0)
    noise = torch.randn(shape) / 10
    plain, spiked = noise.to(dtype), (noise + 2 * torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))).to(dtype)
    save_file({"a": plain, "b": spiked}, tmp_path / "model.safetensors")
    found = singular.ratios(tmp_path, ["a", "b"])
    assert found["a"] == pytest.approx(by_spectrums_own_formula(plain), rel=1e-6)
    assert found["b"] == pytest.approx(by_spectrums_own_formula(spiked), rel=1e-6)


def test_matrices_of_nothing_rank_last(tmp_path: Path) -> None:
    save_file({"zero": torch.zeros(8, 4)}, tmp_path / "model.safetensors")
    assert singular.ratios(tmp_path, ["zero"]) == {"zero": 0.0}


def test_whole_numbers_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(StageError, match="stored as I8"):
        singular.ratios(tmp_path, ["a"])


def layers(count: int) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (100, 8),
        **{f"model.layers.{i}.self_attn.q_proj.weight": (8, 8) for i in range(count)},
        **{f"model.layers.{i}.mlp.up_proj.weight": (16, 8) for i in range(count)},
        **{f"model.layers.{i}.norm.weight": (8,) for i in range(count)},
        "lm_head.weight": (100, 8),
    }


def test_of_each_kind_those_with_the_most_signal_are_chosen() -> None:
    shapes = layers(4)
    ratios = {
        n: float("q_proj" in n) * 100 + int(n.split(".")[2]) for ns in ranked_matrices(shapes).values() for n in ns
    }
    chosen = most_signal(shapes, 0.5, ratios)
    # Not the four q_proj, whose ratios are all larger.
    assert chosen == [f"model.layers.{i}.{m}.weight" for m in ("self_attn.q_proj", "mlp.up_proj") for i in (2, 3)]
    assert most_signal(shapes, 0.25, dict.fromkeys(ratios, 1.0))[0] == "model.layers.0.self_attn.q_proj.weight", (
        "of equals the first"
    )


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(32, 0.25, 8), (30, 0.25, 7), (2, 0.1, 1), (10, 0.3, 3), (4, 1, 4)]
)
def test_counts_are_rounded_down_and_at_least_one(count: int, fraction: float, expected: int) -> None:
    assert chosen_count(count, fraction) == expected


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["layers.1"], ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.1.norm.weight"]),
        (["mlp"], ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]),
        (["lm_head", "layers.0.norm"], ["model.layers.0.norm.weight", "lm_head.weight"]),
    ],
)  # fmt: skip
def test_modules_are_named_with_all_that_is_in_them(modules: list[str], expected: list[str]) -> None:
    assert named_tensors(layers(2), Full(modules=modules)) == expected


HEADERS = {name: ("F32", shape) for name, shape in layers(2).items()}


@pytest.mark.parametrize(
    ("headers", "modules", "tied", "reason", "words"),
    [
        (HEADERS, ["up"], False, Reason.UNKNOWN_TARGET_MODULE, "up is no module with weights of this model, which has embed_tokens"),
        (HEADERS, ["lm_head"], True, Reason.INVALID_CONFIG, "name embed_tokens, and both are trained as one"),
        ({"transformer.wte.weight": ("F32", (9, 3))}, None, False, Reason.UNSUPPORTED_MODEL, "Use type: LoRA or QLoRA"),
    ],
    ids=["no such module", "a tied head", "GPT-2"],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_a_gpu_is_asked_for(
    headers: Any, modules: list[str] | None, tied: bool, reason: Reason, words: str
) -> None:
    with pytest.raises(StageError, match=words) as refused:
        count_full(headers, Full(modules=modules), tied, "hf://org/model")
    assert refused.value.reason is reason


MODEL = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("full", "model_type", "refused"),
    [
        (Full(), "llama", True),
        (Full.model_validate({"spectrum": {"fraction": 0.5}}), "llama", True),
        (Full(modules=["embed_tokens"]), "llama", False),
        (Full(), "of-its-own", False),
    ],
    ids=["everything", "Spectrum", "others are named", "an architecture that is not known"],
)
def test_tensors_that_are_no_parameters_are_refused_before_a_gpu_is_asked_for(
    full: Full, model_type: str, refused: bool
) -> None:
    config = {**MODEL, "model_type": model_type}
    own = {name: ("F32", shape) for name, shape in describe(parse_config(config)).items()}
    refuse_others(own, full, config, "hf://org/model")
    headers = {**own, "model.mtp_layers.0.mlp.up_proj.weight": ("F32", (16, 8))}
    with pytest.raises(StageError, match=r"1 tensors .*as model\.mtp_layers") if refused else nullcontext():
        refuse_others(headers, full, config, "hf://org/model")


def test_embeddings_are_tied_where_a_familys_configuration_leaves_it_out() -> None:
    """And files have the head all the same: it is not trained beside the embedding that it is."""
    assert is_tied(HEADERS, {**MODEL, "model_type": "gemma2"})
    assert not is_tied(HEADERS, MODEL)
    assert not is_tied(HEADERS, {"model_type": "of-its-own"})


def test_prepare_chooses_once_and_tells_how_many_weights(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(ROWS)
    method = {"type": "Full", "full": {"spectrum": {"fraction": 0.5}}}
    report = bench.run(method=method)
    found = PrepareResult.model_validate_json(bench.object(PREPARE_RESULT))
    assert found.weights is not None
    assert found.weights.signal_to_noise is not None
    base = Checkpoint(build_tiny_model(tmp_path / "again"))
    assert report.trainable_parameters == sum(base.tensors[n].elements for n in found.weights.tensors)
    assert report.total_parameters == sum(t.elements for t in base.tensors.values())
    # A plan needs no weights.
    monkeypatch.setattr(full_weights, "ratios", lambda *_: pytest.fail("ranked"))
    assert (
        bench.run(method={**method, "full": {"spectrum": {"fraction": 1}}}, planOnly=True).trainable_parameters
        > report.trainable_parameters
    )
    assert found.weights.signal_to_noise.keys() == {
        n for ns in ranked_matrices({n: t.shape for n, t in base.tensors.items()}).values() for n in ns
    }
