"""From a row of any format to an example: a conversation, a prompt with its completion, a text, or tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.results import IGNORED
from finetune_api.spec import DataFormat
from finetune_trainer.prepare.problems import RowProblem, expected
from finetune_trainer.prepare.turns import (
    Message,
    Tool,
    ends_with_answer,
    messages_of,
    sharegpt_turns,
    system_of,
    text_of,
    tools_of,
)

FIELDS: dict[DataFormat, tuple[tuple[str, ...], tuple[str, ...]]] = {
    DataFormat.MESSAGES: (("messages",), ("tools",)),
    DataFormat.SHAREGPT: (("conversations",), ("system", "tools")),
    DataFormat.PROMPT_COMPLETION: (("prompt", "completion"), ("system", "tools")),
    DataFormat.ALPACA: (("instruction", "output"), ("input", "system")),
    DataFormat.TEXT: (("text",), ()),
    DataFormat.TOKENIZED: (("input_ids",), ("labels", "attention_mask")),
}
"""Required and optional fields per format, in the order in which they are looked for."""
ALL_FIELDS = sorted({f for required, optional in FIELDS.values() for f in required + optional})

# Stanford Alpaca, train.py (Taori et al., 2023): for models without a chat template.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Conversation:
    """Messages; the turns from ``learn_from`` on may be learned (0: all)."""

    messages: list[Message]
    learn_from: int = 0
    tools: list[Tool] = field(default_factory=list)
    """What may be called, for the chat template."""

    @property
    def prompt(self) -> str:
        """What a person would see as the question: the last user message before the last answer."""
        users = [m["content"] for m in self.messages[:-1] if m["role"] == "user"]
        return users[-1] if users else ""

    @property
    def group(self) -> str:
        """What must not stand on both sides of the split: all turns before the last answer, but for system messages,
        which many datasets vary or repeat while the question stays the same."""
        turns = [f"{m['role']}: {m['content']}" for m in self.messages[:-1] if m["role"] not in ("system", "developer")]
        return "\n".join(turns)

    @property
    def reference(self) -> str:
        """The last answer."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class Completion:
    """Plain texts: no chat template."""

    prompt: str
    completion: str

    @property
    def group(self) -> str:
        """The prompt."""
        return self.prompt

    @property
    def reference(self) -> str:
        """The completion."""
        return self.completion


@dataclass(frozen=True)
class Text:
    """A text, learned whole."""

    text: str

    @property
    def group(self) -> str:
        """The text itself."""
        return self.text


@dataclass(frozen=True)
class Tokenized:
    """Token ids, and for each what is learned there: itself or IGNORED."""

    ids: list[int]
    labels: list[int]

    @property
    def prompt_tokens(self) -> int:
        """How many come before the last stretch that is learned."""
        position = len(self.labels)
        while position and self.labels[position - 1] == IGNORED:
            position -= 1
        while position and self.labels[position - 1] != IGNORED:
            position -= 1
        return position

    @property
    def group(self) -> str:
        """What comes before the last answer; all, where all is learned."""
        return " ".join(map(str, self.ids[: self.prompt_tokens] or self.ids))


Example = Conversation | Completion | Text | Tokenized


def to_example(row: Mapping[str, Any], fmt: DataFormat, columns: Mapping[str, str], has_template: bool) -> Example:
    """Check a row and bring it into the common form.

    Raises:
        RowProblem: naming the column as it is called in the file.
    """
    required, _ = FIELDS[fmt]
    for needed in required:
        if columns.get(needed, needed) not in row:
            raise RowProblem(
                f"{columns.get(needed, needed)}: missing; the row has {', '.join(map(str, row)) or 'no columns'}"
            )

    def name(of: str) -> str:
        return columns.get(of, of)

    def optional(of: str) -> str:
        value = row.get(name(of))
        return "" if value is None else text_of(value, name(of), may_be_empty=True)

    def tools() -> list[Tool]:
        return tools_of(row.get(name("tools")), name("tools"))

    match fmt:
        case DataFormat.MESSAGES:
            messages = messages_of(row[name("messages")], name("messages"))
            return Conversation(ends_with_answer(messages, name("messages")), tools=tools())
        case DataFormat.SHAREGPT:
            turns = sharegpt_turns(row[name("conversations")], name("conversations"))
            head = [] if turns[0]["role"] == "system" else system_of(optional("system"))
            return Conversation(ends_with_answer([*head, *turns], name("conversations")), tools=tools())
        case DataFormat.PROMPT_COMPLETION:
            return _prompt_completion(row, name("prompt"), name("completion"), optional("system"), tools)
        case DataFormat.TOKENIZED:
            return _tokenized(row, name("input_ids"), name("labels"), name("attention_mask"))
        case DataFormat.TEXT:
            return Text(text_of(row[name("text")], name("text")))
    instruction = text_of(row[name("instruction")], name("instruction"))
    given, system = optional("input"), optional("system")
    output = text_of(row[name("output")], name("output"))
    if not has_template:
        template = ALPACA_WITH_INPUT if given.strip() else ALPACA
        return Completion(template.format(instruction=instruction, input=given), output)
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    return Conversation(
        [*system_of(system), {"role": "user", "content": question}, {"role": "assistant", "content": output}]
    )


def _prompt_completion(
    row: Mapping[str, Any], prompt: str, completion: str, system: str, tools: Callable[[], list[Tool]]
) -> Conversation | Completion:
    chat = [isinstance(row[column], list) for column in (prompt, completion)]
    if all(chat):
        before = messages_of(row[prompt], prompt)
        after = ends_with_answer(messages_of(row[completion], completion), completion)
        head = [] if before[0]["role"] == "system" else system_of(system)
        return Conversation([*head, *before, *after], learn_from=len(head) + len(before), tools=tools())
    if any(chat):
        raise RowProblem(f"{prompt}, {completion}: expected two texts or two lists of messages, found one of each")
    asked = text_of(row[prompt], prompt)
    return Completion(f"{system}\n\n{asked}" if system.strip() else asked, text_of(row[completion], completion))


def _tokenized(row: Mapping[str, Any], ids_name: str, labels_name: str, mask_name: str) -> Tokenized:
    tokens = _integers(row[ids_name], ids_name, least=0)
    columns = {}
    for name, least in ((labels_name, IGNORED), (mask_name, 0)):
        columns[name] = tokens if row.get(name) is None else _integers(row[name], name, least=least)
        if len(columns[name]) != len(tokens):
            raise RowProblem(f"{name}: expected as many as {ids_name} ({len(tokens)}), found {len(columns[name])}")
    learned = columns[labels_name]
    if row.get(mask_name) is not None:  # what is masked is padding
        kept = [position for position, seen in enumerate(columns[mask_name]) if seen]
        tokens, learned = [tokens[i] for i in kept], [learned[i] for i in kept]
        if not tokens:
            raise RowProblem(f"{mask_name}: expected at least one token that is not masked, found none")
    for position, (token, label) in enumerate(zip(tokens, learned, strict=True)):
        if label not in (token, IGNORED):
            raise RowProblem(
                f"{labels_name}[{position}]: expected {IGNORED} or the token itself ({token}), found {label}; "
                "labels are not to be shifted, training does that"
            )
    return Tokenized(tokens, learned)


def _integers(value: object, where: str, least: int) -> list[int]:
    if not isinstance(value, list) or not value:
        raise expected(where, "a list of token ids", value)
    for position, item in enumerate(value):
        if type(item) is not int or not least <= item < 1 << 31:
            raise expected(f"{where}[{position}]", "a token id", item)
    return value
