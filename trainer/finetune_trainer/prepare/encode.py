"""Token ids and labels: loss only on what should be learned, the end of each answer included."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_api.results import IGNORED
from finetune_api.spec import LossOn, Overlength
from finetune_trainer.prepare.chat import ChatRenderer, Span, end_of_turn_ids
from finetune_trainer.prepare.examples import Completion, Conversation, Example, Text, Tokenized
from finetune_trainer.prepare.problems import RowProblem
from finetune_trainer.prepare.tokens import Ids, Placed, Places, TextTokenizer


@dataclass(frozen=True)
class Encoded:
    """One row as it is trained on. ``ids`` and ``labels`` int32 of equal length; ``length`` is that before truncation."""

    ids: Ids
    labels: Ids
    prompt_tokens: int
    length: int

    @property
    def targets(self) -> int:
        """Learned tokens; the first token is predicted from nothing, so its label never counts."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


class Dropped(Exception):
    """A row that the overlength policy leaves out."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True)
class Asked:
    """A text whose tokens an encoding needs."""

    text: str
    rendered: bool
    """Special tokens stand in the text where they belong; where each token stands is wanted too."""


Answer = Placed | Ids
Encoding = Generator[Asked, Any, Encoded]
"""Asks for a text's tokens, and is sent Placed or Ids."""


