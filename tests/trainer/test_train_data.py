"""The data schedule, batches, and the loss over learned tokens."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    masking_utils,
)

from finetune_api.answering import prompt_room
from finetune_api.spec import Length
from finetune_trainer.train import evaluate
from finetune_trainer.train.device import Compute
from finetune_trainer.train.loss import LearnedTokenLoss, learned_tokens
from finetune_trainer.train.micro_batches import MicroBatches, PackedMicroBatches
from finetune_trainer.train.packing import collate_packed, keeps_rows_apart, pack
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.rows import IGNORED, Batch, Rows, batches_by_length, collate
from finetune_trainer.train.schedule import make_schedule
from tests.support.prepared import encode, questions, table

CPU = Compute(torch.device("cpu"), torch.float32, "cpu")


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


@pytest.mark.parametrize("kind", [MicroBatches, PackedMicroBatches])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_steps_do_not_depend_on_how_they_are_cut(rows: Rows, kind: type[MicroBatches], size: int, ranks: int) -> None:
    """Each step has its rows once, whatever the micro-batch, the ranks and packing; and all ranks have as many micro-batches."""
    schedule = make_schedule(len(rows), Length(epochs=2.5), 8, seed=3)
    made = [list(kind(schedule, rows, size, 0, Ranks(rank, ranks))) for rank in range(ranks)]
    counts = [len(kind(schedule, rows, size, 0, Ranks(rank, ranks))) for rank in range(ranks)]
    assert {len(m) for m in made} == set(counts)
    per_step = math.ceil(8 / (size * ranks))
    for step in range(schedule.steps):
        together = [m[step * per_step : (step + 1) * per_step] for m in made]
        seen = [i for own in together for batch in own for i in flat(batch)]
        assert Counter(seen) == Counter(schedule.step_rows(step))


def flat(batch: Any) -> list[int]:
    return [i for part in batch or [] for i in (part if isinstance(part, list) else [part])]


def test_rows_of_like_length_share_a_micro_batch(rows: Rows) -> None:
    schedule = make_schedule(len(rows), Length(epochs=1), len(rows), seed=3)
    [*batches] = MicroBatches(schedule, rows, 3, 0, Ranks())
    lengths = [[rows.length(i) for i in batch] for batch in batches]
    assert [n for batch in lengths for n in batch] == sorted((rows.length(i) for i in range(len(rows))), reverse=True)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 90), st.integers(1, 9))
def test_packing_keeps_every_row_within_the_capacity(lengths: list[int], capacity: int, together: int) -> None:
    ids = list(range(100, 100 + len(lengths)))
    packed = pack(ids, lengths, capacity, together)
    assert sorted(i for batch in packed for sequence in batch for i in sequence) == ids
    assert all(len(batch) == together for batch in packed)
    assert max(sum(lengths[i - 100] for i in sequence) for batch in packed for sequence in batch) <= capacity
    assert math.ceil(sum(lengths) / (capacity * together)) <= len(packed) <= math.ceil(len(ids) / together)


def test_short_rows_need_fewer_micro_batches() -> None:
    assert len(pack(list(range(16)), [100] * 15 + [800], 800, 1)) == 3
    assert [len(s) for [s] in pack(list(range(16)), [100] * 16, 800, 1)] == [8, 8], "evenly"


FAMILIES = {
    "llama": LlamaConfig(num_key_value_heads=2),
    "mistral": MistralConfig(num_key_value_heads=2, sliding_window=16),
    "qwen2": Qwen2Config(num_key_value_heads=2),
    "gemma2": Gemma2Config(num_key_value_heads=2, head_dim=16, sliding_window=16),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "neox": GPTNeoXConfig(),
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def family(name: str, rows: Rows) -> Any:
    config = FAMILIES[name]
    config.update({"vocab_size": 1 + max(i for n in range(len(rows)) for i in rows.ids(n))})
    if name != "gpt2":
        config.update(SIZES)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_have_the_loss_and_the_gradient_of_rows_alone(rows: Rows, name: str) -> None:
    """Also with the longest first token learned, and beside a shorter sequence that is padded."""
    causal_lm = family(name, rows)
    assert keeps_rows_apart(causal_lm, rows, CPU)
    packed = collate_packed(rows, [[3, 0, 5], [4, 1]], pad_id=2)
    results = []
    for batches in ([collate(rows, [i], pad_id=2) for i in (3, 0, 5, 4, 1)], [packed]):
        causal_lm.zero_grad()
        total = sum(LearnedTokenLoss(causal_lm)(batch) for batch in batches)
        assert isinstance(total, torch.Tensor)
        total.backward()
        results.append((total.detach(), causal_lm.get_input_embeddings().weight.grad.clone()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert learned_tokens(packed["labels"]) == sum(rows.learned_tokens(i) for i in (3, 0, 5, 4, 1))


def test_a_model_that_mixes_packed_rows_is_found_out(rows: Rows) -> None:
    """One that takes no positions, one that has its own (ALiBi), and one whose attention looks at all rows before."""
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=400, hidden_size=64, n_layer=2, n_head=4)).eval()
    assert not keeps_rows_apart(bloom, rows, CPU)
    alibi = FalconConfig(vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    assert not keeps_rows_apart(AutoModelForCausalLM.from_config(alibi).eval(), rows, CPU)
    llama = family("llama", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
        assert not keeps_rows_apart(llama, rows, CPU)
    assert keeps_rows_apart(llama, Rows(rows.table.slice(0, 1)), CPU), "one row is enough to try it"


def test_what_is_left_over_is_no_batch_and_an_empty_share_is_one(rows: Rows) -> None:
    cut = PackedMicroBatches(make_schedule(len(rows), Length(epochs=1), 8, 0), rows, 1, 0, Ranks())
    assert cut.collate(None, 0)["input_ids"].numel() == 0
    batch = cut.collate([], 0)
    assert batch["input_ids"].shape == (1, 2)
    assert learned_tokens(batch["labels"]) == 0


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


def plain_right(model: torch.nn.Module, batch: Batch) -> list[bool]:
    """Of each learned token, whether it is the model's first choice, by the model's own forward."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    places = [(i, j) for i, line in enumerate(labels.tolist()) for j in range(1, len(line)) if line[j] != IGNORED]
    return [int(logits[i, j - 1].argmax()) == int(labels[i, j]) for i, j in places]


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 7 * 4 * 400])
@torch.no_grad()
def test_right_tokens_are_the_models_first_choices(
    rows: Rows, model: torch.nn.Module, tiny_model: Path, chunk_bytes: int
) -> None:
    batch = collate(rows, list(range(12)), pad_id=0)
    # A random model is hardly ever right: let some of the tokens be what it would say.
    said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    batch["labels"][:, 1::2] = torch.where(batch["labels"][:, 1::2] != IGNORED, said[:, :-1][:, ::2], IGNORED)
    expected = plain_right(model, batch)
    assert 0.2 < sum(expected) / len(expected) < 0.8
    loss = LearnedTokenLoss(model, chunk_bytes)
    nll, right = loss.nll_and_right(batch).unbind(1)
    assert right.bool().tolist() == expected
    torch.testing.assert_close(nll, loss.per_token(batch))
    scaled = LearnedTokenLoss(
        Scaled(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)), chunk_bytes
    )
    assert scaled.nll_and_right(batch)[:, 1].bool().tolist() == expected, "and where logits are changed after the head"
    assert not scaled.head_apart


@torch.no_grad()
def test_token_accuracy_is_a_share_of_all_learned_tokens_and_needs_no_other_pass(
    rows: Rows, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = evaluate.HeldOutLoss([1.0, 2.0], [1, 9], [1, 0])
    assert measured.token_accuracy == 0.1, "not the mean of 1 and 0"
    assert measured.line(7) == {"step": 7, "held_out_loss": 0.3, "perplexity": math.exp(0.3), "token_accuracy": 0.1}
    assert evaluate.HeldOutLoss([1.0, 2.0], [1, 9]).line(7) == {
        "step": 7,
        "held_out_loss": 0.3,
        "perplexity": math.exp(0.3),
    }
    seen: list[int] = []
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_hook(lambda *args: seen.append(args[2].shape[:-1].numel()))
    compute = Compute(torch.device("cpu"), torch.float32, "test")
    found = evaluate.held_out_loss(model, rows, 0, compute)
    hook.remove()
    assert sum(seen) == sum(found.tokens) + 2 * 8, (
        "the learned tokens once, and the trial of whether the head stands apart"
    )


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
    assert prompt_room(positions, new, context) == room


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
