"""The publish stage on what the train stage left, and on what somebody tampered with."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.results import (
    MANIFEST,
    PREPARE_RESULT,
    SCORES_FILE,
    TRAIN_RESULT,
    Answer,
    Manifest,
    PrepareResult,
    PreviewRow,
    RunPlan,
    Scores,
    TrainResult,
)
from finetune_api.scores import JudgeVerdict
from finetune_api.snapshot import Snapshot, resolve_plan
from finetune_api.spec import Method, Training
from finetune_trainer.errors import StageError
from finetune_trainer.private import without_credentials
from finetune_trainer.publish import run as publish
from finetune_trainer.publish.card import held_out_overlap, vllm_rank
from finetune_trainer.publish.facts import cost_facts, data_facts, method_facts
from finetune_trainer.publish.report import html_report
from finetune_trainer.publish.scores import publish_scores, score_rows
from finetune_trainer.publish.text_metrics import text_metrics
from finetune_trainer.train import evaluate, inputs, model
from finetune_trainer.train import run as train
from finetune_trainer.train.device import pick_compute
from tests.support.fault_proxy import FaultProxy
from tests.support.judge_server import JudgeServer
from tests.support.prepared import PreparedJob, deep_merge, prepare_job
from tests.support.served_layout import check_model_folder, check_tokenizer
from tests.support.tiny_model import build_tiny_model

MERGED = {"output": {"merged": {"enabled": True}, "workspace": {"retention": "Keep"}}}


@pytest.fixture(scope="module", params=["LoRA", "QLoRA"])
def trained(request: pytest.FixtureRequest, s3: Any, tmp_path_factory: Any) -> PreparedJob:
    """A trained job on a sharded base, to be published as it is."""
    folder = tmp_path_factory.mktemp("job")
    base = build_tiny_model(folder / "base", shards=2, tied=request.param == "QLoRA")
    job = prepare_job(s3, folder, base, method={"type": request.param}, **MERGED)
    train.run(job.context())
    (folder / "bucket").write_text(job.bucket)
    return job


@pytest.fixture
def copy(trained: PreparedJob, s3: Any, tmp_path: Path) -> PreparedJob:
    """The trained job's bucket once more, to tamper with."""
    bucket = s3.new_bucket()
    for key in s3.keys(trained.bucket):
        if key.endswith(MANIFEST) or "/attempts/publish-" in key:
            continue
        s3.put(bucket, key, s3.client.get_object(Bucket=trained.bucket, Key=key)["Body"].read())
    # Only the bucket's name differs, so the digest in the results is brought up to date.
    text = trained.snapshot.model_dump_json(by_alias=True).replace(trained.bucket, bucket)
    job = replace(trained, snapshot=Snapshot.model_validate_json(text), bucket=bucket)
    store = job.context(Stage.PUBLISH).workspace_store()
    for key in ("prepare/result.json", TRAIN_RESULT):
        store.put_bytes(
            key, store.get_bytes(key).replace(trained.snapshot.digest().encode(), job.snapshot.digest().encode())
        )
    return job


@pytest.fixture(scope="module")
def published(trained: PreparedJob) -> PreparedJob:
    publish.run(trained.context(Stage.PUBLISH))
    return trained


def manifest_of(job: PreparedJob) -> Manifest:
    return job.context(Stage.PUBLISH).output_store().get_model(MANIFEST, Manifest)


def test_the_manifest_lists_every_file_with_its_hash(published: PreparedJob, s3: Any) -> None:
    manifest = manifest_of(published)
    store = published.context(Stage.PUBLISH).output_store()
    listed = {f.path for f in manifest.files}
    present = {i.key for i in store.list() if not i.key.startswith("workspace/")}
    assert present == listed | {MANIFEST}
    assert {
        "adapter/README.md",
        "merged/README.md",
        "merged/model.safetensors.index.json",
        "reports/metrics.jsonl",
        "reports/metrics.json",
        "reports/index.html",
    } <= listed
    folder = published.context(Stage.PUBLISH).work_dir
    for record in manifest.files:
        assert store.download_file(record.path, folder / record.path) == record
    assert manifest.merge_check is not None
    assert manifest.merge_check.relative_difference < 0.01
    assert manifest.warnings == []


