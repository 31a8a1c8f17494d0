"""What a chat template leaves out of a conversation without a word: Mistral's a system message once an answer follows, Qwen's turns of
a developer, others calls of tools, DeepSeek R1's the thoughts of an answer."""

from __future__ import annotations

from collections.abc import Callable

from finetune_trainer.prepare.turns import Message

Shape = tuple[tuple[str, bool, int, bool], ...]
"""Per turn: the role, whether it says anything, its calls, whether it is a last answer with thoughts."""

END_OF_THOUGHTS = "</think>"


def shape_of(messages: list[Message]) -> Shape:
    """What decides over what a template leaves out: conversations of one shape need one rendering to see it."""
    last = len(messages) - 1
    return tuple(
        (
            message["role"],
            bool(message["content"].strip()),
            len(message.get("tool_calls") or ()),
            number == last and END_OF_THOUGHTS in message["content"],
        )
        for number, message in enumerate(messages)
    )


def left_out(messages: list[Message], text_of: Callable[[list[Message]], str]) -> str:
    """Why the conversation cannot be learned from: the first thing that the template leaves out. Empty if it writes everything.

    Answers are not looked at: whoever learns from them looks for each.

    Args:
        text_of: renders a conversation.
    """
    marked, places = _marked(messages)
    text = text_of(marked)
    return next((why for mark, why in places.items() if mark not in text), "")


def _marked(messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
    """The conversation with a mark in place of each thing that is to be written, and by mark, what to say if it is not."""
    marked, places = [], {}
    for number, (message, (role, says, calls, thinks)) in enumerate(zip(messages, shape_of(messages), strict=True)):
        changed = dict(message)
        if role != "assistant" and says:
            changed["content"] = _mark(number)
            places[_mark(number)] = (
                f"messages[{number}]: the chat template leaves this {role} turn out; move its text into a turn that it writes, or set "
                "data.chatTemplate to one that writes it"
            )
        if thinks:
            changed["content"] = f"<think>\n{_mark(number)}\n{END_OF_THOUGHTS}\n\nyes"
            places[_mark(number)] = (
                f"messages[{number}]: the chat template leaves the thoughts of this answer out (all before {END_OF_THOUGHTS}); take them out of "
                "the row, or set data.chatTemplate to one that keeps them"
            )
        if calls:
            changed["tool_calls"] = []
            for place, call in enumerate(message["tool_calls"]):
                mark = f"{_mark(number)}{place}"
                # A template may write the one without the other.
                called = {**call["function"], "name": mark, "arguments": {"given": mark}}
                changed["tool_calls"].append({**call, "function": called})
                places[mark] = (
                    f"messages[{number}].tool_calls[{place}]: the chat template leaves this call out; use a model that calls tools so, or set "
                    "data.chatTemplate to one that writes it"
                )
        marked.append(changed)
    return marked, places


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"
