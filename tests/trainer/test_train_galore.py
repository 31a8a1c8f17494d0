"""GaLore against the paper's algorithm written out, and its state against a round trip through a file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_api.planner.full import update_bytes
from finetune_api.planner.linears import Linear
from finetune_api.planner.workload import Tuning
from finetune_api.spec import GaLore
from finetune_trainer import heartbeat
from finetune_trainer.train.galore import GaLoreAdamW, galore_groups
from tests.planner.simulator.tracker import LiveStorages

LR, EPS, DECAY, BETAS = 0.01, 1e-8, 0.1, (0.9, 0.999)


def optimizer(parameter: torch.nn.Parameter, settings: GaLore, projected: bool = True) -> GaLoreAdamW:
    group = {"params": [parameter], "projected": projected}
    return GaLoreAdamW([group], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, settings=settings, same=lambda t: t)


def gradients(shape: tuple[int, int], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def by_the_paper(weight: torch.Tensor, grads: list[torch.Tensor], settings: GaLore) -> torch.Tensor:
    """Algorithm 2 (Zhao et al., 2024) with a whole singular value decomposition, and decoupled weight decay."""
    weight, tall, r = weight.clone().double(), weight.shape[0] >= weight.shape[1], settings.rank
    m = v = torch.zeros(())
    for t, grad in enumerate(g.double() for g in grads):
        if t % settings.update_interval_steps == 0:
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            p = vh[:r].T if tall else u[:, :r]
        low = grad @ p if tall else p.T @ grad
        m, v = BETAS[0] * m + (1 - BETAS[0]) * low, BETAS[1] * v + (1 - BETAS[1]) * low**2
        n = m / (1 - BETAS[0] ** (t + 1)) / ((v / (1 - BETAS[1] ** (t + 1))).sqrt() + EPS)
        weight = weight * (1 - LR * DECAY) - LR * settings.scale * (n @ p.T if tall else p @ n)
    return weight


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12)], ids=["tall", "wide", "square"])
def test_updates_are_those_of_the_paper(shape: tuple[int, int]) -> None:
    # The basis of the subspace may be another at the second projection, sign for sign; within an interval it shows nowhere.
    settings = GaLore(rank=4, update_interval_steps=6, scale=0.5)
    grads = gradients(shape, 6)
    parameter = torch.nn.Parameter(grads[0] * 3)
    expected = by_the_paper(parameter.detach(), grads, settings)
    made = optimizer(parameter, settings)
    for grad in grads:
        parameter.grad = grad.clone()
        made.step()
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rank", "projected"), [(10, True), (4, False)], ids=["rank of the matrix", "not projected"])
def test_without_a_projection_it_is_torchs_adamw(rank: int, projected: bool) -> None:
    grads = gradients((24, 10), 5)
    ours, theirs = torch.nn.Parameter(grads[0].clone()), torch.nn.Parameter(grads[0].clone())
    made = optimizer(ours, GaLore(rank=rank), projected)
    reference = torch.optim.AdamW([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        made.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_projection_is_made_anew_when_its_interval_is_over() -> None:
    settings = GaLore(rank=2, update_interval_steps=3)
    parameter = torch.nn.Parameter(torch.ones(8, 5))
    made, seen = optimizer(parameter, settings), []
    for grad in gradients((8, 5), 7):
        parameter.grad = grad
        made.step()
        seen.append(made.state[parameter]["projection"].clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changed == [False, False, True, False, False, True]
    assert made.state[parameter]["exp_avg"].shape == (8, 2), "moments live in the projected space"


def test_a_state_from_a_file_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Loaded as transformers does, tensors only; in the middle of an interval the projection is the stored one."""
    settings, grads = GaLore(rank=3, update_interval_steps=4), gradients((12, 9), 6)

    def steps(parameter: torch.nn.Parameter, made: GaLoreAdamW, some: list[torch.Tensor]) -> None:
        for grad in some:
            parameter.grad = grad.clone()
            made.step()

    through = torch.nn.Parameter(grads[0].clone())
    steps(through, optimizer(through, settings), grads)
    first = torch.nn.Parameter(grads[0].clone())
    before = optimizer(first, settings)
    steps(first, before, grads[:2])
    torch.save(before.state_dict(), tmp_path / "optimizer.pt")
    second = torch.nn.Parameter(first.detach().clone())
    after = optimizer(second, settings)
    after.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(second, after, grads[2:])
    assert torch.equal(through, second)


def test_a_gradient_of_nothing_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(6, 4))
    made = optimizer(parameter, GaLore(rank=2))
    parameter.grad = torch.zeros(6, 4)
    made.step()
    torch.testing.assert_close(parameter.detach(), torch.full((6, 4), 1 - LR * DECAY))


def test_only_linear_layers_are_projected(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    named: dict[int, Any] = {id(p): n for n, p in model.named_parameters()}
    groups = galore_groups(model, [{"params": list(model.parameters()), "weight_decay": 0.0}])
    found = {g["projected"]: {named[id(p)] for p in g["params"]} for g in groups}
    assert found[False] == {n for n in named.values() if "norm" in n or "embed" in n or "lm_head" in n}
    assert all(".mlp." in n or ".self_attn." in n for n in found[True])


@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (128, 512)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("projected", [True, False])
def test_a_step_needs_no_more_than_is_planned(shape: tuple[int, int], projected: bool) -> None:
    """Beside parameter, gradient and state: of the step that decomposes and of the next. What the solver takes and returns is not seen."""
    rank = 4
    parameter = torch.nn.Parameter(torch.ones(shape))
    made = optimizer(parameter, GaLore(rank=rank, update_interval_steps=2), projected)
    parameter.grad = gradients(shape, 1)[0]
    linear = Linear(name="layers.0.a", inputs=shape[1], outputs=shape[0])
    tuning = Tuning(galore_rank=rank)
    small = 8 * 4 * rank * max(shape)  # what is projected, and the rows of a norm
    for _ in range(3):
        with LiveStorages() as live:
            for tensor in (parameter.data, parameter.grad, *made.state[parameter].values()):
                live.add(tensor)
            made.step()
        kept = sum(v.nbytes for k, v in made.state[parameter].items() if k != "step")
        planned = update_bytes("galore_adamw", {"layers.0.a.weight": shape}, [linear] if projected else [], tuning)
        assert live.peak_bytes <= parameter.nbytes + parameter.grad.nbytes + kept + planned + small


def test_each_decomposition_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[int] = []
    monkeypatch.setattr(heartbeat, "beat", lambda: beats.append(1))
    parameter = torch.nn.Parameter(torch.ones(8, 5))
    made = optimizer(parameter, GaLore(rank=2, update_interval_steps=3))
    for grad in gradients((8, 5), 4):
        parameter.grad = grad
        made.step()
    assert len(beats) == 2