def test_the_manifest_has_what_was_planned_beside_what_was_measured(copy: PreparedJob) -> None:
    store = copy.context(Stage.PUBLISH).workspace_store()
    plan = RunPlan(
        method=copy.snapshot.plan.method.type,
        split=copy.snapshot.split,
        needed_bytes=3,
        peak_allocated_bytes=2,
        estimated_seconds=5.0,
        verified=True,
        summary="so",
    )
    prepared = store.get_model(PREPARE_RESULT, PrepareResult)
    store.put_model(PREPARE_RESULT, prepared.model_copy(update={"plan": plan}))
    publish.run(copy.context(Stage.PUBLISH))
    manifest = manifest_of(copy)
    assert manifest.plan == plan
    assert manifest.metrics.train_seconds > 0
    assert manifest.metrics.peak_gpu_bytes is None, "measured on GPUs only"


def test_the_merged_model_answers_as_base_and_adapter_do(published: PreparedJob, s3: Any, tmp_path: Path) -> None:
    store = published.context(Stage.PUBLISH).output_store()
    s3.get_dir(published.bucket, f"{store.location.key}/merged", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert not hasattr(merged.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompts = inputs.PROMPTS.validate_json(published.context().workspace_store().get_bytes("prepare/prompts.json"))
    compute = pick_compute(Training(use_cpu=True))  # as in training
    answers = evaluate.greedy_answers(merged.to(compute.dtype), [p.input_ids for p in prompts], tokenizer, compute, 8)
    assert answers == [a["tuned"] for a in json.loads(store.get_bytes("reports/answers.json"))]
    assert tokenizer.chat_template


def test_the_report_has_curves_answers_and_numbers_and_is_served_as_a_page(published: PreparedJob) -> None:
    store = published.context(Stage.PUBLISH).output_store()
    page = store.get_bytes("reports/index.html").decode()
    manifest = manifest_of(published)
    assert f"{manifest.metrics.held_out_loss_base:.4f} → {manifest.metrics.held_out_loss:.4f}" in page
    assert manifest.data_hash in page
    assert page.count("<svg") == 4
    for answer in json.loads(store.get_bytes("reports/answers.json")):
        assert escape(answer["tuned"]) in page
    head = store._client.head_object(Bucket=published.bucket, Key=f"{store.location.key}/reports/index.html")
    assert head["ContentType"] == "text/html; charset=utf-8"
    trained = published.context().workspace_store().get_model(TRAIN_RESULT, TrainResult)
    bare = html_report(published.snapshot, manifest, trained, b"", b"[]", b"[]")
    assert "<svg" not in bare, "and a run without a single finite number has a page, too"


def test_page_and_card_tell_the_same_facts(published: PreparedJob) -> None:
    store = published.context(Stage.PUBLISH).output_store()
    workspace = published.context().workspace_store()
    trained, prepared = (
        workspace.get_model(TRAIN_RESULT, TrainResult),
        workspace.get_model(PREPARE_RESULT, PrepareResult),
    )
    method = published.snapshot.plan.method
    facts = [
        *method_facts(published.snapshot, method, prepared.plan, trained),
        *data_facts(published.snapshot, prepared.data),
        *cost_facts(prepared.plan, trained),
    ]
    page, card = (store.get_bytes(f).decode() for f in ("reports/index.html", "adapter/README.md"))
    for name, value in facts:
        assert f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" in page
        assert f"| {name} | {value} |\n" in card
    values = dict(facts)
    assert values["base weights"] == ("4 bit NF4, double quantization" if method.quantization else trained.base_dtype)
    assert values["rows"].startswith(f"{prepared.data.rows:,}: {prepared.data.train_rows:,} trained on")
    assert "95 %" in values["row lengths"]
    assert f"{trained.metrics.tokens_per_second:,.0f} tokens/s" in values["device"]


def test_facts_tell_of_8_bit_and_of_a_rank_that_is_published_otherwise(published: PreparedJob) -> None:
    trained = published.context().workspace_store().get_model(TRAIN_RESULT, TrainResult)
    given = {"type": "QLoRA", "quantization": {"type": "Int8"}, "lora": {"initialization": "PiSSA"}}
    spec = published.snapshot.spec.model_copy(update={"method": Method.model_validate(given)})
    values = dict(method_facts(published.snapshot, resolve_plan(spec).method, None, trained))
    assert values["base weights"] == "8 bit Int8"
    assert "initialized by PiSSA (published with twice the rank and alpha)" in values["method"]


def test_the_page_has_every_section_and_needs_nothing_else(published: PreparedJob) -> None:
    store, manifest = published.context(Stage.PUBLISH).output_store(), manifest_of(published)
    page = store.get_bytes("reports/index.html").decode()
    sections = [
        "Loss",
        "Learning rate",
        "Base and tuned, side by side",
        "Verified",
        "Data",
        "Method",
    ]
    for section in [*sections, "Memory and time", "Lineage"]:
        assert f"<h2>{section}" in page
    for stage in ("train", "publish"):
        assert f"<tr><th>{stage}</th><td>" in page, "how long it took"
    assert "The specification" in page
    assert f"&#34;uri&#34;: &#34;{published.snapshot.spec.model.uri}&#34;" in page, "what was asked"
    assert manifest.snapshot_digest in page
    assert all(f"{name} {version}" in page for name, version in manifest.versions.items())
    assert "default-src 'none'" in page, "a browser loads nothing from elsewhere"
    assert not re.findall(r"<(?:script|link|img|iframe)|url\(|@import", page)


def test_the_layouts_that_inference_servers_expect(published: PreparedJob, s3: Any, tmp_path: Path) -> None:
    """vLLM, TGI and Ollama read a folder of the Hub's layout; for the adapter vLLM asks for peft's LoRA type, its rank, and halves of nothing but
    linear layers."""
    key = published.context(Stage.PUBLISH).output_store().location.key
    for folder in ("merged", "adapter"):
        s3.get_dir(published.bucket, f"{key}/{folder}", tmp_path / folder)
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    assert check_model_folder(merged, "bfloat16")["architectures"] == ["LlamaForCausalLM"]
    assert len(list(merged.glob("*.safetensors"))) > 1
    check_tokenizer(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["task_type"], settings["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert not settings["modules_to_save"]
    halves = r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert [name for name in tensors if not re.fullmatch(halves, name)] == []
    ranks = {min(tensor.shape) for tensor in tensors.values()}
    assert ranks == {settings["r"]}
    card = (adapter / "README.md").read_text()
    assert settings["r"] <= 8
    assert "--max-lora-rank 8 " in card, "the next of the ranks that vLLM takes"
    lora = published.snapshot.plan.method.lora
    assert [vllm_rank(lora.model_copy(update={"rank": r})) for r in (1, 8, 9, 500, 513)] == [8, 8, 16, 512, None]
    assert vllm_rank(lora.model_copy(update={"use_dora": True})) is None


def test_the_scores_of_base_and_tuned_model_stand_in_all_places(published: PreparedJob) -> None:
    store = published.context(Stage.PUBLISH).output_store()
    scores, manifest = store.get_model(SCORES_FILE, Scores), manifest_of(published)
    answers = [Answer.model_validate(a) for a in json.loads(store.get_bytes("reports/answers.json"))]
    expected, _ = text_metrics(answers, published.snapshot.spec.evaluation.generation.metrics, None)
    assert expected is not None
    assert (expected.answers, expected.references) == (2, 2)
    assert scores.text == manifest.text_metrics == publish.report(manifest).text_metrics == expected
    assert (scores.held_out.base.loss, scores.held_out.tuned.loss, scores.held_out.rows) == (
        manifest.metrics.held_out_loss_base, manifest.metrics.held_out_loss, 8,
    )  # fmt: skip
    accuracy = (scores.held_out.base.token_accuracy, scores.held_out.tuned.token_accuracy)
    assert accuracy == (manifest.metrics.token_accuracy_base, manifest.metrics.token_accuracy) != (None, None)
    page, card = store.get_bytes("reports/index.html").decode(), store.get_bytes("adapter/README.md").decode()
    for label, base, tuned in score_rows(expected):
        assert f"<tr><td>{label}</td><td>{base}</td><td>{tuned}</td></tr>" in page
        assert f"| {label} | {base} | {tuned} |\n" in card
    assert "2 prompts, 2 with a reference" in page
    assert f"{100 * accuracy[0]:.1f} → {100 * accuracy[1]:.1f} %</b>" in page
    assert f"| {100 * accuracy[0]:.1f} % | {100 * accuracy[1]:.1f} % |" in card


def test_scores_of_an_earlier_execution_are_taken_only_if_they_are_of_these_answers(copy: PreparedJob) -> None:
    ctx = copy.context(Stage.PUBLISH)
    output, workspace = ctx.output_store(), ctx.workspace_store()
    trained, prepared = (
        workspace.get_model(TRAIN_RESULT, TrainResult),
        workspace.get_model(PREPARE_RESULT, PrepareResult),
    )
    first, record = publish_scores(ctx, prepared, trained, output, workspace)
    assert record.path == SCORES_FILE
    output.put_model(SCORES_FILE, first.model_copy(update={"warnings": ["kept"]}))
    assert publish_scores(ctx, prepared, trained, output, workspace)[0].warnings == ["kept"]
    for change in ({"snapshot_digest": "0" * 64}, {"answers_sha256": "0" * 64}):
        output.put_model(SCORES_FILE, first.model_copy(update={"warnings": ["kept"], **change}))
        assert publish_scores(ctx, prepared, trained, output, workspace)[0] == first
    output.put_bytes(SCORES_FILE, b"{torn")
    assert publish_scores(ctx, prepared, trained, output, workspace)[0] == first


KEY = "sk-very-secret"


def asking(job: PreparedJob, url: str) -> PreparedJob:
    """The same training, to be published with a judge and without a merge."""
    judge = {"endpointURL": url, "model": "judge-1", "secretRef": {"name": "openai"}}
    asked = job.with_spec(evaluation={"judge": judge}, output={"merged": {"enabled": False}})
    (job.folder / "secrets" / "judge").mkdir(exist_ok=True)
    (job.folder / "secrets" / "judge" / "OPENAI_API_KEY").write_text(KEY)
    return with_results(job, asked)


def with_results(job: PreparedJob, changed: PreparedJob) -> PreparedJob:
    """The changed job, of which the results of earlier stages count as its own."""
    store = job.context(Stage.PUBLISH).workspace_store()
    for key in (PREPARE_RESULT, TRAIN_RESULT):
        old, new = job.snapshot.digest().encode(), changed.snapshot.digest().encode()
        store.put_bytes(key, store.get_bytes(key).replace(old, new))
    return changed


def test_the_judges_verdict_stands_in_all_places_and_the_key_in_none(
    copy: PreparedJob, s3: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    tuned = {a["tuned"] for a in json.loads(copy.context().output_store().get_bytes("reports/answers.json"))}
    with JudgeServer(lambda a, b: "[[A]]" if a in tuned else "[[B]]") as server:
        job = asking(copy, server.url)
        report = publish.run(job.context(Stage.PUBLISH))
        again = publish.run(job.context(Stage.PUBLISH, execution="execution-9"))
    store = job.context(Stage.PUBLISH).output_store()
    expected = JudgeVerdict(model="judge-1", pairs=2, wins=2, ties=0, losses=0, invalid=0)
    assert (
        report.judge == again.judge == manifest_of(job).judge == store.get_model(SCORES_FILE, Scores).judge == expected
    )
    assert len(server.requests) == 4, "not asked again"
    assert "user: What about volume 100?" in server.requests[0]["messages"][1]["content"]
    assert "Judged by judge-1" in store.get_bytes("reports/index.html").decode()
    assert "`judge-1` compared 2 pairs of answers" in store.get_bytes("adapter/README.md").decode()
    assert server.keys == [f"Bearer {KEY}"] * 4
    assert KEY not in caplog.text
    for key in s3.keys(job.bucket):
        assert KEY.encode() not in s3.client.get_object(Bucket=job.bucket, Key=key)["Body"].read(), key


def test_a_signed_address_is_published_nowhere_with_its_signature(copy: PreparedJob, s3: Any) -> None:
    signature = "5f2e-signature"
    uri = f"https://data.example.com/train.jsonl?X-Amz-Signature={signature}"
    job = with_results(copy, copy.with_spec(data={"train": [{"uri": uri}]}, output={"merged": {"enabled": False}}))
    publish.run(job.context(Stage.PUBLISH))
    manifest = manifest_of(job)
    assert job.snapshot.spec.data.train[0].uri == uri
    assert manifest.snapshot_digest == job.snapshot.digest()
    assert Snapshot.model_validate(manifest.config).spec.data.train[0].uri == "https://data.example.com/train.jsonl"
    published = s3.keys(job.bucket, f"{job.context().output_store().location.key}/")
    assert len(published) > 5
    for key in published:
        assert signature.encode() not in s3.client.get_object(Bucket=job.bucket, Key=key)["Body"].read(), key


def test_a_judge_that_is_away_costs_the_verdict_and_not_the_job(
    copy: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.waiting.pause", lambda _: None)
    job = asking(copy, "http://127.0.0.1:1/v1")
    report = publish.run(job.context(Stage.PUBLISH))
    manifest = manifest_of(job)
    assert manifest.judge is not None
    assert manifest.judge.pairs == 0
    assert [w for w in manifest.warnings if "the judge gave a verdict on 0 of 2 pairs" in w] == report.warnings
    assert "cannot be reached" in report.warnings[0]
    page = job.context(Stage.PUBLISH).output_store().get_bytes("reports/index.html").decode()
    assert "No verdict: http://127.0.0.1:1/v1/chat/completions cannot be reached" in page


@pytest.mark.parametrize("prompts", [0, 2])
def test_rows_stand_in_the_report_only_where_answers_do(published: PreparedJob, prompts: int) -> None:
    trained = published.context().workspace_store().get_model(TRAIN_RESULT, TrainResult)
    preview = PreviewRow(source="f:1", length=9, input_ids=[7], tokens=["<secret>"], learned=[True])
    run = deep_merge(published.snapshot.to_json_dict(), {"spec": {"evaluation": {"generation": {"prompts": prompts}}}})
    rows = json.dumps([preview.to_json_dict()]).encode()
    page = html_report(Snapshot.model_validate(run), manifest_of(published), trained, b"", b"[]", rows)
    assert page.count("&lt;secret&gt;</b>") == min(1, prompts)
    assert ("and 8 tokens more" in page) is bool(prompts)


def test_addresses_in_the_report_hold_no_credentials() -> None:
    signed = "https://user:pass@example.com/a.jsonl?X-Amz-Signature=abc#f"
    assert without_credentials({"uri": signed, "n": 1, "list": ["s3://a/b?c"]}) == {
        "uri": "https://example.com/a.jsonl",
        "n": 1,
        "list": ["s3://a/b?c"],
    }


def test_the_card_has_front_matter_and_numbers(published: PreparedJob) -> None:
    store = published.context(Stage.PUBLISH).output_store()
    card = store.get_bytes("adapter/README.md").decode()
    assert card.startswith("---\n")
    assert "library_name: peft" in card
    assert "pipeline_tag: text-generation" in card
    assert f"{manifest_of(published).metrics.held_out_loss:.4f}" in card
    assert "library_name: transformers" in store.get_bytes("merged/README.md").decode()


def test_the_card_says_how_far_the_held_out_rows_were_trained_on(published: PreparedJob) -> None:
    card = published.context(Stage.PUBLISH).output_store().get_bytes("adapter/README.md").decode()
    assert "learned tokens; none of their prompts is trained on." in card
    data = manifest_of(published).data.model_copy(update={"held_out_overlap_rows": 3})
    assert held_out_overlap(data) == "**3 of them ask a prompt that is trained on, so these losses are too good**"


def test_the_manifest_tells_the_bases_files_and_every_execution(copy: PreparedJob, s3: Any) -> None:
    failed = copy.context(Stage.PUBLISH, execution="failed-1")
    s3.put(copy.bucket, f"{copy.snapshot.output.key}/adapter/adapter_config.json", "{}")
    with pytest.raises(StageError):
        publish.run(failed)
    good = s3.client.get_object(Bucket=original(copy), Key=f"{copy.snapshot.output.key}/adapter/adapter_config.json")
    s3.put(copy.bucket, f"{copy.snapshot.output.key}/adapter/adapter_config.json", good["Body"].read())
    publish.run(copy.context(Stage.PUBLISH, execution="done-1"))
    manifest = manifest_of(copy)
    result = copy.context().workspace_store().get_model(TRAIN_RESULT, TrainResult)
    assert manifest.base_files == result.base_files
    assert any(f.path.endswith(".safetensors") for f in manifest.base_files)
    assert [(a.stage, a.execution_id, a.completed) for a in manifest.attempts] == [
        ("prepare", "execution-0", True),
        ("train", "execution-1", True),
        ("publish", "failed-1", False),
        ("publish", "done-1", True),
    ]
    assert all(a.started_at for a in manifest.attempts[1:])


def original(copy: PreparedJob) -> str:
    """The bucket that a copy was made of."""
    return (copy.folder / "bucket").read_text()


def test_a_train_result_made_with_another_tokenizer_fails(copy: PreparedJob) -> None:
    workspace = copy.context(Stage.PUBLISH).workspace_store()
    result = workspace.get_model(TRAIN_RESULT, TrainResult)
    workspace.put_model(TRAIN_RESULT, result.model_copy(update={"tokenizer_hash": "1" * 64}))
    fails(copy, "another tokenizer or chat template")


def test_a_manifest_of_a_newer_image_is_left_alone(copy: PreparedJob) -> None:
    output = copy.context(Stage.PUBLISH).output_store()
    output.put_bytes(MANIFEST, b'{"version": 2}')
    with pytest.raises(StageError, match="has version 2; this image reads versions up to 1"):
        publish.run(copy.context(Stage.PUBLISH))
    assert output.get_bytes(MANIFEST) == b'{"version": 2}'


def test_a_published_job_is_not_published_again(published: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    before = manifest_of(published)
    monkeypatch.setattr(publish, "fetch_published", lambda *_: pytest.fail("published again"))
    report = publish.run(published.context(Stage.PUBLISH, execution="execution-9"))
    assert report.merge_check == before.merge_check
    assert manifest_of(published) == before


def test_uploads_that_an_earlier_pod_began_are_removed_before_anything_else(copy: PreparedJob, s3: Any) -> None:
    begin_uploads(copy, s3)
    copy.context(Stage.PUBLISH).output_store().delete("adapter/adapter_model.safetensors")
    fails(copy, "has disappeared since training")
    assert uploads_in(copy, s3) == []


def test_uploads_that_are_left_when_all_is_published_are_removed(published: PreparedJob, s3: Any) -> None:
    begin_uploads(published, s3)
    publish.run(published.context(Stage.PUBLISH))
    assert uploads_in(published, s3) == []


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        ({}, set()),
        ({"recovery": {"checkpoint": {"retention": "Keep"}}}, {"checkpoints"}),
        ({"output": {"workspace": {"retention": "Keep"}}}, {"prepare", "train", "attempts"}),
    ],
    ids=["nothing", "checkpoints", "rows"],
)
def test_of_the_workspace_only_what_was_asked_for_is_kept(
    s3: Any, tiny_model: Path, tmp_path: Path, spec: dict[str, Any], left: set[str]
) -> None:
    ctx = prepare_job(s3, tmp_path, tiny_model, **spec).context(Stage.PUBLISH)
    workspace = ctx.workspace_store()
    for folder in ("train", "attempts", "checkpoints"):
        workspace.put_bytes(f"{folder}/x", b"x")
    publish.clean_up(ctx, ctx.output_store(), workspace)
    assert {info.key.split("/")[0] for info in workspace.list("")} == left


def begin_uploads(job: PreparedJob, s3: Any) -> None:
    """As a pod does that is killed before it has sent all parts."""
    for key in (f"{job.snapshot.output.key}/merged/x", f"{job.snapshot.workspace.key}/checkpoints/1/x"):
        s3.client.create_multipart_upload(Bucket=job.bucket, Key=key)
    assert len(uploads_in(job, s3)) == 2


def uploads_in(job: PreparedJob, s3: Any) -> list[str]:
    return [u["Key"] for u in s3.client.list_multipart_uploads(Bucket=job.bucket).get("Uploads", [])]


def zero_lora_b(data: bytes) -> bytes:
    return save({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in load(data).items()})


def halved_alpha(data: bytes) -> bytes:
    config = json.loads(data)
    return json.dumps({**config, "lora_alpha": config["lora_alpha"] // 2}).encode()


@pytest.mark.parametrize(
    ("key", "change"),
    [("adapter/adapter_model.safetensors", zero_lora_b), ("adapter/adapter_config.json", halved_alpha)],
)
@pytest.mark.parametrize("consistent", [False, True], ids=["bytes", "bytes and hash"])
def test_an_adapter_changed_after_training_fails(
    copy: PreparedJob, key: str, change: Callable[[bytes], bytes], consistent: bool
) -> None:
    output, workspace = copy.context(Stage.PUBLISH).output_store(), copy.context(Stage.PUBLISH).workspace_store()
    changed = output.put_bytes(key, change(output.get_bytes(key)))
    if consistent:
        result = workspace.get_model(TRAIN_RESULT, TrainResult)
        files = [changed if f.path == key else f for f in result.adapter_files]
        workspace.put_model(TRAIN_RESULT, result.model_copy(update={"adapter_files": files}))
    fails(copy, "training measured" if consistent else "changed: found")


@pytest.mark.parametrize("consistent", [False, True], ids=["bytes", "bytes and hash"])
def test_another_base_fails(copy: PreparedJob, s3: Any, tmp_path: Path, consistent: bool) -> None:
    tied = copy.snapshot.plan.method.quantization is not None
    other = build_tiny_model(tmp_path / "other", seed=5, shards=2, tied=tied)
    s3.put_dir(copy.bucket, "base", other)
    if consistent:
        workspace = copy.context(Stage.PUBLISH).workspace_store()
        result = workspace.get_model(TRAIN_RESULT, TrainResult)
        files = inputs.hash_files(other, [f.path for f in result.base_files])
        workspace.put_model(TRAIN_RESULT, result.model_copy(update={"base_files": files}))
    fails(copy, "(training measured|quantizes to other values)" if consistent else "changed: found")


def test_a_wrongly_merged_tensor_fails(copy: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    # A merge that forgets one shard's updates: right names, right shapes, right hashes of wrong weights.
    from finetune_trainer.publish import merge

    parts = merge.merged_parts

    def forgetful(base: Any, adapter: Any, info: Any) -> Any:
        if info.file.startswith("model-00001"):
            return (rows.to(info.dtype) for _, rows in base.rows(info.name))
        return parts(base, adapter, info)

    monkeypatch.setattr(merge, "merged_parts", forgetful)
    fails(copy, "tensors of the merged model are not base [+] adapter within rounding")


def fails(job: PreparedJob, said: str) -> None:
    context = job.context(Stage.PUBLISH)
    with pytest.raises(StageError, match=said) as caught:
        publish.run(context)
    assert caught.value.reason is Reason.VERIFICATION_FAILED
    assert not context.output_store().exists(MANIFEST)


def test_without_a_merge_neither_torch_nor_the_base_is_needed(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    job = prepare_job(s3, tmp_path, tiny_model, training={"length": {"steps": 2}})
    begin_uploads(job, s3)
    train.run(job.context())
    assert uploads_in(job, s3) == [], "the train stage removes what earlier pods left"
    context = job.context(Stage.PUBLISH)
    script = tmp_path / "publish.py"
    script.write_text(
        "import sys, pathlib\n"
        "from finetune_api.names import Stage\n"
        "from finetune_api.snapshot import Snapshot\n"
        "from finetune_trainer.context import StageContext\n"
        "from finetune_trainer.publish.run import run\n"
        "from finetune_trainer.reporter import Reporter\n"
        "snapshot, work, secrets = sys.argv[1:]\n"
        "ctx = StageContext(Snapshot.model_validate_json(pathlib.Path(snapshot).read_text()), Stage.PUBLISH, 'e',\n"
        "    pathlib.Path(work), pathlib.Path(secrets), pathlib.Path('/none'), Reporter(Stage.PUBLISH, 'e'))\n"
        "report = run(ctx)\n"
        "assert report.merged_bytes is None and report.files > 5, report\n"
        "loaded = {'torch', 'transformers', 'peft', 'bitsandbytes', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    (tmp_path / "snapshot.json").write_text(job.snapshot.canonical_json())
    arguments = [script, tmp_path / "snapshot.json", context.work_dir, context.secrets_dir]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The workspace, a copy of the rows, is gone; results stay.
    assert s3.keys(job.bucket, job.snapshot.workspace.key) == []
    assert manifest_of(job).snapshot_digest == job.snapshot.digest()


def test_credentials_that_may_not_delete_publish_too(copy: PreparedJob, s3: Any, s3_proxy: FaultProxy) -> None:
    s3.put(copy.bucket, f"{copy.snapshot.output.key}/merged/left-behind", "by an earlier execution")
    context = copy.context(Stage.PUBLISH)
    s3.write_secret(context.secrets_dir / "output", endpoint=s3_proxy.endpoint)
    s3_proxy.faults.refused_deletes = -1
    try:
        publish.run(context)
    finally:
        s3.write_secret(context.secrets_dir / "output")
    assert "merged/left-behind" not in {f.path for f in manifest_of(copy).files}


def test_a_manifest_that_is_not_whole_is_withdrawn_first(copy: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    store = copy.context(Stage.PUBLISH).output_store()
    store.put_bytes(MANIFEST, b"{}")
    store.delete("adapter/adapter_model.safetensors")
    fails(copy, "has disappeared since training")


def test_a_tuned_tokenizer_reads_as_the_base_does(published: PreparedJob, s3: Any, tmp_path: Path) -> None:
    s3.get_dir(published.bucket, f"{published.snapshot.output.key}/adapter", tmp_path)
    tokenizer = model.load_tokenizer(tmp_path, published.snapshot)
    assert tokenizer("The pod runs.")["input_ids"]
