"""What is learned with chat templates as they are published, in every format: the answers with their ending, and nothing else."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from finetune_api.spec import DataFormat, LossOn
from finetune_trainer.prepare.chat import ChatRenderer, tried_renderer
from finetune_trainer.prepare.encode import Encoded, Encoder
from finetune_trainer.prepare.examples import Conversation, to_example
from finetune_trainer.prepare.problems import RowProblem
from finetune_trainer.prepare.prompts import asked_beyond_answers
from finetune_trainer.prepare.turns import Message
from tests.support.learned import learned as learned_runs
from tests.support.published_templates import FOLDER, PUBLISHED, byte_level, sentence_piece

NAMED = {published.name: published for published in PUBLISHED}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
SAID = [
    ["What is one?", "One is 1.", "And two?", "Two is 2."],
    ["yes", "yes", "yes", "yes"],
    ["東京?", "Ja: 東京 👩‍🚀\n\n- e\u0301té\n- [x]  {y}", "And\n\ntwo?", "{{ 2 }}\n\tTwo <b>is</b> 2"],
    ["One?", "  One is 1.\n", "Two?", "\tTwo is 2.  "],
]
THOUGHT = "<think>\nHm.\n</think>\n\n"


# DeepSeek's special tokens have a character in them that a tokenizer of that kind reads as a blank.
MADE = [(name, byte_level) for name in NAMED] + [
    (name, sentence_piece) for name in NAMED if not name.startswith("deepseek")
]


@cache
def tokenizer_of(make: Any, name: str) -> Any:
    return make(NAMED[name])


@cache
def renderer_of(name: str) -> ChatRenderer:
    published = NAMED[name]
    return tried_renderer(tokenizer_of(byte_level, name), published.template)


def turns(said: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]


def calling(question: str, answer: str) -> list[Message]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 1})}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "abcdefghi", "name": "add"},
        {"role": "assistant", "content": answer},
    ]


def encode(
    name: str, row: dict[str, Any], fmt: DataFormat, loss_on: LossOn = LossOn.ASSISTANT, make: Any = byte_level
) -> Encoded:
    """A row as the stage encodes it; the tokens are those of the tokenizer's own chat template."""
    tokenizer = tokenizer_of(make, name)
    example = to_example(row, fmt, {}, True)
    assert isinstance(example, Conversation)
    encoded = Encoder(tokenizer, renderer_of(name), loss_on).encode(example)
    own = tokenizer.apply_chat_template(example.messages, tools=example.tools or None, tokenize=True, return_dict=False)
    assert encoded.ids.tolist() == own
    return encoded


def learned(name: str, encoded: Encoded, make: Any = byte_level) -> list[str]:
    return learned_runs(tokenizer_of(make, name), encoded)


def test_every_template_that_is_kept_is_tested() -> None:
    assert sorted(NAMED) == sorted(path.stem for path in FOLDER.glob("*.jinja"))


@pytest.mark.parametrize("said", SAID, ids=["plain", "same", "marks", "blanks"])
@pytest.mark.parametrize(("name", "make"), MADE)
def test_of_messages_the_answers_and_their_endings_are_learned(name: str, said: list[str], make: Any) -> None:
    published = NAMED[name]
    row = {"messages": turns(said)}
    answers = [published.answer(said[1], last=False), published.answer(said[3], last=True)]
    assert learned(name, encode(name, row, DataFormat.MESSAGES, make=make), make) == answers
    only_last = encode(name, row, DataFormat.MESSAGES, LossOn.COMPLETION, make)
    assert learned(name, only_last, make) == answers[1:]
    everything = encode(name, row, DataFormat.MESSAGES, LossOn.ALL, make)
    assert (everything.labels == everything.ids).all()


