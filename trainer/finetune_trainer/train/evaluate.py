"""What a model knows about the held-out rows, and what it answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from finetune_api.answering import prompt_room
from finetune_api.planner.plan import ANSWER_TOKENS, ANSWERED_AT_ONCE, EVALUATION_TOKENS
from finetune_api.results import IGNORED
from finetune_trainer import heartbeat
from finetune_trainer.train.device import Compute
from finetune_trainer.train.held_out_curve import evaluation_line, perplexity
from finetune_trainer.train.loss import LearnedTokenLoss
from finetune_trainer.train.rows import Rows, batches_by_length, collate
from finetune_trainer.train.stop import TrainingStopped

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": EVALUATION_TOKENS}
"""Most tokens of a batch, where its logits allow (see LearnedTokenLoss.batch_tokens)."""


@dataclass(frozen=True)
class HeldOutLoss:
    """NLL and learned tokens of each held-out row. Sums are in float64, so the order of rows and batches does not show."""

    nll: list[float]
    tokens: list[int]
    right: list[int] | None = None
    """How many of the tokens are the most likely ones; unknown of what an older image measured."""

    @property
    def loss(self) -> float:
        """Σ NLL / Σ tokens."""
        return math.fsum(self.nll) / max(1, sum(self.tokens))

    def first(self, rows: int) -> float:
        """Σ NLL / Σ tokens of the first ``rows`` rows."""
        return math.fsum(self.nll[:rows]) / max(1, sum(self.tokens[:rows]))

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def token_accuracy(self) -> float | None:
        """Σ right / Σ tokens."""
        return None if self.right is None else sum(self.right) / max(1, sum(self.tokens))

    def line(self, step: int) -> dict[str, Any]:
        """Of ``reports/metrics.jsonl``."""
        return evaluation_line(step, self.loss, self.token_accuracy)


def never() -> bool:
    """Go on."""
    return False


def held_out_loss(
    causal_lm: Any,
    rows: Rows,
    pad_id: int,
    compute: Compute,
    tokens_per_batch: int | None = None,
    divisor: int = 1,
    stopped: Callable[[], bool] = never,
) -> HeldOutLoss:
    """Evaluate every row once. It does not depend on how rows are batched, beyond rounding: ``divisor`` makes batches smaller.

    Raises:
        TrainingStopped: ``stopped`` said so between two batches.
    """
    loss = LearnedTokenLoss(causal_lm)
    nll, tokens, right = [0.0] * len(rows), [0] * len(rows), [0] * len(rows)
    with inference(causal_lm), compute.autocast():
        sample = torch.tensor([rows.ids(0)], device=compute.device)
        budget = loss.batch_tokens(sample, tokens_per_batch or TOKENS_PER_BATCH[compute.device.type] // divisor)
        for indices in batches_by_length(rows, budget):
            heartbeat.beat()
            if stopped():
                raise TrainingStopped
            batch = {k: v.to(compute.device) for k, v in collate(rows, indices, pad_id).items()}
            counts = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
            for index, part in zip(indices, torch.split(loss.nll_and_right(batch), counts), strict=True):
                nll[index], found = part.double().sum(0).tolist()
                tokens[index], right[index] = len(part), int(found)
    return HeldOutLoss(nll, tokens, right)


def greedy_answers(
    causal_lm: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    compute: Compute,
    max_new_tokens: int,
    context_tokens: int | None = None,
    divisor: int = 1,
    all_say: Callable[[bool], bool] | None = None,
) -> list[str]:
    """The most likely continuation of each prompt, up to an end token, as text without white space around.

    Args:
        all_say: where several ranks compute this together, whether all say so: each must call the model as often as the others.
    """
    tokens = greedy_tokens(causal_lm, prompts, tokenizer, compute, max_new_tokens, context_tokens, divisor, all_say)
    return [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in tokens]


def greedy_tokens(
    causal_lm: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    compute: Compute,
    max_new_tokens: int,
    context_tokens: int | None = None,
    divisor: int = 1,
    all_say: Callable[[bool], bool] | None = None,
    until: Sequence[str] = (),
) -> list[list[int]]:
    """The same as tokens, without the end token.

    Args:
        until: one of these in an answer ends it, too; what was said with it, or after it, is not cut off here.
    """
    positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    context = prompt_room(positions, max_new_tokens, context_tokens)
    given = [list(p)[-context:] for p in prompts]
    cut = sum(len(g) < len(p) for g, p in zip(given, prompts, strict=True))
    if cut:
        log.warning(
            "%d of %d prompts are longer than %d tokens: their beginning is left out", cut, len(prompts), context
        )
    answers: list[list[int]] = [[]] * len(given)
    for indices in answer_batches([len(g) for g in given], max_new_tokens, divisor):
        heartbeat.beat()
        found = _continue(causal_lm, [given[i] for i in indices], tokenizer, compute, max_new_tokens, all_say, until)
        for index, answer in zip(indices, found, strict=True):
            answers[index] = answer
    return answers


def answer_batches(lengths: Sequence[int], max_new_tokens: int, divisor: int = 1) -> list[list[int]]:
    """Prompts by like length, at most ANSWERED_AT_ONCE together and ANSWER_TOKENS with padding and answers (at least one)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first of a batch is its longest.
        fits = (
            batches and (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + max_new_tokens) <= ANSWER_TOKENS // divisor
        )
        if fits and len(batches[-1]) < max(1, ANSWERED_AT_ONCE // divisor):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _continue(
    causal_lm: Any,
    prompts: list[list[int]],
    tokenizer: Any,
    compute: Compute,
    max_new_tokens: int,
    all_say: Callable[[bool], bool] | None,
    until: Sequence[str],
) -> list[list[int]]:
    """One batch, padded on the left."""
    ends = end_token_ids(causal_lm, tokenizer)
    longest = max(len(p) for p in prompts)
    pad = pad_token_id(tokenizer)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=compute.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=compute.device)
    with inference(causal_lm), compute.autocast():
        out = causal_lm.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # Greedy: a model's own sampling defaults would only cause warnings.
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=pad,
            # No row ends by itself where ranks must end together.
            eos_token_id=ends if all_say is None else [causal_lm.get_output_embeddings().weight.shape[0]],
            stopping_criteria=StoppingCriteriaList(
                [EachToken(ends, longest, all_say), Said(until, tokenizer, longest)]
            ),
            use_cache=True,
        )
    answers = [line[longest:].tolist() for line in out]
    return [a[: min((a.index(e) for e in ends if e in a), default=len(a))] for a in answers]


