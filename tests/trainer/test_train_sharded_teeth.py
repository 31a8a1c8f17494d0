"""Loading layer by layer takes nothing for granted: what it would do otherwise than transformers is refused, and what is whole is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.train import model, sharded
from finetune_trainer.train.ranks import Ranks
from tests.support.tiny_model import build_tiny_model
from tests.trainer.test_train_sharded import two
from tests.trainer.test_train_trainer import CPU32, snapshot

__all__ = ["two"]  # a fixture


def layers_loaded(folder: Path, ranks: Ranks, method: str = "LoRA") -> Any:
    return sharded.load_sharded(folder, snapshot(method={"type": method}), CPU32, ranks)[0].model.layers


def test_files_with_another_shape_than_the_configurations_are_refused(two: Ranks, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    said = r"gate_proj\.weight is \[128, 64\] in its files and \[96, 64\] by its configuration\. Set training\.parallelism: DDP"
    with pytest.raises(StageError, match=said) as caught:
        layers_loaded(folder, two)
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL


def keeps_float32(loaded: Any) -> None:
    loaded._keep_in_fp32_modules_strict = {"norm"}


def also_keeps_float32(loaded: Any) -> None:
    loaded._keep_in_fp32_modules = {"norm"}


def stores_a_buffer(loaded: Any) -> None:
    loaded.model.layers[0].mlp.register_buffer("seen", torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (keeps_float32, "it keeps some modules in float32"),
        (also_keeps_float32, "it keeps some modules in float32"),
        (stores_a_buffer, "LlamaMLP keeps more than weights in its files"),
    ],
)
def test_a_model_for_which_transformers_does_more_than_read_is_refused(
    tiny_model: Path, change: Callable[[Any], None], said: str
) -> None:
    loaded = model.load_base(tiny_model, snapshot(), CPU32)
    with ExitStack() as opened:
        stored = sharded.Stored(tiny_model, opened)
        stored.must_hold(loaded)
        change(loaded)
        with pytest.raises(StageError, match=f"cannot be loaded layer by layer: {said}") as caught:
            stored.must_hold(loaded)
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL


def test_a_model_that_does_not_say_what_its_layers_are_is_refused(tiny_model: Path) -> None:
    loaded = model.load_base(tiny_model, snapshot(), CPU32)
    for unknown in (None, {"AnotherLayer"}):
        loaded._no_split_modules = unknown
        with pytest.raises(StageError, match="LlamaForCausalLM does not say what its layers are") as caught:
            sharded.units(loaded)
        assert caught.value.reason is Reason.UNSUPPORTED_MODEL


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_a_base_that_was_not_sharded_is_not_trained(
    two: Ranks, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """accelerate leaves a 4-bit base whole, with a warning only, where packed weights are uint8."""
    monkeypatch.setattr(sharded, "shard", lambda *_: None)
    with pytest.raises(AssertionError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is not sharded"):
        layers_loaded(tiny_model, two, method)


@pytest.mark.parametrize("name", ["weight", sharded.CONSTANTS])
def test_whatever_is_packed_must_be_sharded(two: Ranks, tiny_model: Path, name: str) -> None:
    """Constants, too; and a part that is as large as the whole is none."""
    layer = layers_loaded(tiny_model, two, "QLoRA")[1]
    sharded.must_be_sharded([("layer", layer)], two)
    part = layer.mlp.up_proj.get_parameter(name)
    assert distributed.group.WORLD is not None
    mesh = DeviceMesh.from_group(distributed.group.WORLD, "cpu")
    whole = torch.zeros(part.shape, dtype=part.dtype)
    for left in (whole, distribute_tensor(whole, mesh, [Replicate()])):
        layer.mlp.up_proj._parameters[name] = torch.nn.Parameter(left, requires_grad=False)
        with pytest.raises(AssertionError, match=rf"layer\.mlp\.up_proj\.{name} is not sharded"):
            sharded.must_be_sharded([("layer", layer)], two)
