"""Personal data: what is found, what is not, and that nothing of it is left where it is to be replaced."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter

import pytest

from finetune_api.failures import Reason
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.prepare.examples import Completion, Conversation, Text
from finetune_trainer.prepare.pii import redacted, redacted_example
from tests.support.prepare_bench import REF, ROWS, Bench, row


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("EMAIL", ["john.doe+x@mail.example.co.uk", "<a@b.de>", "mailto:a_b@c-d.org.", f"{'x' * 64}@a.de"]),
        ("PHONE", ["(212) 555-0123", "212-555-0123", "212.555.0123", "+1 212 555 0123", "+44 20 7946 0958", "+49 30 901820"]),
        ("CREDIT_CARD", ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "4111111111111111"]),
        ("SSN", ["123-45-6789"]),
        ("IBAN", ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "FR1420041010050500013M02606"]),
        ("IP_ADDRESS", ["8.8.8.8", "93.184.216.34"]),
    ],
)  # fmt: skip
def test_what_is_found_is_replaced_by_its_kind(kind: str, texts: list[str]) -> None:
    for text in texts:
        found: Counter[str] = Counter()
        clean = redacted(f"Take {text}, or {text}!", found)
        assert text not in clean
        assert clean.count(f"[{kind}]") == 2, clean
        assert found == {kind: 2}


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-15 12:30, 1/2/2024, January 5, 2024; 10115 Berlin",
        "1609459200 and 2125550123, 123456789, 1,234,567.89, 212 555 0123, 3.14159265358979, +3.1415926535",
        "4111 1111 1111 1112, 1234567890123, ISBN 978-3-16-148410-0",
        "version 1.02.03.04, 08.15.07.30, ١.١.١.١",
        "10.0.0.1, 127.0.0.1, 192.168.1.1, version 10.15.7, 300.1.1.1",
        "DE89 3704 0044 0532 0130 01",
        "@handle, x@localhost, a @ b.de, @decorator.call(1)",
        "sha 0123456789abcdef0123456789abcdef",
    ],
)
def test_numbers_dates_and_names_of_other_things_are_left(text: str) -> None:
    found: Counter[str] = Counter()
    assert redacted(text, found) == text
    assert not found


def test_every_text_of_an_example_is_searched() -> None:
    mail, card = "a@b.de", 4111111111111111
    call = {
        "type": "function",
        "id": "call_1",
        "function": {"name": "send", "arguments": {"to": [mail, {"card": card}], mail: 5, "b@b.de": 6}},
    }
    example = Conversation(
        [
            {"role": "system", "content": f"s {mail}"},
            {"role": "user", "content": f"u {mail}", "name": mail},
            {"role": "assistant", "content": f"a {mail}", "tool_calls": [call]},
        ],
        tools=[{"type": "function", "function": {"name": "send", "description": f"d {mail}"}}],
    )  # fmt: skip
    found: Counter[str] = Counter()
    clean = redacted_example(example, found)
    assert isinstance(clean, Conversation)
    text = json.dumps([clean.messages, clean.tools])
    assert mail not in text
    assert "b@b.de" not in text
    assert str(card) not in text
    assert found == {"EMAIL": 8, "CREDIT_CARD": 1}
    arguments = clean.messages[2]["tool_calls"][0]["function"]["arguments"]
    assert sorted(value for value in arguments.values() if isinstance(value, int)) == [5, 6], "no key is lost"
    assert redacted_example(Completion(mail, f"is {mail}"), found) == Completion("[EMAIL]", "is [EMAIL]")
    assert redacted_example(Text(mail), found) == Text("[EMAIL]")


@pytest.mark.parametrize("text", ["a/" * 200_000 + "@", "+1" * 100_000, "AA11" * 50_000, "1-" * 100_000, "1" * 200_000])
def test_texts_that_are_made_to_be_slow_are_not(text: str) -> None:
    begin = time.process_time()
    redacted(text, Counter())
    assert time.process_time() - begin < 10


def test_redacted_data_hold_nothing_of_it_anywhere(bench: Bench) -> None:
    private = [
        row(f"Who is user{i}@example.com?", f"Call 212-555-01{i % 100:02d}, card 4111 1111 1111 1111.")
        for i in range(60)
    ]
    bad = {"messages": [{"role": "user", "content": "q"}, {"role": "bad@example.com", "content": "q"}]}
    bench.put([*ROWS, *private, bad])
    changes = {"checks": {"maxBadRows": 1}}
    plain = bench.run(data=changes)
    assert plain.data.pii == {}
    counted = bench.run(data={"checks": {**changes["checks"], "pii": "Count"}})
    assert counted.data.pii == {"CREDIT_CARD": 60, "EMAIL": 60, "PHONE": 60}
    assert counted.data_hash == plain.data_hash
    assert any("found, and left in place: CREDIT_CARD 60, EMAIL 60, PHONE 60" in w for w in counted.warnings)
    report = bench.run(data={"checks": {**changes["checks"], "pii": "Redact"}})
    assert report.data.pii == counted.data.pii
    assert report.data_hash != plain.data_hash
    assert any("personal data replaced" in w for w in report.warnings)
    prepared = b"".join(bench.object(f"prepare/{name}.json") for name in ("result", "prompts", "preview")).decode()
    assert "what was found is not shown" in prepared
    tokens = " ".join(decoded(bench))
    assert "[EMAIL]" in tokens
    assert "[PHONE], card [CREDIT_CARD]" in tokens
    for text in (prepared, tokens, report.model_dump_json()):
        assert "@example.com" not in text
        assert "212-555" not in text
        assert "4111" not in text


def decoded(bench: Bench) -> list[str]:
    import tempfile
    from pathlib import Path

    from finetune_trainer.prepare.chat import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        bench.s3.get_dir(bench.bucket, "model", Path(folder))
        tokenizer = load_tokenizer(Path(folder), False)
    return [
        tokenizer.decode(ids) for side in ("train", "held_out") for ids in bench.table(side)["input_ids"].to_pylist()
    ]


def test_token_ids_cannot_be_redacted_and_are_refused(bench: Bench) -> None:
    source = {"uri": f"s3://{bench.bucket}/train.jsonl", **REF}
    spec = {**bench.spec, "data": {"train": [{**source, "format": "Tokenized"}], "checks": {"pii": "Redact"}}}
    with pytest.raises(ValueError, match="give texts instead of format: Tokenized"):
        FineTuneJobSpec.model_validate(spec)
    held = {"train": [source], "heldOut": {"sources": [{**source, "format": "Tokenized"}]}, "checks": {"pii": "Redact"}}
    with pytest.raises(ValueError, match="give texts instead of format: Tokenized"):
        FineTuneJobSpec.model_validate({**bench.spec, "data": held})
    bench.put([{"input_ids": [5, 6, 7 + i]} for i in range(20)])
    failed = bench.fails(data={"checks": {"pii": "Redact"}})
    assert failed.reason is Reason.INVALID_CONFIG
    assert "data.train[0] holds token ids" in failed.message


def test_nothing_of_datafog_that_calls_home_is_loaded() -> None:
    code = (
        "import os, sys; import finetune_trainer.prepare.pii; "
        "print(os.environ['DATAFOG_NO_TELEMETRY'], [m for m in sys.modules if m.startswith('datafog') and 'telemetry' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 []\n"


def test_arguments_with_names_of_the_format_are_text() -> None:
    mail = "jane@example.com"
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": {"id": mail, "type": {"role": mail}}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"id": {"description": mail}}}}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    clean = redacted_example(Conversation(turns, [tool]), Counter())
    assert isinstance(clean, Conversation)
    assert "@" not in json.dumps([clean.messages, clean.tools])
    kept = clean.messages[1]["tool_calls"][0]
    assert (kept["id"], kept["type"], clean.messages[0]["role"]) == ("call_1", "function", "user")


@pytest.mark.parametrize(
    "bad",
    [
        '{"messages": "please write to our customer Jane Doe, jane.doe@example-hospital.example"}',
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "mail jane@example.com"}}]}]}',
        "jane@example.com",
    ],
)
def test_what_is_wrong_with_a_row_is_told_without_quoting_it(bench: Bench, bad: str) -> None:
    bench.put([*ROWS, bad])
    loud = bench.fails()
    quiet = bench.fails(data={"checks": {"pii": "Redact"}})
    assert "jane" in loud.message
    assert "jane" not in quiet.message
    assert "train.jsonl:41" in quiet.message
    assert "what was found is not shown" in quiet.message


def test_a_header_that_is_a_row_is_not_quoted(bench: Bench) -> None:
    bench.s3.put(bench.bucket, "train.csv", "jane@example.com,hello\n" * 3)
    source = {"train": [{"uri": f"s3://{bench.bucket}/train.csv", **REF}]}
    assert "jane" in bench.fails(data=source).message
    assert "jane" not in bench.fails(data={**source, "checks": {"pii": "Redact"}}).message