class EachToken(StoppingCriteria):  # type: ignore[misc]
    """A sign of life for each token of an answer; and where several ranks answer together, they stop together."""

    def __init__(self, ends: Sequence[int], prompt_tokens: int, all_say: Callable[[bool], bool] | None) -> None:
        self._ends, self._prompt_tokens, self._all_say = set(ends), prompt_tokens, all_say

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002 - transformers'
        """Per row, whether it is done."""
        heartbeat.beat()
        done = False
        if self._all_say is not None:
            rows = input_ids[:, self._prompt_tokens :].tolist()
            done = self._all_say(all(self._ends.intersection(row) for row in rows))
        return torch.full((len(input_ids),), done, device=input_ids.device)


class Said(StoppingCriteria):  # type: ignore[misc]
    """Ends a row in which one of some texts was said. (transformers' own reads the whole vocabulary first.)"""

    def __init__(self, until: Sequence[str], tokenizer: Any, prompt_tokens: int) -> None:
        self._until = [text for text in until if text]
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        # No token is shorter than a byte: what ends now began among so many.
        self._tokens = 1 + max((len(text.encode()) for text in self._until), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002 - transformers'
        """Per row, whether it is done."""
        done = [False] * len(input_ids)
        if self._until:
            said = input_ids[:, self._prompt_tokens :][:, -self._tokens :].tolist()
            texts = self._tokenizer.batch_decode(said, skip_special_tokens=True)
            done = [any(stop in text for stop in self._until) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def pad_token_id(tokenizer: Any) -> int:
    """Any id serves, as padding is masked; the tokenizer's own keeps logs readable."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def end_token_ids(causal_lm: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those of the generation config."""
    configured = causal_lm.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None})


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout) without gradients; afterwards the model is as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
