"""The optimizers that the API names are those that the locked libraries bring along, and they train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from finetune_api.optimizers import WITHOUT_BITSANDBYTES, OptimizerName
from finetune_api.spec import GaLore
from finetune_trainer.train.galore import GaLoreAdamW


def optimizer(name: str, model: torch.nn.Module, folder: Path) -> torch.optim.Optimizer:
    """As the Trainer makes it, on the CPU."""
    if name == OptimizerName.GALORE_ADAMW:  # ours: transformers' needs a package
        group = {"params": list(model.parameters()), "projected": False}
        return GaLoreAdamW(
            [group], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, settings=GaLore(), same=lambda t: t
        )
    arguments = TrainingArguments(output_dir=str(folder), optim=name, use_cpu=True, report_to=[], learning_rate=1e-2)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    made = kind(model.parameters(), **options)
    assert isinstance(made, torch.optim.Optimizer)
    return made


@pytest.mark.parametrize("name", list(OptimizerName))
def test_every_optimizer_of_the_api_changes_weights_on_a_cpu(name: OptimizerName, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 128)  # large enough for states of 8 bit
    made = optimizer(name, model, tmp_path)
    before = model.weight.detach().clone()
    model(torch.randn(8, 128)).square().mean().backward()
    made.step()
    assert torch.isfinite(model.weight).all()
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize("name", sorted({o.value for o in OptimizerNames} - set(OptimizerName)))
def test_every_other_optimizer_of_transformers_needs_what_the_image_has_not(name: str, tmp_path: Path) -> None:
    with pytest.raises((ImportError, ValueError)):
        optimizer(name, torch.nn.Linear(128, 128), tmp_path)


@pytest.mark.parametrize("name", list(OptimizerName))
def test_who_brings_an_optimizer_is_known(name: OptimizerName, tmp_path: Path) -> None:
    made = optimizer(name, torch.nn.Linear(128, 128), tmp_path)
    bitsandbytes_class = any(kind.__module__.startswith("bitsandbytes") for kind in type(made).mro())
    assert bitsandbytes_class is (name not in WITHOUT_BITSANDBYTES)