class Encoder:
    """Encodes examples with one tokenizer and one policy."""

    def __init__(self, tokenizer: Any, renderer: ChatRenderer | None, loss_on: LossOn) -> None:
        self._tokenize = TextTokenizer(tokenizer)
        self._renderer = renderer
        self._loss_on = loss_on
        ends = np.array(sorted(end_of_turn_ids(tokenizer)), np.int64)
        self._is_end = np.zeros(max(len(tokenizer), int(ends.max()) + 1) + 1, bool)
        """Per token id, whether it ends a turn; the last entry stands for ids beyond the tokenizer's own."""
        self._is_end[ends] = True
        self._eos: int = tokenizer.eos_token_id
        self._eos_text: str = tokenizer.eos_token

    def encode(self, example: Example) -> Encoded:
        """Ids and labels of one example, not truncated.

        Raises:
            RowProblem: if the chat template cannot render it.
        """
        result = self.encode_all([example])[0]
        if isinstance(result, RowProblem):
            raise result
        return result

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded | RowProblem]:
        """The same for several, or why one cannot be encoded. The tokenizer is given many texts at a time, which takes less of it."""
        results: dict[int, Encoded | RowProblem] = {}
        running = {number: self._encoding(example) for number, example in enumerate(examples)}
        answers: dict[int, Answer | None] = dict.fromkeys(running)
        while running:
            asked: dict[int, Asked] = {}
            for number, encoding in running.items():
                try:
                    asked[number] = encoding.send(answers[number])
                except StopIteration as done:
                    results[number] = done.value
                except RowProblem as problem:
                    results[number] = problem
            running = {number: running[number] for number in asked}
            answers = {**self._tokenized(asked)}
        return [results[number] for number in range(len(examples))]

    def _tokenized(self, asked: dict[int, Asked]) -> dict[int, Answer]:
        rendered = {number: item.text for number, item in asked.items() if item.rendered}
        plain = {number: item.text for number, item in asked.items() if not item.rendered}
        # A template writes BOS and EOS itself.
        answers: dict[int, Answer] = dict(zip(rendered, self._tokenize.placed([*rendered.values()]), strict=True))
        answers.update(zip(plain, self._tokenize.ids([*plain.values()], special=True), strict=True))
        return answers

    def _encoding(self, example: Example) -> Encoding:
        """Asks for the tokens of texts, and ends with the row."""
        if isinstance(example, Text):
            ids = self._closed((yield from self._plain(example.text)))
            return _encoded(ids, ids.copy(), 0)
        if isinstance(example, Tokenized):
            return _encoded(np.array(example.ids, np.int32), np.array(example.labels, np.int32), example.prompt_tokens)
        if isinstance(example, Completion):
            return (yield from self._completion(example))
        return (yield from self._conversation(example))

    def _completion(self, example: Completion) -> Encoding:
        prompt = yield from self._plain(example.prompt)
        whole = yield from self._plain(example.prompt + example.completion)
        if len(whole) <= len(prompt) or not np.array_equal(whole[: len(prompt)], prompt):
            # Tokens would span the border, and generation starts behind the prompt's own tokens: so must training.
            answer = yield Asked(example.completion, rendered=True)
            whole = np.concatenate([prompt, answer.ids])
        ids = self._closed(whole)
        labels = ids.copy()
        if self._loss_on is not LossOn.ALL:
            labels[: len(prompt)] = IGNORED
        return _encoded(ids, labels, len(prompt))

    def _conversation(self, example: Conversation) -> Encoding:
        assert self._renderer is not None  # whoever has no template was told so before
        if self._loss_on is LossOn.ALL:
            return (yield from self._whole(self._renderer.plain(example.messages, example.tools)))
        last_only = self._loss_on is LossOn.COMPLETION
        learn_from = len(example.messages) - 1 if last_only else example.learn_from
        rendered = self._renderer.render(example.messages, learn_from, example.tools)
        placed: Placed = yield Asked(rendered.text, rendered=True)
        ids = placed.ids
        prompt_tokens = 0
        labels = np.full_like(ids, IGNORED)
        ended = False
        for span in rendered.answers:
            learned = self._learned(placed, span, rendered.text)
            labels[learned] = ids[learned]
            if len(learned):
                prompt_tokens = int(learned[0])
            ended = bool(len(learned)) and bool(self._ending(ids[learned[-1:]])[0])
        if not ended:
            # The template ends the last answer with nothing: without EOS the tuned model would never stop.
            end = int(np.count_nonzero(placed.starts < rendered.answers[-1][1]))
            ids = np.append(ids[:end], np.int32(self._eos))
            labels = np.append(labels[:end], np.int32(self._eos))
        return _encoded(ids, labels, prompt_tokens)

    def _whole(self, text: str) -> Encoding:
        """A conversation learned from its first token to its last: where the answers stand in it need not be found."""
        placed: Placed = yield Asked(text, rendered=True)
        ids, starts, ends = placed.ids, placed.starts, placed.ends
        written = next((i for i in reversed(range(len(ids))) if text[starts[i] : ends[i]].strip()), None)
        if written is None or not self._ending(ids[written : written + 1])[0]:
            ids = np.append(ids, np.int32(self._eos))
        return _encoded(ids, ids.copy(), 0)

    def _learned(self, placed: Placed, span: Span, text: str) -> Places:
        """Indices of an answer's tokens through the token that ends it; a token that begins before the answer is prompt.

        A template that marks answers may leave the ending out of the mark: a special token that follows at once is the ending. Special tokens
        may stand in an answer too (calls, channels): one ends it only where nothing but blanks comes behind.
        """
        ids, starts, ends_at = placed.ids, placed.starts, placed.ends
        inside = np.flatnonzero((starts >= span[0]) & (ends_at <= span[1]) & (ends_at > starts))
        if not len(inside):
            return inside
        ends = inside[self._ending(ids[inside])]
        if len(ends) and not text[ends_at[ends[-1]] : span[1]].strip():
            return np.asarray(inside[inside <= ends[-1]])
        following = int(inside[-1]) + 1
        if self._ending(ids[following : following + 1]).any():
            return np.append(inside, following)
        return inside

    def _ending(self, ids: Ids) -> npt.NDArray[np.bool_]:
        return np.asarray(self._is_end[np.minimum(ids, len(self._is_end) - 1)])

    def _plain(self, text: str) -> Generator[Asked, Any, Ids]:
        """With BOS where the tokenizer adds one, and without EOS."""
        ids: Ids = yield Asked(text, rendered=False)
        return ids[:-1] if len(ids) and ids[-1] == self._eos and not text.endswith(self._eos_text) else ids

    def _closed(self, ids: Ids) -> Ids:
        return ids if len(ids) and ids[-1] == self._eos else np.append(ids, np.int32(self._eos))


def fit(encoded: Encoded, limit: int, policy: Overlength) -> Encoded:
    """Apply data.checks.overlength to a row, and refuse a row with nothing to learn.

    Raises:
        RowProblem: policy Fail; or nothing to learn at any length.
        Dropped: policy Drop; or Truncate, where the prompt alone fills the limit.
    """
    if encoded.length <= limit:
        if not encoded.targets:
            raise RowProblem("nothing to learn: no token of the row counts")
        return encoded
    if policy is Overlength.FAIL:
        raise RowProblem(
            f"{encoded.length:,} tokens: expected at most {limit:,} (training.maxSequenceTokens; data.checks.overlength: Fail)"
        )
    if policy is Overlength.DROP:
        raise Dropped(f"{encoded.length:,} tokens, more than {limit:,}")
    cut = Encoded(encoded.ids[:limit], encoded.labels[:limit], min(encoded.prompt_tokens, limit), encoded.length)
    if not cut.targets:
        raise Dropped(f"nothing left to learn within {limit:,} tokens: the prompt alone has {encoded.prompt_tokens:,}")
    return cut


def _encoded(ids: Ids, labels: Ids, prompt_tokens: int) -> Encoded:
    return Encoded(ids, labels, prompt_tokens, len(ids))
