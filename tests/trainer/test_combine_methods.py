"""Every type of combination against peft's own add_weighted_adapter, and what peft gets wrong against the sum itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from transformers import AutoModelForCausalLM

from finetune_api.failures import Reason
from finetune_api.spec import AdapterCombinationSpec
from finetune_trainer.combine.files import result_rank, write_config, write_weights
from finetune_trainer.combine.methods import SUMS
from finetune_trainer.combine.sources import fetch_adapter, must_go_together
from finetune_trainer.errors import StageError
from finetune_trainer.lora_files import strange_settings
from finetune_trainer.publish.adapter import read_adapter
from tests.support.adapters import combine_context, make_adapter
from tests.support.tiny_families import build_tiny_family

Deltas = dict[str, torch.Tensor]
PLAIN: dict[str, Any] = {}
OTHER_RANK = {"r": 6, "lora_alpha": 3}
RS = {"r": 2, "lora_alpha": 4, "use_rslora": True}
PATTERNS = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}}
FEWER = {"r": 3, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}


def ours(
    pod: Path, base: Path, settings: list[dict[str, Any]], weights: list[float], **asked: Any
) -> tuple[Deltas, Path]:
    """What our combination does to each module, as its files say, and where they are."""
    for index, own in enumerate(settings):
        make_adapter(base, pod / "pvc" / "claim" / str(index), index, **own)
    adapters = [{"uri": f"pvc://claim/{i}", "weight": w} for i, w in enumerate(weights)]
    ctx = combine_context(pod, {"adapters": adapters, "output": {"uri": "s3://out"}, **asked})
    spec: AdapterCombinationSpec = ctx.snapshot.spec
    sources = [fetch_adapter(ctx, i) for i in range(len(adapters))]
    must_go_together(sources, same_ranks=spec.type not in SUMS)
    folder = pod / "mix"
    folder.mkdir()
    rank = result_rank(spec, sources)
    write_config(sources, rank, folder)
    write_weights(spec, sources, rank, folder)
    adapter = read_adapter(folder)
    loras = {module: adapter.lora(module) for module in adapter.modules}
    return {module: lora.b @ lora.a * lora.scaling for module, lora in loras.items()}, folder


def test_adapters_of_gpt2_are_combined(tmp_path: Path) -> None:
    """peft sets fan_in_fan_out for its layers, by itself."""
    base = build_tiny_family(tmp_path / "base", "gpt2")
    own = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    found, folder = ours(tmp_path / "pod", base, [own, {**own, "r": 2}], [0.5, -1.0])
    model = loaded(base, tmp_path / "pod", 2)
    model.load_adapter(folder, adapter_name="mix")
    for module, update in found.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        wanted = 0.5 * layer.get_delta_weight("0") - layer.get_delta_weight("1")
        torch.testing.assert_close(update.T, wanted)
        torch.testing.assert_close(layer.get_delta_weight("mix"), wanted)
    assert len(found) == 4
    assert strange_settings({"fan_in_fan_out": True}, ["lm_head"]) == ["fan_in_fan_out"]


def loaded(base: Path, pod: Path, count: int) -> PeftModel:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, pod / "pvc" / "claim" / "0", adapter_name="0")
    for index in range(1, count):
        model.load_adapter(pod / "pvc" / "claim" / str(index), adapter_name=str(index))
    return model


def layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def pefts(model: PeftModel, weights: list[float], kind: str, **asked: Any) -> Deltas:
    """What peft makes of it: its matrices alone, since its scaling is wrong where the first adapter is an rsLoRA one."""
    model.add_weighted_adapter([str(i) for i in range(len(weights))], weights, "mix", combination_type=kind, **asked)
    return {
        name: layer.lora_B["mix"].weight.data @ layer.lora_A["mix"].weight.data
        for name, layer in layers(model).items()
        if "mix" in layer.lora_A
    }


def sums(model: PeftModel, weights: list[float]) -> Deltas:
    """The weighted sum itself."""
    return {
        name: sum(w * layer.get_delta_weight(str(i)) for i, w in enumerate(weights) if str(i) in layer.lora_A)
        for name, layer in layers(model).items()
    }


def must_be_equal(found: Deltas, expected: Deltas) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert delta.abs().max() > 1e-4, "something to compare"
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


CASES = [
    ("Cat", "cat", [PLAIN, OTHER_RANK, RS], {}, {}),
    ("Cat", "cat", [RS, PATTERNS], {}, {}),
    ("SVD", "svd", [PLAIN, OTHER_RANK, PATTERNS], {}, {}),
    ("SVD", "svd", [RS, PLAIN], {"rank": 3}, {"svd_rank": 3}),
    ("Linear", "linear", [PLAIN, {"lora_alpha": 2, "use_rslora": True}], {}, {}),
    ("TIES", "ties", [PLAIN, PLAIN, PLAIN], {"density": 0.4}, {"density": 0.4}),
    (
        "TIES",
        "ties",
        [PLAIN, PLAIN, PLAIN],
        {"density": 0.4, "majoritySign": "Frequency"},
        {"density": 0.4, "majority_sign_method": "frequency"},
    ),
    ("MagnitudePrune", "magnitude_prune", [PLAIN, PLAIN], {"density": 0.3}, {"density": 0.3}),
    ("DARELinear", "dare_linear", [PLAIN, PLAIN], {"density": 0.5}, {"density": 0.5}),
    ("DARETIES", "dare_ties", [PLAIN, PLAIN, PLAIN], {"density": 0.5}, {"density": 0.5}),
]


@pytest.mark.parametrize(("kind", "theirs", "settings", "asked", "their_own"), CASES)
def test_it_is_what_peft_makes_of_it(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    theirs: str,
    settings: list[dict[str, Any]],
    asked: dict[str, Any],
    their_own: dict[str, Any],
) -> None:
    def draws(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        """The same for both, whatever either has drawn before."""
        mask = (tensor.mul(1e4).round().long() % 7 < 7 * density).to(tensor.dtype)
        return tensor * mask / (density if rescale else 1)

    monkeypatch.setattr(merge_utils, "random_pruning", draws)
    weights = [0.7, -0.4, 1.3][: len(settings)]
    found, _ = ours(tmp_path, tiny_model, settings, weights, type=kind, **asked)
    must_be_equal(found, pefts(loaded(tiny_model, tmp_path, len(settings)), weights, theirs, **their_own))


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ([RS, PLAIN, FEWER], {"type": "Cat"}),
        ([RS, PATTERNS, FEWER], {"type": "SVD", "rank": 12}),
        ([PATTERNS, {"lora_alpha": 3, **PATTERNS}], {"type": "SVD", "rank": 8}),
    ],
    ids=["Cat", "SVD", "patterns"],
)
def test_cat_and_an_svd_of_full_rank_are_the_sum_and_peft_loads_them(
    tiny_model: Path, tmp_path: Path, settings: list[dict[str, Any]], asked: dict[str, Any]
) -> None:
    """Also where the first adapter is an rsLoRA one, or layers are in some adapters only."""
    weights = [0.7, -0.4, 1.3][: len(settings)]
    found, folder = ours(tmp_path, tiny_model, settings, weights, **asked)
    model = loaded(tiny_model, tmp_path, len(settings))
    expected = sums(model, weights)
    must_be_equal(found, expected)
    model.load_adapter(folder, adapter_name="made")
    made = {n: layer.get_delta_weight("made") for n, layer in layers(model).items() if "made" in layer.lora_A}
    must_be_equal(made, expected)


def test_a_truncated_svd_is_the_best_of_its_rank(tiny_model: Path, tmp_path: Path) -> None:
    found, _ = ours(tmp_path, tiny_model, [PLAIN, PLAIN], [1.0, 1.0], type="SVD", rank=3)
    for name, total in sums(loaded(tiny_model, tmp_path, 2), [1.0, 1.0]).items():
        u, s, vh = torch.linalg.svd(total, full_matrices=False)
        torch.testing.assert_close(found[name], (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-4, atol=1e-6)


def test_linear_of_rank_patterns_is_padded_to_one_rank(tiny_model: Path, tmp_path: Path) -> None:
    """peft writes a file here that it cannot load."""
    found, folder = ours(tmp_path, tiny_model, [PATTERNS, PATTERNS], [0.5, 0.5], type="Linear")
    assert found["model.layers.0.mlp.up_proj"].abs().max() > 1e-4
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), folder)


@pytest.mark.parametrize("kind", ["DARELinear", "DARETIES"])
def test_dare_draws_the_same_for_the_same_seed_and_keeps_the_density(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    made = []
    for number, seed in enumerate((7, 7, 8)):
        _, folder = ours(tmp_path / str(number), tiny_model, [PLAIN, PLAIN], [1, 1], type=kind, density=0.25, seed=seed)
        made.append((folder / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]
    lora = read_adapter(tmp_path / "0" / "mix").lora("model.layers.0.mlp.up_proj")
    none_kept = (lora.b == 0).float().mean().item()
    assert abs(none_kept - 0.75**2) < 0.1, "each of both adapters keeps a quarter"
    again = read_adapter(tmp_path / "0" / "mix").lora("model.layers.1.mlp.up_proj")
    assert not torch.equal(lora.b == 0, again.b == 0), "each module draws for itself"


def test_types_that_add_a_to_a_refuse_other_ranks(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        ours(tmp_path, tiny_model, [PLAIN, OTHER_RANK], [1, 1], type="Linear")
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert "has rank 4 in adapters[0] and 6 in adapters[1]" in caught.value.message
    assert "Use Cat or SVD" in caught.value.message
