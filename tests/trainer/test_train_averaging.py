"""Schedule-free optimizers: training goes on with one set of weights, and what is evaluated and published is their average."""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree

from finetune_api.optimizers import SCHEDULE_FREE
from finetune_api.results import CHECKPOINTS_DIR, TRAIN_RESULT
from finetune_trainer.errors import Interrupted
from finetune_trainer.train import run as train
from finetune_trainer.train.averaging import averaged, name_parameters, to_average
from tests.support.prepared import PreparedJob, prepare_job
from tests.trainer.test_train_resume import adapter, curve, forget_the_result, interrupt, result, sigterm, spoil_before

CLASSES: list[Any] = [AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree]


def after_steps(kind: Any, steps: int) -> tuple[torch.nn.Module, Any]:
    """A model in training, and its optimizer, whose second group has parameters that never get a gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(60, 50), torch.nn.Linear(50, 4), torch.nn.Linear(3, 2))
    made = kind([{"params": model[:2].parameters()}, {"params": model[2].parameters()}], lr=0.1)
    name_parameters(made, model)
    made.train()
    for _ in range(steps):
        model[:2](torch.randn(7, 60)).square().mean().backward()
        made.step()
        made.zero_grad()
    return model, made


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_average_is_schedulefrees_own(kind: Any, tmp_path: Path) -> None:
    """Of a state from a file, without the optimizer."""
    model, made = after_steps(kind, 12)
    going_on = values(model)
    torch.save(made.state_dict(), tmp_path / "optimizer.pt")
    made.eval()
    expected = values(model)
    assert not torch.equal(going_on["0.weight"], expected["0.weight"])
    model.load_state_dict(going_on)
    to_average(model, torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert all(torch.equal(value, expected[name]) for name, value in values(model).items())


@pytest.mark.parametrize("kind", CLASSES)
def test_training_goes_on_with_what_it_had(kind: Any) -> None:
    """Bit for bit, which schedulefree's own way there and back does not give; also where an evaluation is cut short."""
    model, made = after_steps(kind, 12)
    before = values(model)
    seen = []

    def cut_short() -> None:
        with averaged(model, made.state_dict()):
            seen.append(values(model))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        cut_short()
    assert not torch.equal(seen[0]["0.weight"], before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    made.eval()
    made.train()
    assert any(not torch.equal(value, before[name]) for name, value in values(model).items())


def job_with(s3: Any, tmp_path: Path, model: Path, optimizer: str, **spec: Any) -> PreparedJob:
    """24 rows, 8 to a step in micro-batches of 2; dropout draws random numbers."""
    training = {
        "length": {"steps": 12},
        "microBatchSequences": 2,
        "scheduler": "Constant",
        "warmup": {"steps": 4},
        "optimizer": {"name": optimizer, "learningRate": 0.01, "weightDecay": 0.01},
    }
    lora = {"rank": 4, "dropout": 0.2, "loraPlusLRRatio": 2}
    return prepare_job(s3, tmp_path, model, **{"method": {"type": "LoRA", "lora": lora}, "training": training, **spec})


EVERY_STEP = {"recovery": {"checkpoint": {"interval": {"steps": 1}, "keep": 1}}, "evaluation": {"intervalSteps": 1}}


@pytest.mark.parametrize("name", [*sorted(SCHEDULE_FREE), "stable_adamw"])
def test_a_run_that_was_told_to_stop_ends_with_the_same_bytes(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped in the middle, and lost after the last step, when its weights come from a checkpoint. As on a GPU, torch-optimi would take the kernels
    that it compiles."""
    # The package has a function of the module's name.
    monkeypatch.setattr(import_module("optimi.stableadamw"), "_default_to_triton", lambda parameters: True)
    job = job_with(s3, tmp_path, tiny_model, name, recovery={"checkpoint": {"interval": {"steps": 3}}})
    train.run(job.context())
    undisturbed, losses = adapter(job), curve(job)
    job.context().workspace_store().delete(TRAIN_RESULT)
    train.run(job.context(execution="execution-0"))
    assert result(job).resumed_from_steps == [12]
    assert adapter(job) == undisturbed
    forget_the_result(job)
    interrupt(monkeypatch, 8, 3, sigterm)
    with pytest.raises(Interrupted):
        train.run(job.context(execution="execution-1"))
    train.run(job.context(execution="execution-2"))
    assert result(job).resumed_from_steps == [7]
    assert (adapter(job), curve(job)) == (undisturbed, losses)


def test_evaluations_and_checkpoints_on_the_way_change_nothing(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    found = []
    for number, spec in enumerate([{}, EVERY_STEP]):
        job = job_with(s3, tmp_path / str(number), tiny_model, "schedule_free_adamw", output={"select": "Last"}, **spec)
        train.run(job.context())
        found.append((adapter(job)["adapter_model.safetensors"], curve(job)))
    assert found[0] == found[1]


@pytest.mark.parametrize("best", [False, True])
def test_what_is_published_is_the_average_of_the_chosen_step(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: bool
) -> None:
    """As schedulefree itself makes it of that step's checkpoint. Weights that are spoilt before step 6 make an earlier step the best."""
    job = job_with(s3, tmp_path, tiny_model, "schedule_free_adamw", **(EVERY_STEP if best else {}))
    if best:
        spoil_before(monkeypatch, step=6)
    train.run(job.context())
    step = result(job).selected_step or 12
    assert (step < 6) is best
    store = job.context().workspace_store()
    files = [i.key.rpartition("/")[0] for i in store.list(CHECKPOINTS_DIR)]
    folder = next(folder for folder in files if folder.startswith(f"{CHECKPOINTS_DIR}/{step:08d}-"))
    stored = load(store.get_bytes(f"{folder}/adapter_model.safetensors"))
    state = torch.load(io.BytesIO(store.get_bytes(f"{folder}/optimizer.pt")), weights_only=True)
    if not best:
        # Each step counts by the square of the highest rate so far: 0, then 1/4, 1/2 and 3/4 of it, and eight times all of it.
        weights = {round(group["weight_sum"] / group["lr"] ** 2, 6) for group in state["param_groups"]}
        assert weights == {8 + (1 + 4 + 9) / 16}, "the warm-up is the schedule's alone"
    names = [[name.replace(".default", "") for name in group["param_names"]] for group in state["param_groups"]]
    parameters = [{name: torch.nn.Parameter(stored[name].clone()) for name in group} for group in names]
    theirs = AdamWScheduleFree([{"params": list(group.values())} for group in parameters])
    theirs.load_state_dict(state)
    theirs.eval()
    expected = {name: p.detach() for group in parameters for name, p in group.items()}
    published = load(adapter(job)["adapter_model.safetensors"])
    assert published.keys() == stored.keys() == expected.keys()
    assert all(torch.equal(published[name], value) for name, value in expected.items())
    assert any(not torch.equal(published[name], value) for name, value in stored.items())
