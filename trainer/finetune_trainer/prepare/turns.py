"""The turns of a conversation and the tools it may call, as OpenAI's and as ShareGPT's files have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune_trainer.prepare.problems import RowProblem, expected

Message = dict[str, Any]
Tool = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
"""Whom ``from`` names: the first ShareGPT datasets' words, and those that axolotl and LLaMA-Factory read."""


def messages_of(value: object, where: str) -> list[Message]:
    """A list of ``{role, content}``.

    Raises:
        RowProblem.
    """
    return [_message(item, f"{where}[{index}]") for index, item in enumerate(_turns(value, where))]


def sharegpt_turns(value: object, where: str) -> list[Message]:
    """A list of ``{from, value}`` as messages; turns that have role and content are taken as they are.

    Raises:
        RowProblem.
    """
    return [_sharegpt_turn(item, f"{where}[{index}]") for index, item in enumerate(_turns(value, where))]


def ends_with_answer(messages: list[Message], where: str) -> list[Message]:
    """The messages, if there is something to learn at their end.

    Raises:
        RowProblem: the last turn is not the assistant's.
    """
    if messages[-1]["role"] != "assistant":
        raise RowProblem(f'{where}: last turn is "{messages[-1]["role"]}", nothing to learn')
    return messages


def alternates(messages: list[Message]) -> bool:
    """Whether user and assistant take turns, the user first; results of calls stand between two answers, and system messages at the
    head only."""
    before = ""
    for message in messages:
        role = message["role"]
        match role:
            case "system" | "developer":
                fits = before in ("", role)
            case "user":
                fits = before != "user"
            case "tool":
                fits = before in ("assistant", "tool")
            case _:
                fits = before in ("user", "tool")
        if not fits:
            return False
        before = role
    return True


def tools_of(value: object, where: str) -> list[Tool]:
    """Descriptions of functions (JSON schemas), given as a list or as the JSON text of one.

    Raises:
        RowProblem.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        value = _json(value, where, "a list of tools")
    if value is None:
        return []
    if not isinstance(value, list):
        raise expected(where, "a list of tools", value)
    for index, tool in enumerate(value):
        if not isinstance(tool, dict) or not (tool.get("name") or isinstance(tool.get("function"), dict)):
            raise expected(f"{where}[{index}]", "a tool: an object with a function", tool)
    return [without_nulls(tool) for tool in value]


def system_of(text: str) -> list[Message]:
    """A system message, unless it would be empty."""
    return [{"role": "system", "content": text}] if text.strip() else []


def text_of(value: object, where: str, *, may_be_empty: bool = False) -> str:
    """A text that can be tokenised.

    Raises:
        RowProblem.
    """
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


def without_nulls(value: Any) -> Any:
    """The same without fields that are null: Parquet gives every object all fields that one of them has."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _turns(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise expected(where, "a list of messages", value)
    if not value:
        raise expected(where, "at least one message", value)
    return value


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise expected(where, "an object with role and content", value)
    if "role" not in value:
        hint = ""
        if "from" in value:
            column = where.partition("[")[0]
            hint = f" (from and value are ShareGPT's: set format: ShareGPT and columns: {{conversations: {column}}})"
        raise RowProblem(f"{where}.role: missing; the message has {', '.join(map(str, value)) or 'no fields'}{hint}")
    role = value["role"]
    if role not in ROLES:
        raise expected(f"{where}.role", f"one of {', '.join(ROLES)}", role)
    # Parquet fills absent fields with null; templates would print them.
    message = {k: v for k, v in value.items() if v is not None and k not in ("role", "content")}
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    content = value.get("content")
    if content is None and role == "assistant" and calls:
        content = ""
    elif "content" not in value:
        raise RowProblem(f"{where}.content: missing; the message has {', '.join(map(str, value))}")
    else:
        content = _content(content, f"{where}.content", may_be_empty=role in ("system", "tool") or bool(calls))
    return {"role": role, "content": content, **message}


def _sharegpt_turn(value: object, where: str) -> Message:
    if isinstance(value, dict) and "role" in value:
        return _message(value, where)
    if not isinstance(value, dict) or "from" not in value:
        raise expected(where, "an object with from and value", value)
    speaker = value["from"]
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise expected(f"{where}.from", f"one of {', '.join(SHAREGPT_ROLES)}", speaker)
    if "value" not in value:
        raise RowProblem(f"{where}.value: missing; the turn has {', '.join(map(str, value))}")
    text = text_of(value["value"], f"{where}.value", may_be_empty=role in ("system", "tool"))
    if speaker != "function_call":
        return {"role": role, "content": text}
    called = _json(text, f"{where}.value", "a function call, an object with name and arguments")
    calls = _tool_calls(called if isinstance(called, list) else [called], f"{where}.value")
    return {"role": role, "content": "", "tool_calls": calls}


def _tool_calls(value: object, where: str) -> list[Message]:
    """Calls whose arguments are an object: OpenAI's files have them as JSON text, which templates would write as a quoted text."""
    if not isinstance(value, list):
        raise expected(where, "a list of calls", value)
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(value)]


def _tool_call(value: object, where: str) -> Message:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, Mapping) or not function.get("name"):
        raise expected(where, "a call, an object with name and arguments", value)
    arguments = function.get("arguments")
    # A null in a text was written by somebody; in an object it may be Parquet's.
    arguments = (
        _json(arguments or "{}", f"{where}.arguments", "an object")
        if isinstance(arguments, str)
        else without_nulls(arguments)
    )
    if not isinstance(arguments, dict | None):
        raise expected(f"{where}.arguments", "an object", arguments)
    called = {**without_nulls({k: v for k, v in function.items() if k != "arguments"}), "arguments": arguments or {}}
    outside = {k: v for k, v in value.items() if v is not None} if "function" in value else {}
    return {"type": "function", **outside, "function": called}


def _json(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise expected(where, f"{what} as JSON", text) from None


def _content(value: object, where: str, may_be_empty: bool) -> str:
    """A text, or the texts of a list of parts."""
    if not isinstance(value, list):
        return text_of(value, where, may_be_empty=may_be_empty)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            raise expected(
                f"{where}[{index}]", "a part of type text", part.get("type") if isinstance(part, dict) else part
            )
        texts.append(text_of(part.get("text"), f"{where}[{index}].text", may_be_empty=True))
    return text_of("".join(texts), where, may_be_empty=may_be_empty)
