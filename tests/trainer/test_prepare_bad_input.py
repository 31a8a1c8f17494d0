"""Everything a user can get wrong before training: each fails with its reason and what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FAILURES, Reason
from finetune_trainer.entrypoint import main
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import load_tokenizer
from tests.support import seaweed
from tests.support.hub_server import HubServer
from tests.support.prepare_bench import REF, ROWS, Bench, row
from tests.support.tiny_model import CHATML, build_tiny_model, tokenizer_settings


def test_bad_rows_fail_with_file_line_and_field(bench: Bench) -> None:
    rows: list[Any] = [*ROWS]
    rows[16] = {"messages": [*ROWS[0]["messages"], {"role": "user", "content": None}, ROWS[0]["messages"][1]]}
    rows[20] = {"messages": ROWS[0]["messages"][:1]}
    rows[30] = "<html>"
    bench.put(rows)
    error = bench.fails()
    assert error.reason is Reason.INVALID_DATA
    assert error.message == (
        "3 of 40 rows cannot be used (limit 0). train.jsonl:17 messages[2].content: expected text, found null; "
        "train.jsonl:21 messages: last turn is \"user\", nothing to learn; train.jsonl:31 not JSON (col 1: '<html>')."
    )
    report = bench.run(data={"checks": {"maxBadRows": 3}})
    assert (report.data.rows, report.data.bad_rows, report.data.train_rows + report.data.held_out_rows) == (40, 3, 37)
    assert any("3 rows cannot be used and are left out" in w for w in report.warnings)


def test_many_bad_rows_are_all_counted_and_the_first_are_named(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.put(["x" * 300] * 500 + ROWS)
    error = bench.fails()
    assert error.message.startswith("500 of 540 rows cannot be used (limit 0). train.jsonl:1 not JSON")
    assert error.message.endswith("more, the first 20 in the log.")
    assert len(error.message) < 1500
    assert sum("not JSON" in r.message for r in caplog.records) == 20


def test_a_header_in_another_encoding_is_reported_through_every_channel(bench: Bench, tmp_path: Path) -> None:
    bench.s3.put(bench.bucket, "train.csv", "Größe;Antwort\n1;2\n".encode("latin-1"))
    ctx = bench.context({"data": {"train": [{"uri": f"s3://{bench.bucket}/train.csv", **REF}]}})
    log = tmp_path / "termination-log"
    code = main(["prepare"], environ={}, termination_log=log, context=lambda stage: ctx)
    report = json.loads(log.read_text())
    assert (code, report["reason"]) == (FAILURES[Reason.INVALID_DATA].exit_code, "InvalidData")
    assert r"found Gr\xf6\xdfe, Antwort (the header is not UTF-8: save the file as UTF-8)" in report["message"]


def test_bytes_that_are_not_utf8_are_warned_of_where_bad_rows_are_allowed(bench: Bench) -> None:
    bench.s3.put(
        bench.bucket, "train.csv", b"prompt;completion\n\xe4;a\nq;\xf6\n" + b"".join(b"q%d;a\n" % i for i in range(9))
    )
    source = {"uri": f"s3://{bench.bucket}/train.csv", **REF}
    report = bench.run(data={"train": [source], "checks": {"maxBadRows": 2}})
    assert (report.data.bad_rows, report.data.rows) == (2, 11)


def test_half_a_character_in_a_field_that_only_the_template_reads_is_a_bad_row(bench: Bench) -> None:
    talk = [{"role": "user", "content": "a", "name": "\ud83d"}, {"role": "assistant", "content": "b"}]
    bench.put([*ROWS, {"messages": talk}])
    named = CHATML.replace("message['role'] +", "message['role'] + message['name'] | default('') +")
    bench.s3.put(bench.bucket, "model/tokenizer_config.json", json.dumps(tokenizer_settings(named)))
    error = bench.fails()
    assert error.reason is Reason.INVALID_DATA
    assert "train.jsonl:41 messages: a field beside role and content" in error.message


LONG = row("word " * 200, "answer")
BAD_INPUT: dict[str, tuple[list[Any], dict[str, Any], Reason, str]] = {
    "wrong columns": ([{"question": "q", "answer": "a"}], {}, Reason.INVALID_DATA, "wrong columns: expected messages |"),
    "an empty file": ([], {}, Reason.TOO_FEW_ROWS, "holds no rows"),
    "one row": (ROWS[:1], {}, Reason.TOO_FEW_ROWS, "1 usable row"),
    "one prompt only": ([ROWS[0]] * 5, {}, Reason.TOO_FEW_ROWS, "5 usable rows with one and the same prompt"),
    "empty after filtering": (
        [LONG] * 3, {"training": {"maxSequenceTokens": 16}}, Reason.TOO_FEW_ROWS, "none of 3 rows is left: 0 cannot be used, 3 dropped"
    ),
    "nothing but budgeted bad rows": (
        ["x"] * 3, {"data": {"checks": {"maxBadRows": 9}}}, Reason.TOO_FEW_ROWS, "none of 3 rows is left: 3 cannot be used"
    ),
    "overlength is not allowed": (
        [*ROWS, LONG], {"training": {"maxSequenceTokens": 64}, "data": {"checks": {"overlength": "Fail"}}},
        Reason.INVALID_DATA, "expected at most 64"
    ),
    "unknown target module": (
        ROWS, {"method": {"lora": {"targetModules": ["q_proj", "query"]}}}, Reason.UNKNOWN_TARGET_MODULE,
        "query does not exist in this model, which has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ),
    "what is no regular expression": (
        ROWS, {"evaluation": {"generation": {"metrics": ["Regex"], "regex": "(yes"}}}, Reason.INVALID_CONFIG, "'(yes' is not a regular expression: missing )",
    ),
    "a regular expression that never ends": (
        [row(f"q{i}?", "a" * 40 + "b") for i in range(20)], {"evaluation": {"generation": {"metrics": ["Regex"], "regex": "(a|a)+$"}}},
        Reason.INVALID_CONFIG, "takes more than 1 s on a reference of 41 characters",
    ),
    "the output head": (ROWS, {"method": {"lora": {"targetModules": ["lm_head"]}}}, Reason.INVALID_CONFIG, "cannot be adapted"),
    "no such model": (ROWS, {"model": {"uri": "s3://BUCKET/none"}}, Reason.MODEL_NOT_FOUND, "there is nothing below"),
    "no such bucket": (ROWS, {"output": {"uri": "s3://no-such-bucket/x"}}, Reason.BUCKET_NOT_FOUND, "no-such-bucket"),
    "an unknown column mapping": (
        ROWS, {"data": {"train": [{"uri": "s3://BUCKET/train.jsonl", "columns": {"question": "x"}, **REF}]}}, Reason.INVALID_CONFIG,
        "question is no field"
    ),
    "no such dataset": (
        ROWS, {"data": {"train": [{"uri": "s3://BUCKET/none.jsonl", **REF}]}}, Reason.DATASET_NOT_FOUND, "there is nothing at"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: case)
def test_bad_input_fails_with_reason_and_finding(bench: Bench, case: str) -> None:
    rows, changes, reason, text = BAD_INPUT[case]
    bench.put(rows)
    error = bench.fails(**json.loads(json.dumps(changes).replace("BUCKET", bench.bucket)))
    assert error.reason is reason
    assert text in error.message


@pytest.mark.parametrize("slot", ["model", "output", "train-0"])
def test_wrong_credentials_fail_wherever_they_stand(bench: Bench, slot: str) -> None:
    bench.put(ROWS)
    bench.s3.write_secret(bench.pod.secrets / slot, secret="wrong")
    assert bench.fails().reason is Reason.ACCESS_DENIED


def test_an_output_that_may_only_be_read_is_found_before_the_data_are(bench: Bench) -> None:
    bench.put(["broken"])
    bench.s3.write_secret(bench.pod.secrets / "output", key=seaweed.READER_KEY, secret=seaweed.READER_SECRET)
    error = bench.fails()
    assert error.reason is Reason.ACCESS_DENIED
    assert "PutObject" in error.message


def test_a_gated_model_without_token_fails(bench: Bench, hub: HubServer, tiny_model: Path) -> None:
    bench.put(ROWS)
    hub.add_model("org/tiny", tiny_model, gated=True)
    assert (
        bench.fails(model={"uri": "hf://org/tiny", "endpointURL": hub.endpoint, "secretRef": None}).reason
        is Reason.GATED_MODEL
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"architectures": ["BertModel"]}, "is a BertModel; expected a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already (gptq)"),
    ],
)
def test_models_of_other_kinds_are_refused(bench: Bench, tiny_model: Path, change: dict[str, Any], text: str) -> None:
    bench.put(ROWS)
    config = json.loads((tiny_model / "config.json").read_text())
    bench.s3.put(bench.bucket, "model/config.json", json.dumps({**config, **change}))
    error = bench.fails()
    assert error.reason is Reason.UNSUPPORTED_MODEL
    assert text in error.message


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("config.json", "{", "config.json is not a JSON object"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", None, "has no config.json: it is not a Hugging Face model folder"),
        ("tokenizer.json", "{", "the tokenizer cannot be loaded: "),
        ("tokenizer_config.json", json.dumps({**tokenizer_settings(CHATML), "eos_token": None}), "has no EOS token"),
    ],
)
def test_a_model_folder_that_is_not_whole_is_refused(bench: Bench, file: str, content: str | None, text: str) -> None:
    bench.put(ROWS)
    if content is None:
        bench.s3.client.delete_object(Bucket=bench.bucket, Key=f"model/{file}")
    else:
        bench.s3.put(bench.bucket, f"model/{file}", content)
    error = bench.fails()
    assert error.reason is Reason.UNSUPPORTED_MODEL
    assert text in error.message


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path) -> None:
    """Labels are found by them."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ctrl"}))
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    with pytest.raises(StageError, match=r"CTRLTokenizer has no fast version \(tokenizer\.json\)") as info:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert info.value.reason is Reason.UNSUPPORTED_MODEL


