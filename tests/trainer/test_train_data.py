"""The data schedule, batches, and the loss over learned tokens."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_api.spec import Length
from finetune_trainer.train import evaluate
from finetune_trainer.train.device import Compute
from finetune_trainer.train.loss import LearnedTokenLoss, learned_tokens
from finetune_trainer.train.rows import IGNORED, Batch, Rows, batches_by_length, collate
from finetune_trainer.train.schedule import make_schedule
from tests.support.prepared import encode, questions, table


@pytest.fixture(scope="module")
def rows(tiny_model: Path) -> Rows:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return Rows(table([encode(tokenizer, q) for q in questions(12)]))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("rows", "epochs", "batch"), [(10, 3, 4), (7, 1, 16), (5, 2.5, 3), (1, 4, 1)])
def test_every_row_is_seen_as_often_as_the_length_asks(rows: int, epochs: float, batch: int) -> None:
    schedule = make_schedule(rows, Length(epochs=epochs), batch, seed=1)
    seen = Counter(i for step in range(schedule.steps) for i in schedule.step_rows(step))
    assert sum(seen.values()) == round(epochs * rows)
    assert set(seen) == set(range(rows)) or epochs < 1
    assert max(seen.values()) - min(seen.values()) <= 1
    assert schedule.epoch_after(schedule.steps - 1) == pytest.approx(round(epochs * rows) / rows)


@pytest.mark.parametrize(("epochs", "rows", "batch"), [(1.1, 10, 11), (2.5, 5, 4), (0.01, 10, 4), (3, 10, 4)])
def test_the_schedule_has_the_steps_that_prepare_announced(epochs: float, rows: int, batch: int) -> None:
    announced = math.ceil(epochs * rows / batch)
    schedule = make_schedule(rows, Length(epochs=epochs), batch, 0, announced)
    assert schedule.steps == announced
    assert all(schedule.step_rows(s) for s in range(announced))


def test_an_epoch_is_a_permutation_of_its_own_and_the_seed_decides_it() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return make_schedule(40, Length(epochs=2), 40, seed).step_rows(number)

    assert sorted(epoch(1, 0)) == list(range(40))
    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(1, 1)
    assert epoch(1, 0) != epoch(2, 0)


def test_steps_do_not_depend_on_the_micro_batch() -> None:
    schedule = make_schedule(22, Length(epochs=2), 8, seed=3)
    for step in range(schedule.steps):
        for size in (1, 2, 4, 8):
            batches = schedule.micro_batches(step, size, length=lambda row: row % 5)
            assert sorted(i for b in batches for i in b) == sorted(schedule.step_rows(step))
            assert {len(b) for b in batches[:-1]} <= {size}
            assert 0 < len(batches[-1]) <= size


def test_rows_of_like_length_share_a_micro_batch() -> None:
    schedule = make_schedule(64, Length(epochs=1), 32, seed=3)
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 64).astype(int)

    def computed(batches: list[list[int]]) -> int:
        return sum(max(lengths[b]) * len(b) for b in batches)

    for step in range(schedule.steps):
        ids = schedule.step_rows(step)
        batches = schedule.micro_batches(step, 4, lambda row: int(lengths[row]))
        assert computed(batches) < 0.8 * computed([ids[i : i + 4] for i in range(0, len(ids), 4)])
        assert lengths[batches[0][0]] == max(lengths[ids]), "what does not fit shows at once"


def test_rows_of_one_length_stay_in_the_schedules_order() -> None:
    schedule = make_schedule(22, Length(epochs=2), 8, seed=3)
    assert [i for b in schedule.micro_batches(1, 2, lambda _: 7) for i in b] == schedule.step_rows(1)


def test_length_in_steps_gives_full_steps() -> None:
    schedule = make_schedule(5, Length(steps=4), 4, seed=0)
    assert [len(schedule.step_rows(s)) for s in range(schedule.steps)] == [4, 4, 4, 4]


def test_padding_reaches_the_longest_row_only_and_is_neither_seen_nor_learned(rows: Rows) -> None:
    batch = collate(rows, [0, 3, 5], pad_id=2)
    lengths = [rows.length(i) for i in (0, 3, 5)]
    assert batch["input_ids"].shape == (3, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for line, length in enumerate(lengths):
        assert (batch["labels"][line, length:] == IGNORED).all()


def test_the_end_token_is_learned_although_it_pads(rows: Rows) -> None:
    end = 2
    batch = collate(rows, [0, 3], pad_id=end)
    for line, index in enumerate((0, 3)):
        last = rows.length(index) - 1
        assert batch["input_ids"][line, last] == end
        assert batch["labels"][line, last] == end


def test_evaluation_batches_hold_every_row_once_within_the_budget(rows: Rows) -> None:
    batches = batches_by_length(rows, token_budget=80)
    assert sorted(i for b in batches for i in b) == list(range(len(rows)))
    assert all(len(b) == 1 or len(b) * max(rows.length(i) for i in b) <= 80 for b in batches)


def test_the_loss_is_that_of_transformers(rows: Rows, model: torch.nn.Module) -> None:
    batch = collate(rows, [0, 1, 2, 3], pad_id=0)
    theirs = model(**batch).loss  # mean over learned tokens
    ours = LearnedTokenLoss(model)(batch) / learned_tokens(batch["labels"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_chunks_change_nothing(model: torch.nn.Module, weight: torch.nn.Parameter, batch: Batch) -> None:
    """The loss and its gradient by a weight, with logits at once and in chunks of seven tokens."""
    results = []
    for chunk_bytes in (1 << 30, 7 * 4 * 400):
        model.zero_grad()
        loss = LearnedTokenLoss(model, chunk_bytes)(batch)
        loss.backward()
        assert weight.grad is not None
        results.append((loss.detach(), weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_chunks_of_logits_change_neither_loss_nor_gradient(rows: Rows, model: torch.nn.Module) -> None:
    batch = collate(rows, [0, 1, 2, 3], pad_id=0)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert_chunks_change_nothing(model, weight, batch)


class Scaled(torch.nn.Module):
    """Stands for Granite and its like: logits are divided after the head."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.base_model = inner, inner.config, inner.base_model

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.inner.get_output_embeddings()  # type: ignore[no-any-return,operator]

    def forward(self, **kwargs: torch.Tensor) -> object:
        out = self.inner(**kwargs)
        out.logits = out.logits / 8
        return out