@pytest.mark.parametrize("name", NAMED)
def test_of_every_other_format_the_answers_are_learned_too(name: str) -> None:
    published = NAMED[name]
    said = SAID[0]
    answers = [published.answer(said[1], last=False), published.answer(said[3], last=True)]
    shared = {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]}
    assert learned(name, encode(name, shared, DataFormat.SHAREGPT)) == answers
    split = {"prompt": turns(said)[:3], "completion": turns(said)[3:]}
    assert learned(name, encode(name, split, DataFormat.PROMPT_COMPLETION)) == answers[1:]
    asked = {"instruction": said[0], "input": said[2], "output": said[3]}
    assert learned(name, encode(name, asked, DataFormat.ALPACA)) == answers[1:]


SYSTEM_ROWS = [
    (DataFormat.MESSAGES, {"messages": [{"role": "system", "content": "You add."}, *turns(SAID[0])]}),
    (DataFormat.SHAREGPT, {"system": "You add.", "conversations": turns(SAID[0])}),
    (
        DataFormat.PROMPT_COMPLETION,
        {"system": "You add.", "prompt": turns(SAID[0])[:3], "completion": turns(SAID[0])[3:]},
    ),
    (DataFormat.ALPACA, {"system": "You add.", "instruction": "What is one?", "output": "Two is 2."}),
]


@pytest.mark.parametrize(("fmt", "row"), SYSTEM_ROWS, ids=[str(fmt) for fmt, _ in SYSTEM_ROWS])
@pytest.mark.parametrize("name", NAMED)
def test_system_turns_are_read_and_not_learned_or_the_row_is_refused(
    name: str, fmt: DataFormat, row: dict[str, Any]
) -> None:
    published = NAMED[name]
    if not published.system:
        with pytest.raises(RowProblem, match=r"leaves this system turn out|System role|roles must alternate"):
            encode(name, row, fmt)
        return
    encoded = encode(name, row, fmt)
    all_answers = [published.answer("One is 1.", last=False), published.answer("Two is 2.", last=True)]
    first = 0 if fmt in (DataFormat.MESSAGES, DataFormat.SHAREGPT) else 1
    assert learned(name, encoded) == all_answers[first:]
    assert "You add." in tokenizer_of(byte_level, name).decode(encoded.ids[: encoded.prompt_tokens])


@pytest.mark.parametrize(("name", "make"), [(name, make) for name, make in MADE if NAMED[name].call])
def test_calls_are_learned_as_the_template_writes_them_and_results_are_not(name: str, make: Any) -> None:
    published = NAMED[name]
    row = {"messages": calling("One?", "One is 1.") + calling("Two?", "Two is 2."), "tools": TOOLS}
    encoded = encode(name, row, DataFormat.MESSAGES, make=make)
    assert learned(name, encoded, make) == [
        published.call,
        published.answer("One is 1.", last=False),
        published.call,
        published.answer("Two is 2.", last=True),
    ]
    assert "Adds." in tokenizer_of(make, name).decode(encoded.ids[: encoded.prompt_tokens])


@pytest.mark.parametrize("name", [name for name, published in NAMED.items() if not published.call])
@pytest.mark.parametrize("tools", [TOOLS, []], ids=["tools", "no tools"])
def test_calls_that_a_template_cannot_write_make_no_row(name: str, tools: list[Any]) -> None:
    """Without a word, an answer that says nothing would be learned in their place."""
    with pytest.raises(
        RowProblem, match=r"leaves this call out|has no place for them|the chat template refuses the conversation"
    ):
        encode(name, {"messages": calling("One?", "One is 1."), "tools": tools}, DataFormat.MESSAGES)


def test_of_two_calls_in_a_turn_none_is_left_out() -> None:
    row = {"messages": calling("One?", "One is 1."), "tools": TOOLS}
    row["messages"][1]["tool_calls"] *= 2
    with pytest.raises(RowProblem, match=r"messages\[1\].tool_calls\[1\]: the chat template leaves this call out"):
        encode("gpt-oss", row, DataFormat.MESSAGES)
    first, _, rest = NAMED["qwen2.5"].call.partition("<|im_end|>")
    assert not rest
    answer = NAMED["qwen2.5"].answer("One is 1.", last=True)
    twice = f"{first}\n{first}<|im_end|>"
    assert learned("qwen2.5", encode("qwen2.5", row, DataFormat.MESSAGES)) == [twice, answer]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "phi-4", "deepseek-v3"])