def test_what_is_left_of_no_row_is_said_of_either_side(bench: Bench) -> None:
    bench.put(["x"] * 9)
    allowed = {"maxBadRows": 9}
    error = bench.fails(data={"checks": allowed})
    assert error.reason is Reason.TOO_FEW_ROWS
    assert error.message.startswith("none of 9 rows is left: ")
    bench.put(ROWS, "held.jsonl")
    held_out = {"sources": [{"uri": f"s3://{bench.bucket}/held.jsonl", **REF}]}
    error = bench.fails(data={"checks": allowed, "heldOut": held_out})
    assert error.reason is Reason.TOO_FEW_ROWS
    assert error.message.startswith("no row of data.train is left: ")


def test_conversations_need_a_chat_template_and_texts_do_not(bench: Bench, tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "plain", chat_template=None)
    bench.s3.put_dir(bench.bucket, "plain", tmp_path / "plain")
    plain = {"uri": f"s3://{bench.bucket}/plain"}
    bench.put(ROWS)
    assert bench.fails(model=plain).reason is Reason.CHAT_TEMPLATE_MISSING
    for rows in (
        [{"text": f"text {i}"} for i in range(9)],
        [{"prompt": f"{i}", "completion": "x"} for i in range(9)],
        [{"instruction": f"{i}", "input": "", "output": "x"} for i in range(9)],
    ):
        bench.put(rows)
        assert bench.run(model=plain, training={"seed": len(json.dumps(rows))}).data.train_rows == 8


def test_a_tokenizer_of_another_model_is_noticed(bench: Bench, tiny_model: Path) -> None:
    bench.put(ROWS)
    config = json.loads((tiny_model / "config.json").read_text())
    from safetensors.numpy import load_file, save

    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].copy()
    bench.s3.put(bench.bucket, "model/model.safetensors", save(tensors))
    bench.s3.put(bench.bucket, "model/config.json", json.dumps({**config, "vocab_size": 100}))
    error = bench.fails()
    assert error.reason is Reason.UNSUPPORTED_MODEL
    assert "they do not belong together" in error.message
