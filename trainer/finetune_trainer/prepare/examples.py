"""From a row of any format to an example: a conversation, a prompt with its completion, or a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.spec import DataFormat
from finetune_trainer.prepare.problems import RowProblem, expected

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS: dict[DataFormat, tuple[tuple[str, ...], tuple[str, ...]]] = {
    DataFormat.MESSAGES: (("messages",), ()),
    DataFormat.PROMPT_COMPLETION: (("prompt", "completion"), ("system",)),
    DataFormat.ALPACA: (("instruction", "output"), ("input", "system")),
    DataFormat.TEXT: (("text",), ()),
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


Example = Conversation | Completion | Text


def to_example(row: Mapping[str, Any], fmt: DataFormat, columns: Mapping[str, str], has_template: bool) -> Example:
    """Check a row and bring it into the common form.

    Raises:
        RowProblem: naming the column as it is called in the file.
    """
    required, _ = FIELDS[fmt]
    for field in required:
        if columns.get(field, field) not in row:
            raise RowProblem(
                f"{columns.get(field, field)}: missing; the row has {', '.join(map(str, row)) or 'no columns'}"
            )

    def name(field: str) -> str:
        return columns.get(field, field)

    def text(field: str) -> str:
        return _text(row[name(field)], name(field))

    def optional(field: str) -> str:
        value = row.get(name(field))
        return "" if value is None else _text(value, name(field), may_be_empty=True)

    if fmt is DataFormat.MESSAGES:
        messages = _messages(row[name("messages")], name("messages"))
        return Conversation(_ends_with_answer(messages, name("messages")))
    if fmt is DataFormat.PROMPT_COMPLETION:
        return _prompt_completion(row, name("prompt"), name("completion"), optional("system"))
    if fmt is DataFormat.TEXT:
        return Text(text("text"))
    instruction, given, output, system = text("instruction"), optional("input"), text("output"), optional("system")
    if not has_template:
        template = ALPACA_WITH_INPUT if given.strip() else ALPACA
        return Completion(template.format(instruction=instruction, input=given), output)
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    return Conversation(
        [*_system(system), {"role": "user", "content": question}, {"role": "assistant", "content": output}]
    )


def _prompt_completion(row: Mapping[str, Any], prompt: str, completion: str, system: str) -> Example:
    chat = [isinstance(row[column], list) for column in (prompt, completion)]
    if all(chat):
        before = _messages(row[prompt], prompt)
        after = _ends_with_answer(_messages(row[completion], completion), completion)
        head = [] if before[0]["role"] == "system" else _system(system)
        return Conversation([*head, *before, *after], learn_from=len(head) + len(before))
    if any(chat):
        raise RowProblem(f"{prompt}, {completion}: expected two texts or two lists of messages, found one of each")
    asked = _text(row[prompt], prompt)
    return Completion(f"{system}\n\n{asked}" if system.strip() else asked, _text(row[completion], completion))


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text.strip() else []


def _messages(value: object, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise expected(where, "a list of messages", value)
    if not value:
        raise expected(where, "at least one message", value)
    return [_message(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise expected(where, "an object with role and content", value)
    if "role" not in value:
        hint = " (ShareGPT's from/value? rename them to role/content)" if "from" in value else ""
        raise RowProblem(f"{where}.role: missing; the message has {', '.join(map(str, value)) or 'no fields'}{hint}")
    role = value["role"]
    if role not in ROLES:
        raise expected(f"{where}.role", f"one of {', '.join(ROLES)}", role)
    # Parquet fills absent fields with null; templates would print them.
    message = {k: v for k, v in value.items() if v is not None and k not in ("role", "content")}
    calls = message.get("tool_calls")
    content = value.get("content")
    if content is None and role == "assistant" and calls:
        content = ""
    elif "content" not in value:
        raise RowProblem(f"{where}.content: missing; the message has {', '.join(map(str, value))}")
    else:
        content = _content(content, f"{where}.content", may_be_empty=role in ("system", "tool") or bool(calls))
    return {"role": role, "content": content, **message}


def _content(value: object, where: str, may_be_empty: bool) -> str:
    """A text, or the texts of a list of parts."""
    if not isinstance(value, list):
        return _text(value, where, may_be_empty=may_be_empty)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            raise expected(
                f"{where}[{index}]", "a part of type text", part.get("type") if isinstance(part, dict) else part
            )
        texts.append(_text(part.get("text"), f"{where}[{index}].text", may_be_empty=True))
    return _text("".join(texts), where, may_be_empty=may_be_empty)


def _ends_with_answer(messages: list[Message], where: str) -> list[Message]:
    if messages[-1]["role"] != "assistant":
        raise RowProblem(f'{where}: last turn is "{messages[-1]["role"]}", nothing to learn')
    return messages


def _text(value: object, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise expected(where, "text", value)
    if not may_be_empty and not value.strip():
        raise expected(where, "text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = ord(value[error.start])
        what = (
            f"a byte that is not UTF-8 (0x{bad - 0xDC00:02x})"
            if 0xDC80 <= bad <= 0xDCFF
            else f"half a character (\\u{bad:04x})"
        )
        raise RowProblem(f"{where}: expected text, found {what} at position {error.start + 1}") from None
    return value