def test_turns_of_a_role_that_a_template_does_not_write_make_no_row(name: str) -> None:
    row = {"messages": [{"role": "developer", "content": "You add."}, *turns(SAID[0])]}
    with pytest.raises(RowProblem, match=r"messages\[0\]: the chat template leaves this developer turn out"):
        encode(name, row, DataFormat.MESSAGES)
    encode(name, row, DataFormat.MESSAGES, LossOn.ALL)


def thinking(field: bool) -> dict[str, Any]:
    said = turns(SAID[0])
    for turn in said[1::2]:
        turn |= {"reasoning_content": "Hm."} if field else {"content": THOUGHT + turn["content"]}
    return {"messages": said}


@pytest.mark.parametrize("field", [False, True], ids=["text", "reasoning_content"])
def test_thoughts_are_learned_where_the_template_writes_them(field: bool) -> None:
    """Qwen 3's own template drops those of earlier answers; whoever wants them too marks answers."""
    for name, first in (("qwen3", ""), ("qwen3-marked", THOUGHT)):
        encoded = encode(name, thinking(field), DataFormat.MESSAGES)
        assert learned(name, encoded) == [f"{first}One is 1.<|im_end|>", f"{THOUGHT}Two is 2.<|im_end|>"]


def test_a_thought_between_calls_is_learned() -> None:
    row = {"messages": calling("Two?", "Two is 2."), "tools": TOOLS}
    row["messages"][1]["reasoning_content"] = "Hm."
    call = THOUGHT + NAMED["qwen3"].call
    answer = NAMED["qwen3"].answer("Two is 2.", last=True)
    assert learned("qwen3", encode("qwen3", row, DataFormat.MESSAGES)) == [call, answer]


@pytest.mark.parametrize("name", ["deepseek-r1-distill", "deepseek-v3"])
def test_thoughts_that_a_template_drops_from_the_last_answer_make_no_row(name: str) -> None:
    with pytest.raises(RowProblem, match=r"messages\[3\]: the chat template leaves the thoughts of this answer out"):
        encode(name, thinking(False), DataFormat.MESSAGES)


def test_only_deepseeks_templates_ask_with_more_than_stands_before_an_answer() -> None:
    more = {name: asked_beyond_answers(renderer_of(name)) for name in NAMED}
    assert {name: text for name, text in more.items() if text} == dict.fromkeys(
        ("deepseek-r1-distill", "deepseek-v3"), "<think>\n"
    )


@pytest.mark.parametrize(
    ("name", "date"), [("llama-3.1", "26 Jul 2024"), ("llama-3.2", "26 Jul 2024"), ("gpt-oss", "2024-07-26")]
)
def test_the_date_is_always_the_same(name: str, date: str) -> None:
    encoded = encode(name, {"messages": turns(SAID[0])}, DataFormat.MESSAGES)
    assert f"ate: {date}" in tokenizer_of(byte_level, name).decode(encoded.ids)


def test_an_answer_with_special_tokens_is_learned_whole_where_the_ending_stands_outside_the_mark() -> None:
    name = "zephyr"
    marked = NAMED[name].template.replace(
        "{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}",
        "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] }}{% endgeneration %}{{ eos_token + '\n' }}",
    )
    assert "generation" in marked
    tokenizer = tokenizer_of(byte_level, name)
    said = turns(["Who?", "<|user|> is one", "And?", "yes"])
    encoded = Encoder(tokenizer, ChatRenderer(tokenizer, marked), LossOn.ASSISTANT).encode(Conversation(said))
    assert learned(name, encoded) == ["<|user|> is one</s>", "yes</s>"]
