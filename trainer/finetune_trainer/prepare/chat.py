"""The tokenizer, and conversations as text with the spans that are to be learned."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import (
    _alias_reasoning_fields,
    _compile_jinja_template,
    _plain_template_data,
    _render_with_assistant_indices,
)

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.left_out import Shape, left_out, shape_of
from finetune_trainer.prepare.problems import RowProblem
from finetune_trainer.prepare.turns import Message, Tool
from finetune_trainer.text import is_utf8, shorten

FROZEN_NOW = datetime.datetime(2024, 7, 26)
"""What ``strftime_now`` says to templates (Llama 3.1 and later print today's date): its own default where it has no clock.
Else the same rows would be other tokens tomorrow."""
SENTINEL = "\ue000answer\ue001"
SHAPES = 4096
"""Of so many kinds of conversations it is remembered whether the template writes all of them."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it, and where the answers stand in it."""

    text: str
    answers: list[Span]
    """Per assistant turn that may be learned: its characters, with whatever the template writes after it up to the next turn."""


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The model's fast tokenizer. transformers loads it without torch.

    Raises:
        StageError: UnsupportedModel, if it cannot be loaded, has no offsets or no EOS token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"the tokenizer cannot be loaded: {type(error).__name__}: {shorten(str(error), 300)}",
        ) from error
    if not tokenizer.is_fast:
        raise StageError(Reason.UNSUPPORTED_MODEL, f"{type(tokenizer).__name__} has no fast version (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise StageError(Reason.UNSUPPORTED_MODEL, "the tokenizer has no EOS token, so a tuned model would never stop")
    # Rows longer than the model's limit are cut by our rules; the warning per row would only flood the log.
    tokenizer.model_max_length = 10**9
    return tokenizer


def add_new_tokens(tokenizer: Any, new: Sequence[str]) -> None:
    """Give the tokenizer the tokens, in their order, behind all that it has.

    Plain ones, not special: an answer's text keeps them (skip_special_tokens drops special ones). They are found before the text is
    normalized, exactly as they are written.
    """
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])


def chat_template(tokenizer: Any) -> str | None:
    """The template that conversations are rendered with, if there is one."""
    try:
        template = tokenizer.get_chat_template()
    except (ValueError, AttributeError):
        return None
    return str(template) if template else None


