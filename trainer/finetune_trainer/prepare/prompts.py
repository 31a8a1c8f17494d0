"""What a model is asked, as later stages find it in ``prepare/prompts.json``."""

from __future__ import annotations

from typing import Any

from finetune_api.results import PreparedPrompt
from finetune_trainer.prepare.chat import ChatRenderer
from finetune_trainer.prepare.problems import RowProblem
from finetune_trainer.prepare.turns import Message, Tool


def conversation_prompt(
    row: int, prompt: str, reference: str, messages: list[Message], tools: list[Tool], tokenizer: Any, renderer: ChatRenderer
) -> PreparedPrompt:  # fmt: skip
    """Turns before an answer, rendered with the beginning of one.

    Raises:
        RowProblem: if the chat template refuses them.
    """
    text = renderer.question(messages, tools)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return PreparedPrompt(
        row=row,
        prompt=prompt,
        reference=reference,
        messages=messages,
        tools=tools or None,
        text=text,
        input_ids=ids,
    )


def text_prompt(row: int, prompt: str, reference: str, tokenizer: Any) -> PreparedPrompt:
    """A text that is to be continued."""
    return PreparedPrompt(
        row=row, prompt=prompt, reference=reference, text=prompt, input_ids=tokenizer(prompt)["input_ids"]
    )


def asked_beyond_answers(renderer: ChatRenderer) -> str:
    """What the chat template asks a model with that does not stand before an answer in a row (DeepSeek R1's begins a thought); mostly nothing."""
    hello: list[Message] = [{"role": "user", "content": "Hello"}]
    try:
        asked = renderer.question(hello)
        answered = renderer.plain([*hello, {"role": "assistant", "content": "Hi there"}])
    except RowProblem:
        return ""
    return next((asked[place:] for place, letter in enumerate(asked) if answered[place : place + 1] != letter), "")
