"""Prompts of the user's own: with and without references, never trained on, checked as all other rows are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.results import PreparedPrompt
from finetune_api.spec import DataFormat
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.questions import STAND_IN, with_answer
from tests.support.prepare_bench import REF, ROWS, Bench, lines, row

USER = {"role": "user", "content": "Where is it?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def asked(
    bench: Bench, rows: list[Any], prompts: int = 10, name: str = "prompts.jsonl", **changes: Any
) -> dict[str, Any]:
    """The change of the spec that asks these rows."""
    bench.put(ROWS)
    bench.s3.put(bench.bucket, name, lines(rows))
    bench.s3.write_secret(bench.pod.secrets / "prompts-0")
    source = {"uri": f"s3://{bench.bucket}/{name}", **REF}
    return {"evaluation": {"generation": {"prompts": prompts, "sources": [source]}}, **changes}


def prompts_of(bench: Bench) -> list[PreparedPrompt]:
    return [PreparedPrompt.model_validate(p) for p in json.loads(bench.object("prepare/prompts.json"))]


def test_rows_are_asked_instead_of_held_out_prompts_and_never_trained_on(bench: Bench) -> None:
    bench.put(ROWS)
    before = bench.run()
    rows = [{"messages": [SYSTEM, USER]}, row("And when?", "Now.")]
    report = bench.run(**asked(bench, rows))
    assert (report.data, report.data_hash) == (before.data, before.data_hash)
    found = prompts_of(bench)
    assert [(p.row, p.prompt, p.reference, p.answered) for p in found[:2]] == [
        (0, "Where is it?", "", True),
        (1, "And when?", "Now.", True),
    ]
    assert found[0].messages == [SYSTEM, USER]
    assert found[0].text.endswith("user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n")
    assert STAND_IN not in found[0].text.replace("<|im_start|>", "")
    assert [p.answered for p in found[2:]] == [False] * 3, "held-out prompts, to check later stages' tokenizer on"
    assert report.warnings == before.warnings


@pytest.mark.parametrize(
    ("fields", "prompt", "reference"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "Here."}]}, "Where is it?", "Here."),
        ({"conversations": [{"from": "human", "value": "Where?"}]}, "Where?", ""),
        (
            {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]},
            "Where?",
            "Here.",
        ),
        ({"prompt": "Where?"}, "Where?", ""),
        ({"prompt": "Where?", "completion": None}, "Where?", ""),
        ({"prompt": "Where?", "completion": "Here."}, "Where?", "Here."),
        ({"prompt": [USER]}, "Where is it?", ""),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": "Here."}]}, "Where is it?", "Here."),
        ({"instruction": "Add.", "input": "1 2"}, "Add.\n\n1 2", ""),
        ({"instruction": "Add.", "output": "3"}, "Add.", "3"),
        ({"text": "Once upon"}, "Once upon", ""),
    ],
)
def test_every_format_can_ask(bench: Bench, fields: dict[str, Any], prompt: str, reference: str) -> None:
    bench.run(**asked(bench, [fields]))
    assert [(p.prompt, p.reference) for p in prompts_of(bench) if p.answered] == [(prompt, reference)]


def test_bad_rows_are_named_and_fail_the_job_unless_some_may_be_left_out(bench: Bench) -> None:
    rows = [{"messages": [USER]}, "{broken", {"messages": [{"role": "assistant", "content": "Hi."}]}, {"messages": []}]
    error = bench.fails(**asked(bench, rows))
    assert error.reason is Reason.INVALID_DATA
    for said in (
        "3 of 4 rows cannot be used", "prompts.jsonl:2 not JSON", "prompts.jsonl:3 expected a turn before the answer",
        "prompts.jsonl:4 messages: expected at least one message",
    ):  # fmt: skip
        assert said in error.message
    report = bench.run(**asked(bench, rows, data={"checks": {"maxBadRows": 3}}))
    assert any("3 rows of evaluation.generation.sources cannot be used" in w for w in report.warnings)
    assert [p.row for p in prompts_of(bench) if p.answered] == [0]


@pytest.mark.parametrize(
    ("rows", "reason", "said"),
    [
        ([], Reason.TOO_FEW_ROWS, "evaluation.generation.sources[0] (s3://"),
        ([{"frage": "?"}], Reason.INVALID_DATA, "expected messages | conversations | prompt | instruction | text, found frage"),
        ([{"input_ids": [1, 2]}], Reason.INVALID_DATA, "Rename the columns, or map them with evaluation.generation.sources[0].columns"),
    ],
)  # fmt: skip
def test_sources_that_hold_no_prompts_are_refused(bench: Bench, rows: list[Any], reason: Reason, said: str) -> None:
    error = bench.fails(**asked(bench, rows))
    assert error.reason is reason
    assert said in error.message


def test_a_source_that_is_missing_or_refused_fails_before_a_gpu_is_asked_for(bench: Bench) -> None:
    changes = asked(bench, [USER])
    bench.s3.write_secret(bench.pod.secrets / "prompts-0", secret="wrong")
    assert bench.fails(**changes).reason is Reason.ACCESS_DENIED
    bench.s3.write_secret(bench.pod.secrets / "prompts-0")
    bench.s3.client.delete_object(Bucket=bench.bucket, Key="prompts.jsonl")
    assert bench.fails(**changes).reason is Reason.DATASET_NOT_FOUND


def test_more_prompts_than_are_answered_and_prompts_that_are_trained_on_are_told_of(bench: Bench) -> None:
    bench.put(ROWS)
    bench.run()
    trained = bench.table("train")["row"].to_pylist()[0]
    known = row(f"what IS {trained} plus {trained}?", "?")["messages"][:1]
    held = bench.table("held_out")["row"].to_pylist()[0]
    rows = [{"messages": known}, ROWS[held], row("New?", "Yes."), row("Late?", "Yes."), row("long " * 90, "Yes.")]
    report = bench.run(**asked(bench, rows, prompts=3))
    told = [w for w in report.warnings if "evaluation.generation.sources" in w]
    assert told == [
        "of 5 prompts in evaluation.generation.sources the first 3 are answered: raise evaluation.generation.prompts",
        "1 prompt of evaluation.generation.sources stand in the training data too: the tuned model's scores on them are too good",
    ]
    assert len([p for p in prompts_of(bench) if p.answered]) == 3
    report = bench.run(**asked(bench, rows, training={"maxSequenceTokens": 64}))
    assert any(
        "1 prompt of evaluation.generation.sources longer than training.maxSequenceTokens (64)" in w
        for w in report.warnings
    )


def test_an_answer_that_a_row_has_is_left_as_it_is_and_so_is_what_is_wrong() -> None:
    columns = {"completion": "antwort"}
    given = {"prompt": "a", "antwort": "b"}
    assert with_answer(given, DataFormat.PROMPT_COMPLETION, columns) == (given, True)
    assert with_answer({"prompt": "a"}, DataFormat.PROMPT_COMPLETION, columns) == (
        {"prompt": "a", "antwort": STAND_IN},
        False,
    )
    for wrong in ("text", [], ["text"]):
        assert with_answer({"messages": wrong}, DataFormat.MESSAGES, {}) == ({"messages": wrong}, True)


def test_the_error_of_a_model_without_a_template_names_the_prompt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = asked(bench, [{"messages": [USER]}])
    bench.put([{"prompt": f"q{i}", "completion": "a"} for i in range(20)])
    monkeypatch.setattr("finetune_trainer.prepare.model.chat_template", lambda _: None)
    error: StageError = bench.fails(**changes)
    assert error.reason is Reason.CHAT_TEMPLATE_MISSING
    assert error.message.startswith("prompts.jsonl:1: ")


def test_personal_data_is_taken_out_of_them_too(bench: Bench) -> None:
    asks = {"role": "user", "content": "Who is jo@example.com?"}
    told = row("And jim@example.com?", "Ask bo@example.com.")
    bench.run(**asked(bench, [{"messages": [asks]}, told], data={"checks": {"pii": "Redact"}}))
    stored = bench.object("prepare/prompts.json").decode()
    assert "@" not in stored
    assert [(p.prompt, p.reference) for p in prompts_of(bench)[:2]] == [
        ("Who is [EMAIL]?", ""),
        ("And [EMAIL]?", "Ask [EMAIL]."),
    ]


def test_a_judge_without_an_address_fails_before_a_gpu(bench: Bench) -> None:
    judge = {"endpointURL": "http://[fd00::1/v1", "model": "m"}
    error = bench.fails(**asked(bench, [row("And?", "So.")], evaluation={"judge": judge}))
    assert error.reason is Reason.INVALID_CONFIG
    assert "evaluation.judge.endpointURL is no web address" in error.message
