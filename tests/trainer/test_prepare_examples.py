"""Rows of every format become examples, or problems that name field, expectation and finding."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.spec import DataFormat, DataSource
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.detect import check_columns, detect
from finetune_trainer.prepare.examples import Completion, Conversation, Example, Text, Tokenized, to_example
from finetune_trainer.prepare.problems import RowProblem
from finetune_trainer.prepare.rows import RawRow

M, P, A, T = DataFormat.MESSAGES, DataFormat.PROMPT_COMPLETION, DataFormat.ALPACA, DataFormat.TEXT
S, K = DataFormat.SHAREGPT, DataFormat.TOKENIZED
USER: dict[str, Any] = {"role": "user", "content": "q"}
BOT: dict[str, Any] = {"role": "assistant", "content": "a"}
SYSTEM: dict[str, Any] = {"role": "system", "content": "s"}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
NULL_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": None}}}],
}
RESULT: dict[str, Any] = {"role": "tool", "content": "2"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def called(arguments: Any, **outside: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{**outside, "function": {"name": "add", "arguments": arguments}}]}


def shared(*turns: tuple[Any, Any], **row: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **row}


@pytest.mark.parametrize(
    ("fmt", "row", "wanted"),
    [
        (M, {"messages": [USER, BOT]}, Conversation([USER, BOT])),
        (M, {"messages": [SYSTEM, USER, BOT, USER, BOT]}, Conversation([SYSTEM, USER, BOT, USER, BOT])),
        (
            M,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, BOT]},
            Conversation([USER, BOT]),
        ),
        (M, {"messages": [{**USER, "tool_calls": None, "name": None}, BOT]}, Conversation([USER, BOT])),
        (P, {"prompt": "q", "completion": "a"}, Completion("q", "a")),
        (P, {"prompt": [USER], "completion": [BOT]}, Conversation([USER, BOT], learn_from=1)),
        (P, {"prompt": "q", "completion": "a", "system": "s"}, Completion("s\n\nq", "a")),
        (P, {"prompt": [USER], "completion": [BOT], "system": "s"}, Conversation([SYSTEM, USER, BOT], learn_from=2)),
        (A, {"instruction": "q", "output": "a"}, Conversation([USER, BOT])),
        (A, {"instruction": "q", "input": "", "output": "a", "system": "s"}, Conversation([SYSTEM, USER, BOT])),
        (
            A,
            {"instruction": "q", "input": "i", "output": "a"},
            Conversation([{"role": "user", "content": "q\n\ni"}, BOT]),
        ),
        (T, {"text": "t", "other": 1}, Text("t")),
        (M, {"messages": [USER, called('{"a": 1}', type="function"), RESULT, BOT], "tools": [TOOL]},
            Conversation([USER, CALL, RESULT, BOT], tools=[TOOL])),
        (M, {"messages": [USER, called({"a": 1, "b": None}), RESULT, BOT], "tools": json.dumps([TOOL])},
            Conversation([USER, CALL, RESULT, BOT], tools=[TOOL])),
        (M, {"messages": [USER, BOT], "tools": None}, Conversation([USER, BOT])),
        (S, shared(("human", "q"), ("gpt", "a")), Conversation([USER, BOT])),
        (S, shared(("system", "s"), ("user", "q"), ("chatgpt", "a"), system="t"), Conversation([SYSTEM, USER, BOT])),
        (S, shared(("human", "q"), ("gpt", "a"), system="s"), Conversation([SYSTEM, USER, BOT])),
        (S, shared(("human", "q"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'), ("observation", "2"),
            ("gpt", "a"), tools=json.dumps([TOOL])), Conversation([USER, CALL, RESULT, BOT], tools=[TOOL])),
        (S, {"conversations": [USER, BOT]}, Conversation([USER, BOT])),
        (K, {"input_ids": [5, 6, 7]}, Tokenized([5, 6, 7], [5, 6, 7])),
        (K, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, Tokenized([5, 6, 7], [-100, 6, 7])),
        (K, {"input_ids": [5, 6, 7], "labels": None}, Tokenized([5, 6, 7], [5, 6, 7])),
        (K, {"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0]}, Tokenized([5, 6], [5, 6])),
        (M, {"messages": [USER, {**BOT, "tool_calls": []}]}, Conversation([USER, BOT])),
        (M, {"messages": [USER, called('{"a": null}'), RESULT, BOT]}, Conversation([USER, NULL_CALL, RESULT, BOT])),
        (P, {"prompt": "q", "completion": "a", "tools": "a hammer"}, Completion("q", "a")),
    ],
)  # fmt: skip
def test_a_good_row_becomes_an_example(fmt: DataFormat, row: dict[str, Any], wanted: Example) -> None:
    assert to_example(row, fmt, {}, True) == wanted


def test_alpaca_without_a_chat_template_uses_the_published_prompt() -> None:
    example = to_example({"instruction": "Add.", "input": "1 2", "output": "3"}, A, {}, False)
    assert isinstance(example, Completion)
    assert example.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert example.completion == "3"


def test_columns_are_mapped_and_problems_use_the_files_own_names() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    assert to_example({"question": "q", "answer": "a"}, P, columns, True) == Completion("q", "a")
    with pytest.raises(RowProblem, match="answer: expected text, found the number 5"):
        to_example({"question": "q", "answer": 5}, P, columns, True)


def say(*contents: Any) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


@pytest.mark.parametrize(
    ("fmt", "row", "text"),
    [
        (M, {"messages": None}, "messages: expected a list of messages, found null"),
        (M, {"messages": []}, "messages: expected at least one message, found an empty list"),
        (M, {"messages": "hi"}, 'messages: expected a list of messages, found "hi"'),
        (M, {"messages": ["hi"]}, 'messages[0]: expected an object with role and content, found "hi"'),
        (M, {"messages": [{"content": "x"}]}, "messages[0].role: missing; the message has content"),
        (M, {"messages": [{"from": "human", "value": "x"}]}, "set format: ShareGPT and columns: {conversations: messages}"),
        (M, {"messages": [USER, called("{")]}, 'messages[1].tool_calls[0].arguments: expected an object as JSON, found "{"'),
        (M, {"messages": [USER, called([1])]}, "messages[1].tool_calls[0].arguments: expected an object, found a list of 1"),
        (M, {"messages": [USER, {"role": "assistant", "tool_calls": ["add"]}]}, "tool_calls[0]: expected a call"),
        (M, {"messages": [USER, {"role": "assistant", "tool_calls": {"name": "add"}}]}, "tool_calls: expected a list of calls, found an object"),
        (M, {"messages": [USER, BOT], "tools": "add"}, 'tools: expected a list of tools as JSON, found "add"'),
        (M, {"messages": [USER, BOT], "tools": [3]}, "tools[0]: expected a tool: an object with a function, found the number 3"),
        (S, {"conversations": ["hi"]}, "conversations[0]: expected an object with from and value"),
        (S, shared(("alien", "q")), 'conversations[0].from: expected one of system, human'),
        (S, shared(("human", "q"), ("gpt", None)), "conversations[1].value: expected text, found null"),
        (S, {"conversations": [{"from": "human"}]}, "conversations[0].value: missing; the turn has from"),
        (S, shared(("human", "q")), 'conversations: last turn is "user", nothing to learn'),
        (S, shared(("human", "q"), ("function_call", "add(1)")), "conversations[1].value: expected a function call"),
        (K, {"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask: expected as many as input_ids (2), found 1"),
        (K, {"input_ids": [1, 2], "attention_mask": [0, 0]}, "attention_mask: expected at least one token that is not masked"),
        (K, {"input_ids": []}, "input_ids: expected a list of token ids, found an empty list"),
        (K, {"input_ids": [1, 2.5]}, "input_ids[1]: expected a token id, found the number 2.5"),
        (K, {"input_ids": [1, -1]}, "input_ids[1]: expected a token id, found the number -1"),
        (K, {"input_ids": [True]}, "input_ids[0]: expected a token id, found true"),
        (K, {"input_ids": [1, 2], "labels": [1]}, "labels: expected as many as input_ids (2), found 1"),
        (K, {"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "labels[0]: expected -100 or the token itself (1), found 2; labels are not to be shifted"),
        (M, {"messages": [{"role": "human", "content": "x"}]}, 'messages[0].role: expected one of system, developer, user, assistant, '
            'tool, found "human"'),
        (M, {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role: expected one of"),
        (M, {"messages": [{"role": "user"}, BOT]}, "messages[0].content: missing; the message has role"),
        (M, say("q", "a", None, "b"), "messages[2].content: expected text, found null"),
        (M, say("q", ""), "messages[1].content: expected text, found empty text"),
        (M, say(" \n", "a"), "messages[0].content: expected text, found empty text"),
        (M, say("q", "a", "q"), 'messages: last turn is "user", nothing to learn'),
        (M, say([{"type": "image"}], "a"), 'messages[0].content[0]: expected a part of type text, found "image"'),
        (M, say("q", "\ud800"), "half a character"),
        (M, say("q\udcff", "a"), "a byte that is not UTF-8 (0xff) at position 2"),
        (P, {"prompt": "q"}, "completion: missing; the row has prompt"),
        (P, {"prompt": "q", "completion": None}, "completion: expected text, found null"),
        (P, {"prompt": [USER], "completion": "a"}, "expected two texts or two lists of messages"),
        (P, {"prompt": [USER], "completion": [USER]}, 'completion: last turn is "user"'),
        (A, {"instruction": "", "output": "a"}, "instruction: expected text, found empty text"),
        (A, {"instruction": "q", "output": "a", "input": 3}, "input: expected text, found the number 3"),
        (T, {"text": True}, "text: expected text, found true"),
        (T, {"text": {"a": 1}}, "text: expected text, found an object with a"),
    ],
)  # fmt: skip
def test_a_bad_row_says_field_expectation_and_finding(fmt: DataFormat, row: dict[str, Any], text: str) -> None:
    with pytest.raises(RowProblem) as info:
        to_example(row, fmt, {}, True)
    assert text in info.value.text


def source(**fields: Any) -> DataSource:
    return DataSource.model_validate({"uri": "s3://bucket/x", **fields})


@pytest.mark.parametrize(
    ("row", "fmt"),
    [
        ({"messages": []}, M),
        ({"prompt": "", "completion": "", "text": ""}, P),
        ({"instruction": "", "output": "", "text": "x"}, A),
        ({"id": 1, "text": "x"}, T),
        ({"conversations": [], "text": "x"}, S),
        ({"input_ids": [], "attention_mask": []}, K),
        ({"input_ids": [], "text": "x"}, T),
    ],
)
def test_the_format_is_detected_by_its_columns(row: dict[str, Any], fmt: DataFormat) -> None:
    assert detect(source(), "data.train[0]", {}, [RawRow("f:1", None, "broken"), RawRow("f:2", row)]) is fmt


def test_wrong_columns_fail_with_what_was_found_and_how_to_map() -> None:
    with pytest.raises(StageError) as info:
        detect(source(), "data.train[0]", {}, [RawRow("t.csv:2", {"question": "q", "answer": "a"})])
    assert info.value.reason is Reason.INVALID_DATA
    assert "t.csv:2 has wrong columns" in info.value.message
    assert "found question, answer" in info.value.message
    assert "data.train[0].columns" in info.value.message
    with pytest.raises(StageError, match=r"expected question and completion \(format PromptCompletion\)"):
        detect(
            source(format="PromptCompletion"), "data.train[0]", {"prompt": "question"}, [RawRow("t.csv:2", {"x": 1})]
        )


def test_a_mapping_of_an_unknown_field_is_refused() -> None:
    with pytest.raises(StageError, match=r"data\.train\[0\]\.columns: question is no field") as info:
        check_columns(source(columns={"question": "prompt"}), "data.train[0]")
    assert info.value.reason is Reason.INVALID_CONFIG
