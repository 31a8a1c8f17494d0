"""Rows whose columns fit no format, written by templates of the job's own: what they become, what is learned, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.failures import Reason
from finetune_api.spec import DataFormat, DataSource, LossOn, RowTemplate
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import ChatRenderer, load_tokenizer
from finetune_trainer.prepare.detect import check_columns, detect, with_format
from finetune_trainer.prepare.encode import Encoder
from finetune_trainer.prepare.examples import Completion, Conversation, Example, Text, to_example
from finetune_trainer.prepare.rows import RawRow
from finetune_trainer.prepare.template import Templates
from finetune_trainer.sources.data import DataFile
from tests.support.learned import learned
from tests.support.prepare_bench import REF, ROWS, Bench
from tests.support.tiny_model import CHATML, write_tokenizer
from tests.trainer.test_prepare_questions import prompts_of

ROW: dict[str, Any] = {"question": "What is 2+2?", "answer": 4, "context": None, "a b": "x", "notes": ["n1", "n2"]}
USER: dict[str, Any] = {"role": "user", "content": "What is 2+2?"}
FOUR: dict[str, Any] = {"role": "assistant", "content": "4"}
TURNS = {"user": "{{ question }}", "assistant": "{{ answer }}"}


def source(**template: str) -> DataSource:
    return DataSource.model_validate({"uri": "s3://bucket/x", "template": template})


def example(row: dict[str, Any], **template: str) -> Example:
    written = Templates(RowTemplate.model_validate(template), "data.train[0]").written(RawRow("f:1", row))
    assert written.value is not None, written.problem
    of = source(**template)
    fmt = detect(of, "data.train[0]", {}, [written])
    assert fmt is not None
    return to_example(written.value, fmt, check_columns(of, "data.train[0]"), True)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ({"text": "Q: {{ question }}\nA: {{ answer }}\n"}, Text("Q: What is 2+2?\nA: 4\n")),
        ({"prompt": "{{ question }} ", "completion": "{{ answer }}"}, Completion("What is 2+2? ", "4")),
        ({"prompt": "{{ question }}", "completion": "{{ answer }}", "system": "S"}, Completion("S\n\nWhat is 2+2?", "4")),
        (TURNS, Conversation([USER, FOUR], learn_from=1)),
        ({**TURNS, "system": "Be brief."}, Conversation([{"role": "system", "content": "Be brief."}, USER, FOUR], learn_from=2)),
        ({**TURNS, "system": "{{ context or '' }}"}, Conversation([USER, FOUR], learn_from=1)),
        ({"text": "{{ row['a b'] }}{{ notes | join(',') }}{{ answer + 0.5 }}"}, Text("xn1,n24.5")),
        ({"text": "{% if hint is defined %}{{ hint }}{% else %}none{% endif %}"}, Text("none")),
        ({"text": "{% for n in notes %}\n- {{ n }}\n{% endfor %}\n{{ notes | tojson }}"}, Text('- n1\n- n2\n["n1", "n2"]')),
    ],
)  # fmt: skip
def test_a_template_writes_an_example_from_any_columns(template: dict[str, str], wanted: Example) -> None:
    assert example(ROW, **template) == wanted


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ reply }}", "template.text: reply: missing; the row has question, answer, context, a b, notes"),
        ("{{ notes[0].said }}", "expected a row that it can write, found one that fails: 'str object' has no attribute 'said'"),
        ("{{ context }}", "template.text: expected text or a number in every {{ }}, found null (context is null: write {{ context or '' }} "
            "where it may be)"),
        ("{{ notes }}", "found a list of 2"),
        ("{{ answer == 4 }}", "found true"),
        ("{{ 'x'.upper }}", "found builtin_function_or_method"),
        ("{{ question + answer }}", 'found one that fails: can only concatenate str (not "int") to str'),
        ("{{ answer / 0 }}", "found one that fails: division by zero"),
        ("{{ raise_exception('too easy') }}", "found one that fails: too easy"),
        ("{{ ''.__class__.__mro__ }}", "found one that fails: access to attribute '__class__' of 'str' object is unsafe."),
        ("{% include 'x' %}", "found one that fails: no loader for this environment specified"),
        ("{{ nan }}", "found the number nan"),
    ],
)  # fmt: skip
def test_a_row_that_a_template_cannot_write_says_why(text: str, problem: str) -> None:
    written = Templates(RowTemplate(text=text), "data.train[0]").written(
        RawRow("f:7", {**ROW, "nan": math.nan} if "nan" in text else ROW)
    )
    assert written.value is None
    assert written.source == "f:7"
    assert written.problem is not None
    assert problem in written.problem


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder, False)


@pytest.mark.parametrize(
    ("template", "read", "taught"),
    [
        ({**TURNS, "system": "S"}, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n", "4<|im_end|>"),
        ({"prompt": "Question: {{ question }}\n", "completion": "{{ answer }}"}, "Question: What is 2+2?\n", "4{eos}"),
        ({"text": "{{ question }} {{ answer }}"}, "", "What is 2+2? 4{eos}"),
    ],
    ids=["turns", "prompt and completion", "text"],
)  # fmt: skip
def test_what_is_learned_is_exactly_what_the_answers_template_writes(
    tokenizer: Any, template: dict[str, str], read: str, taught: str
) -> None:
    encoded = Encoder(tokenizer, ChatRenderer(tokenizer, CHATML), LossOn.ASSISTANT).encode(example(ROW, **template))
    taught = taught.replace("{eos}", tokenizer.eos_token)
    assert learned(tokenizer, encoded) == [taught]
    assert tokenizer.decode(encoded.ids).rstrip("\n") == read + taught


def test_of_a_parquet_file_the_columns_are_read_that_the_templates_name(tmp_path: Path) -> None:
    """One that is no UTF-8 does not matter, unless it is named."""
    table = pa.table({"q": ["Why?"], "a b": ["So."], "old": pa.array([b"\xff"]).view(pa.string())})
    pq.write_table(table, tmp_path / "x.parquet")
    files = [DataFile(tmp_path / "x.parquet", "x.parquet")]

    def rows(**template: str) -> list[RawRow]:
        of = source(**template)
        found = with_format(of, "data.train[0]", files, {}, lambda first: detect(of, "data.train[0]", {}, first))
        return [raw for raw, fmt in found if fmt is DataFormat.TEXT]

    assert rows(text="{{ q }}") == [RawRow("x.parquet:1", {"template.text": "Why?"})]
    [every] = rows(text="{{ q }}{{ row['a b'] }}")
    assert every.problem is not None
    assert every.problem.startswith("a value cannot be read")


BROKEN = {"user": "{{ question }}", "assistant": "Well:\n{% if answer %}{{ answer }}"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data": {"train": [{"uri": "s3://{bucket}/none.jsonl", **REF, "template": BROKEN}]}}, "data.train[0]"),
        ({"data": {"heldOut": {"sources": [{"uri": "s3://{bucket}/none.jsonl", "template": BROKEN}]}}}, "data.heldOut.sources[0]"),
        ({"evaluation": {"generation": {"sources": [{"uri": "s3://{bucket}/none.jsonl", "template": BROKEN}]}}}, "evaluation.generation.sources[0]"),
    ],
    ids=["training rows", "held-out rows", "prompts"],
)  # fmt: skip
def test_a_broken_template_fails_with_its_line_before_any_row_is_read(
    bench: Bench, changes: dict[str, Any], field: str
) -> None:
    """None of the files exists."""
    error = bench.fails(**json.loads(json.dumps(changes).replace("{bucket}", bench.bucket)))
    assert error.reason is Reason.INVALID_CONFIG
    assert error.message.startswith(
        f"{field}.template.assistant is no Jinja template: line 2: Unexpected end of template"
    )
    with pytest.raises(StageError, match=r"line 1: No filter named 'upcase'"):
        Templates(RowTemplate(text="{{ a | upcase }}"), "data.train[0]")


def templated(bench: Bench, rows: list[Any], name: str = "train.jsonl", **changes: Any) -> dict[str, Any]:
    bench.put(rows, name)
    train = [{"uri": f"s3://{bench.bucket}/{name}", **REF, "template": TURNS}]
    return {"data": {"train": train, **changes}}


def test_rows_pass_the_same_checks_and_bad_ones_are_named(bench: Bench) -> None:
    rows = [{"question": f"What is {i}?", "answer": f"{i}"} for i in range(30)]
    report = bench.run(**templated(bench, [*rows, rows[0]]))
    assert (report.data.rows, report.data.bad_rows, report.data.duplicate_rows) == (31, 0, 1)
    assert report.data.formats == {"PromptCompletion": 31}
    bad = [
        {"question": "No answer"},
        {"question": "Empty", "answer": " "},
        {"question": None, "answer": "x"},
        "{broken",
    ]
    error = bench.fails(**templated(bench, [*rows, *bad], "bad.jsonl"))
    assert error.reason is Reason.INVALID_DATA
    for said in (
        "4 of 34 rows cannot be used",
        "bad.jsonl:31 template.assistant: answer: missing; the row has question",
        "bad.jsonl:32 template.assistant[0].content: expected text, found empty text",
        "bad.jsonl:33 template.user: expected text or a number in every {{ }}, found null (question is null",
        "bad.jsonl:34 not JSON",
    ):
        assert said in error.message
    assert bench.run(**templated(bench, [*rows, *bad], "bad.jsonl", checks={"maxBadRows": 4})).data.bad_rows == 4


def test_personal_data_is_taken_out_of_what_a_template_writes_and_of_its_problems(bench: Bench) -> None:
    rows = [{"question": f"Who is number {i}, jo{i}@example.com?", "answer": "Jo."} for i in range(30)]
    assert sum(bench.run(**templated(bench, rows, checks={"pii": "Redact"})).data.pii.values()) == 30
    assert "[EMAIL]" in (asked := bench.object("prepare/prompts.json").decode())
    assert "@" not in asked
    for pii in ("Ignore", "Redact"):
        changes = templated(bench, rows, checks={"pii": pii})
        changes["data"]["train"][0]["template"] = {**TURNS, "user": "{{ {}[question] }}"}
        assert ("jo0@example.com" in bench.fails(**changes).message) is (pii == "Ignore")


def test_prompts_of_ones_own_may_be_written_by_templates_with_or_without_answers(bench: Bench) -> None:
    bench.put(ROWS)
    asks = [{"q": "Why?", "a": "So."}, {"q": "When?", "a": ""}]
    bench.put(asks, "prompts.jsonl")
    bench.s3.write_secret(bench.pod.secrets / "prompts-0")

    def answered(**template: str) -> list[tuple[str, str]]:
        prompts = [{"uri": f"s3://{bench.bucket}/prompts.jsonl", **REF, "template": template}]
        bench.run(evaluation={"generation": {"sources": prompts}})
        return [(p.prompt, p.reference) for p in prompts_of(bench) if p.answered]

    assert answered(user="{{ q }}", assistant="{{ a }}") == [("Why?", "So."), ("When?", "")]
    assert answered(user="{{ q }}") == [("Why?", ""), ("When?", "")]
    assert answered(prompt="Q: {{ q }}", completion="{{ a }}") == [("Q: Why?", "So."), ("Q: When?", "")]
    assert answered(text="{{ q }}") == [("Why?", ""), ("When?", "")]