class ChatRenderer:
    """Renders conversations and finds what the assistant says in them."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.template = template
        self._marked = bool(GENERATION.search(template))
        self._variables: dict[str, Any] = _plain_template_data(dict(tokenizer.special_tokens_map))
        # transformers 5.23 refuses functions as template variables, so the clock is replaced where the template is kept.
        try:
            compiled = _compile_jinja_template(template)
        except jinja2.TemplateError as error:
            raise StageError(Reason.UNSUPPORTED_MODEL, f"the chat template is broken: {error}") from error
        compiled.environment.globals["strftime_now"] = FROZEN_NOW.strftime
        # A plain dictionary: jinja2 copies them for each rendering, and out of its ChainMap that takes a third of the time.
        compiled.globals = dict(compiled.globals)
        self._compiled = compiled
        self._takes_tools = "tools" in jinja2.meta.find_undeclared_variables(compiled.environment.parse(template))
        self._left_out: dict[tuple[Shape, bool], str] = {}

    def render(self, messages: list[Message], learn_from: int = 0, tools: Sequence[Tool] = ()) -> Rendered:
        """Text and answers of a conversation that ends with an assistant turn.

        Args:
            tools: what may be called.

        Raises:
            RowProblem: if the template refuses the conversation, or drops or changes turns so that answers cannot be found.
        """
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= learn_from]
        messages, tools = _as_templates_see(messages), _plain_template_data(list(tools))
        text, marks = self._text(messages, tools, marked=self._marked)
        self._refuse_left_out(messages, tools)
        if self._marked and marks:
            every = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            if len(marks) == len(every):
                answers = [mark for i, mark in zip(every, marks, strict=True) if i >= learn_from]
                return Rendered(text, answers)
        spans = [self._span(messages, tools, turn, text) for turn in turns]
        found = [span for span in spans if span is not None]
        if len(found) < len(turns):
            lost = next(turn for turn, span in zip(turns, spans, strict=True) if span is None)
            raise RowProblem(
                f"messages[{lost}]: the chat template drops or rewrites this answer, so what is to be learned cannot be found; "
                "use objective.sft.lossOn: All, or a template with {% generation %}"
            )
        return Rendered(text, found)

    def plain(self, messages: list[Message], tools: Sequence[Tool] = ()) -> str:
        """The conversation's text alone."""
        return self._text(_as_templates_see(messages), _plain_template_data(list(tools)))[0]

    def question(self, messages: list[Message], tools: Sequence[Tool] = ()) -> str:
        """The conversation's text and the beginning of an answer: what a model is asked with."""
        return self._text(_as_templates_see(messages), _plain_template_data(list(tools)), prompt=True)[0]

    def _refuse_left_out(self, messages: list[Message], tools: Sequence[Tool]) -> None:
        kind = shape_of(messages), bool(tools)
        if kind not in self._left_out:
            if len(self._left_out) == SHAPES:
                self._left_out.clear()
            try:
                self._left_out[kind] = left_out(messages, lambda marked: self._text(marked, tools)[0])
            except RowProblem:
                # It refuses the marks; the texts themselves it took.
                self._left_out[kind] = ""
        if self._left_out[kind]:
            raise RowProblem(self._left_out[kind])

    def _span(self, messages: list[Message], tools: Sequence[Tool], turn: int, text: str) -> Span | None:
        found = self._by_prefix(messages, tools, turn, text)
        if found is None and tools:
            # Mistral's templates write the tools before the last question, so behind earlier answers.
            found = self._by_prefix(messages, (), turn, text)
        return found or self._by_sentinel(messages, tools, turn, text)

    def _by_prefix(self, messages: list[Message], tools: Sequence[Tool], turn: int, text: str) -> Span | None:
        """An answer starts where the rendering of what comes before it, with the generation prompt, ends: so a model is asked."""
        before = self._question(messages, tools, turn)
        if not before:
            return None
        last = turn == len(messages) - 1
        try:
            through = text if last else self._text(messages[: turn + 1], tools)[0]
        except RowProblem:
            return None
        if through.startswith(before) and text.startswith(through) and len(through) > len(before):
            return len(before), len(through)
        return None

    def _by_sentinel(self, messages: list[Message], tools: Sequence[Tool], turn: int, text: str) -> Span | None:
        """For templates that write earlier turns differently (Qwen 3 drops their thoughts): put a mark in the answer's place;
        what stands before and after the mark must stand there in the whole text too. Calls have no place that a mark shows: they are found
        only where they follow at once on what a model is asked with."""
        mark = {**{k: v for k, v in messages[turn].items() if k != "tool_calls"}, "content": SENTINEL}
        marked = [*messages[:turn], mark, *messages[turn + 1 :]]
        try:
            before, found, after = self._text(marked, tools)[0].partition(SENTINEL)
        except RowProblem:
            return None
        end = len(text) - len(after)
        if (
            not found
            or SENTINEL in after
            or end <= len(before)
            or not (text.startswith(before) and text.endswith(after))
        ):
            return None
        question = self._question(messages, tools, turn)
        if messages[turn].get("tool_calls"):
            return (len(before), end) if before == question else None
        answer = text[len(before) : end].strip()
        # A template may trim an answer or drop its thoughts, never write something else in its place.
        if not answer or answer not in str(messages[turn]["content"]):
            return None
        # What stands between is no model asked with (gpt-oss: a channel).
        return len(question) if question and before.startswith(question) else len(before), end

    def _question(self, messages: list[Message], tools: Sequence[Tool], turn: int) -> str:
        """What a model is asked with for a turn; empty where the template refuses that."""
        if turn == 0:
            return ""
        try:
            return self._text(messages[:turn], tools, prompt=True)[0]
        except RowProblem:
            return ""

    def _text(
        self, messages: list[Message], tools: Sequence[Tool], *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[Span]]:
        if tools and not self._takes_tools:
            raise RowProblem(
                "tools: the chat template has no place for them; take the column out (columns: {tools: none}), or use a model that calls tools"
            )
        try:
            given = {"messages": messages, "tools": tools or None, "documents": None, "add_generation_prompt": prompt}
            if marked:
                text, marks = _render_with_assistant_indices(self._compiled, **given, **self._variables)
            else:
                text, marks = self._compiled.render(**given, **self._variables), []
        except (jinja2.TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            raise RowProblem(
                f"messages: the chat template refuses the conversation: {shorten(str(error), 200)}"
            ) from error
        if not is_utf8(text):
            raise RowProblem(
                "messages: a field beside role and content holds half a character or a byte that is not UTF-8"
            )
        return text, [tuple(mark) for mark in marks]


def _as_templates_see(messages: list[Message]) -> list[Message]:
    """The messages as transformers' render_jinja_template hands them to a template. It does so for every rendering, which takes longer
    than the template itself."""
    plain: list[Message] = _alias_reasoning_fields(_plain_template_data(messages))
    return plain


def end_of_turn_ids(tokenizer: Any) -> frozenset[int]:
    """Special tokens, one of which ends an answer in every common template."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special | set(tokenizer.all_special_ids))


def special_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """The texts that the tokenizer reads as special tokens, wherever they stand."""
    texts = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def tried_renderer(tokenizer: Any, template: str, *, given: bool = False) -> ChatRenderer:
    """A renderer that was tried on a small conversation before any row is blamed. ``given``: the template is the job's, not the model's.

    Raises:
        StageError: UnsupportedModel or InvalidConfig, if the template is broken or fails on the plainest conversation there is.
    """
    try:
        renderer = ChatRenderer(tokenizer, template)
        check_template(renderer)
    except StageError as error:
        if given:
            raise StageError(Reason.INVALID_CONFIG, f"data.chatTemplate: {error.message}") from error
        raise
    return renderer


def check_template(renderer: ChatRenderer) -> None:
    """Try the template on two small conversations before any row is blamed.

    Raises:
        StageError: UnsupportedModel, if it fails on the plainest conversation there is.
    """
    try:
        renderer.render([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}])
    except RowProblem as problem:
        raise StageError(
            Reason.UNSUPPORTED_MODEL, f"the chat template cannot render a user turn with its answer: {problem.text}"
        ) from problem
