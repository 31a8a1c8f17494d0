"""Every optimizer of transformers is known: it trains and is planned for, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from finetune_api.optimizers import REFUSED, RUNNING, SCHEDULE_FREE, WITHOUT_BITSANDBYTES, OptimizerName
from finetune_api.planner.full import state_bytes, update_bytes
from finetune_api.planner.weights import optimizer_bytes
from finetune_api.planner.workload import Tuning
from finetune_api.spec import Full, GaLore, Training
from finetune_trainer.train.galore import GaLoreAdamW
from finetune_trainer.train.trainer import GROUP_SETTINGS
from tests.planner.simulator.tracker import LiveStorages

STEPS = 6
"""RAdam's first five change nothing (schedulefree 1.4.1)."""
TABLES = ("step", "qmap1", "qmap2", "eps_sq")
"""Numbers, and what is there once for all tensors."""


def optimizer(name: str, model: torch.nn.Module, folder: Path) -> torch.optim.Optimizer:
    """As the trainer makes it, on the CPU."""
    if name == OptimizerName.GALORE_ADAMW:  # ours: transformers' needs a package
        group = {"params": list(model.parameters()), "projected": False}
        return GaLoreAdamW(
            [group], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, settings=GaLore(), same=lambda t: t
        )
    arguments = TrainingArguments(output_dir=str(folder), optim=name, use_cpu=True, report_to=[], learning_rate=1e-2)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    made = kind(model.parameters(), **options)
    assert isinstance(made, torch.optim.Optimizer)
    for group in made.param_groups:
        group.update(GROUP_SETTINGS.get(name, {}))
    return made


def stepped(name: str, folder: Path) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    """After some steps, large enough for states of 8 bit."""
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 128, bias=False)
    made = optimizer(name, model, folder)
    for _ in range(STEPS):
        model(torch.randn(8, 128)).square().mean().backward()
        made.step()
        made.zero_grad()
    return model, made


def test_every_optimizer_of_transformers_runs_or_is_refused() -> None:
    """A new version of transformers that has more of them ends here."""
    assert set(OptimizerName) == {o.value for o in OptimizerNames}
    refused = [name for names, _ in REFUSED for name in names]
    assert sorted([*RUNNING, *refused]) == sorted(OptimizerName), "each once"


def test_the_guide_tells_of_each() -> None:
    rows = [row for row in Path("docs/user-guide.md").read_text().splitlines() if row.startswith("| `")]
    for name in OptimizerName:
        told = [row for row in rows if f"`{name}`" in row.split("|")[1]]
        assert len(told) == 1, name
        assert ("refused: " in told[0]) is (name not in RUNNING), name


@pytest.mark.parametrize("name", RUNNING)
def test_every_optimizer_of_the_api_changes_weights_on_a_cpu(name: OptimizerName, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.nn.Linear(128, 128, bias=False).weight
    after, _ = stepped(name, tmp_path)
    assert torch.isfinite(after.weight).all()
    assert not torch.equal(before, after.weight)


@pytest.mark.parametrize(("names", "why"), REFUSED, ids=lambda value: value[0] if isinstance(value, tuple) else "why")
def test_what_cannot_run_is_refused_with_what_to_take_instead(names: tuple[OptimizerName, ...], why: str) -> None:
    advice = why.partition(": use ")[2]
    assert any(name in advice for name in RUNNING)
    for name in names:
        assert name in why or (name.endswith("_layerwise") and "layerwise" in why)
        assert name not in advice.replace(",", " ").split()
        with pytest.raises(ValidationError, match=r"training\.optimizer\.name: ") as refused:
            Training.model_validate({"optimizer": {"name": name}})
        assert why in str(refused.value)


@pytest.mark.parametrize("name", sorted(n for names, _ in REFUSED for n in names))
def test_what_is_refused_needs_what_the_image_has_not(name: str, tmp_path: Path) -> None:
    with pytest.raises((ImportError, ValueError)):
        optimizer(name, torch.nn.Linear(128, 128), tmp_path)


@pytest.mark.parametrize("name", RUNNING)
def test_who_brings_an_optimizer_is_known(name: OptimizerName, tmp_path: Path) -> None:
    made = optimizer(name, torch.nn.Linear(128, 128), tmp_path)
    bitsandbytes_class = any(kind.__module__.startswith("bitsandbytes") for kind in type(made).mro())
    assert bitsandbytes_class is (name not in WITHOUT_BITSANDBYTES)
    assert type(made).__module__.startswith("schedulefree") is (name in SCHEDULE_FREE)


def kept(made: torch.optim.Optimizer) -> int:
    """Bytes of a state."""
    states: list[dict[str, Any]] = list(made.state.values())
    return sum(
        v.nbytes for state in states for k, v in state.items() if k not in TABLES and isinstance(v, torch.Tensor)
    )


@pytest.mark.parametrize("name", RUNNING)
def test_the_planned_state_is_what_an_optimizer_keeps(name: OptimizerName, tmp_path: Path) -> None:
    model, made = stepped(name, tmp_path)
    planned = optimizer_bytes(name, model.weight.numel())
    if name is OptimizerName.ADAFACTOR:
        assert 0 < kept(made) < planned
    else:
        assert kept(made) == planned


@pytest.mark.parametrize("name", sorted({*SCHEDULE_FREE, OptimizerName.STABLE_ADAMW}))
def test_a_step_of_full_weights_needs_no_more_than_is_planned(name: OptimizerName, tmp_path: Path) -> None:
    """Beside weights and gradients, of two matrices of unlike size."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 256, bias=False), torch.nn.Linear(256, 64, bias=False))
    chosen = {n: tuple(p.shape) for n, p in model.named_parameters()}
    made = optimizer(name, model, tmp_path)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        held = [t for p in model.parameters() for t in (p.data, p.grad) if t is not None]
        with LiveStorages() as live:
            for tensor in [*held, *(t for s in made.state.values() for t in s.values() if isinstance(t, torch.Tensor))]:
                live.add(tensor)
            made.step()
    tuning = Tuning(full=Full())
    planned = state_bytes(name, chosen, [], tuning) + update_bytes(name, chosen, [], tuning)
    numbers = 16 * 512  # each takes as much as CUDA's allocator gives at least
    assert live.peak_bytes <= sum(t.nbytes for t in held) + planned + numbers