def test_a_model_that_changes_its_logits_is_evaluated_whole(rows: Rows, tiny_model: Path) -> None:
    model = Scaled(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    loss = LearnedTokenLoss(model)
    batch = collate(rows, [0, 1], pad_id=0)
    shifted = torch.nn.functional.cross_entropy(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        reduction="sum",
    )
    torch.testing.assert_close(loss(batch), shifted, rtol=1e-5, atol=1e-4)
    assert loss.head_apart is False


def test_a_batch_is_as_large_as_its_logits_allow(rows: Rows, tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor([rows.ids(0)])
    assert LearnedTokenLoss(plain).batch_tokens(ids, 16384) == 16384  # logits a chunk at a time, at any vocabulary
    whole = LearnedTokenLoss(Scaled(plain))
    assert whole.batch_tokens(ids, 16384) == 16384
    whole.vocabulary = 256_000
    assert whole.batch_tokens(ids, 16384) == 524
    whole.vocabulary = 10**9
    assert whole.batch_tokens(ids, 16384) == 1


def test_chunks_of_whole_logits_change_neither_loss_nor_gradient(rows: Rows, tiny_model: Path) -> None:
    batch = collate(rows, [0, 1, 2, 3], pad_id=0)
    model = Scaled(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    weight = model.inner.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert_chunks_change_nothing(model, weight, batch)


@pytest.mark.parametrize(
    ("lengths", "new", "batches"),
    [
        ([], 10, []),
        ([5, 9, 5], 10, [[1, 0, 2]]),
        ([4000, 4000, 4000, 10], 96, [[0, 1], [2, 3]]),
        ([100_000, 3], 10, [[0], [1]]),
        ([1] * 9, 10, [[0, 1, 2, 3, 4, 5, 6, 7], [8]]),
    ],
)
def test_answers_are_generated_a_few_at_a_time(lengths: list[int], new: int, batches: list[list[int]]) -> None:
    assert evaluate.answer_batches(lengths, new) == batches


@pytest.mark.parametrize(
    ("positions", "new", "context", "room"),
    [(2048, 256, None, 1792), (2048, 256, 512, 512), (128, 256, None, 1), (None, 256, 64, 64)],
)
def test_prompt_and_answer_fit_the_models_positions(
    positions: int | None, new: int, context: int | None, room: int
) -> None:
    assert evaluate.prompt_room(SimpleNamespace(max_position_embeddings=positions), new, context) == room


def test_answers_are_the_same_however_they_are_batched(
    rows: Rows, model: torch.nn.Module, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    compute = Compute(torch.device("cpu"), torch.float32, "cpu")
    prompts = [rows.ids(i)[: 6 + i] for i in range(5)]
    together = evaluate.greedy_answers(model, prompts, tokenizer, compute, 12)
    monkeypatch.setattr(evaluate, "ANSWERED_AT_ONCE", 1)
    assert evaluate.greedy_answers(model, prompts, tokenizer, compute, 12) == together
    assert len(set(together)) > 1
    assert evaluate.greedy_answers(model, prompts, tokenizer, compute, 12, 6) == evaluate.greedy_answers(
        model, [p[-6:] for p in prompts], tokenizer, compute, 12
    )


def test_capped_logits_are_evaluated_in_chunks_and_are_the_models_own(rows: Rows) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    batch = collate(rows, [0, 1, 2], pad_id=0)
    loss = LearnedTokenLoss(model, chunk_bytes=7 * 4 * 400)
    ours = loss(batch) / learned_tokens(batch["labels"])
    assert loss.head_apart
    torch.testing.assert_close(ours, model(**batch).loss, rtol=1e-5, atol=1e-5)
    loss.softcap = None
    assert not torch.allclose(loss(batch) / learned_tokens(batch["labels"]), model(**batch).loss, rtol=1e-2)
