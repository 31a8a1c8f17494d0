"""Every verification of the train stage has teeth: what was tampered with between save and verify fails the job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load, save

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.results import PREPARE_RESULT, PREPARED_VERSION, RESULT_VERSION, FileRecord, PrepareResult, SourceFile
from finetune_trainer.errors import StageError
from finetune_trainer.prepare import run as prepare
from finetune_trainer.s3 import S3Store
from finetune_trainer.train import run as train
from finetune_trainer.train import save as save_module
from finetune_trainer.train.rows import read_rows
from tests.support.prepare_bench import ROWS, Bench
from tests.support.prepared import PreparedJob, prepare_job, table
from tests.support.trainer_run import merged

ADAPTER = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"
TOKENIZER = "adapter/tokenizer.json"


@pytest.fixture
def job(s3: Any, tiny_model: Path, tmp_path: Path) -> PreparedJob:
    return prepare_job(s3, tmp_path, tiny_model, method={"type": "QLoRA"}, training={"length": {"steps": 8}})


def zero_lora_b(data: bytes) -> bytes:
    tensors = load(data)
    return save({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()})


def without_a_tensor(data: bytes) -> bytes:
    tensors = load(data)
    del tensors[min(tensors)]
    return save(tensors)


def halved_alpha(data: bytes) -> bytes:
    config = json.loads(data)
    return json.dumps({**config, "lora_alpha": config["lora_alpha"] // 2}).encode()


def swapped_tokens(data: bytes) -> bytes:
    tokenizer = json.loads(data)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return json.dumps(tokenizer).encode()


def tamper(monkeypatch: pytest.MonkeyPatch, key: str, change: Callable[[bytes], bytes], *, consistent: bool) -> None:
    """Change a file in the bucket after the upload; ``consistent`` changes its recorded hash too."""
    upload = save_module.upload_adapter

    def uploaded(ctx: Any, folder: Path, output: S3Store) -> list[FileRecord]:
        records = upload(ctx, folder, output)
        changed = output.put_bytes(key, change(output.get_bytes(key)))
        return [changed if consistent and r.path == key else r for r in records]

    monkeypatch.setattr(save_module, "upload_adapter", uploaded)


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        (ADAPTER, zero_lora_b, "held-out loss"),
        (CONFIG, halved_alpha, "held-out loss"),
        (ADAPTER, without_a_tensor, "27 tensors; its configuration needs 28"),
        (TOKENIZER, swapped_tokens, "tokenizer"),
    ],
)
@pytest.mark.parametrize("consistent", [False, True], ids=["bytes", "bytes and hash"])
def test_a_tampered_adapter_folder_fails(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch, key: str, change: Callable[[bytes], bytes], said: str, consistent: bool
) -> None:  # fmt: skip
    tamper(monkeypatch, key, change, consistent=consistent)
    with pytest.raises(StageError, match=said if consistent else "changed: found") as caught:
        train.run(job.context())
    assert caught.value.reason is Reason.VERIFICATION_FAILED
    assert not job.context().workspace_store().exists("train/result.json")


def without_rows(data: bytes) -> bytes:
    return save({n: t for n, t in load(data).items() if not n.startswith("base_model.model.lm_head.")})


def one_row_as_in_the_base(data: bytes) -> bytes:
    tensors = load(data)
    rows = tensors["base_model.model.lm_head.token_adapter.trainable_tokens_delta"]
    rows[-1] = rows[-1].mean()
    return save(tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [(without_rows, "the adapter is not whole: it has trained rows"), (one_row_as_in_the_base, "held-out loss")],
)
def test_an_adapter_that_lacks_a_trained_tokens_row_fails(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes], said: str
) -> None:  # fmt: skip
    spec = {"model": {"newTokens": ["about", "waits"]}, "training": {"length": {"steps": 8}}}
    job = prepare_job(s3, tmp_path, tiny_model, **spec)
    tamper(monkeypatch, ADAPTER, change, consistent=True)
    with pytest.raises(StageError, match=said) as caught:
        train.run(job.context())
    assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_a_vanished_adapter_file_fails(job: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = save_module.upload_adapter

    def uploaded(ctx: Any, folder: Path, output: S3Store) -> list[FileRecord]:
        records = upload(ctx, folder, output)
        output.delete(CONFIG)
        return records

    monkeypatch.setattr(save_module, "upload_adapter", uploaded)
    with pytest.raises(StageError, match="is not there"):
        train.run(job.context())


def test_tampered_prepared_rows_fail_before_training(job: PreparedJob) -> None:
    store = job.context().workspace_store()
    store.put_bytes("prepare/train.parquet", store.get_bytes("prepare/held_out.parquet"))
    with pytest.raises(StageError, match=r"train\.parquet changed") as caught:
        train.run(job.context())
    assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_another_base_than_prepared_fails_before_training(job: PreparedJob) -> None:
    store = job.context().workspace_store()
    result = store.get_model(PREPARE_RESULT, PrepareResult)
    known = SourceFile(path="model.safetensors", size=1, sha256="1" * 64)
    store.put_model(PREPARE_RESULT, result.model_copy(update={"model_files": [known]}))
    with pytest.raises(StageError, match=r"model\.safetensors changed") as caught:
        train.run(job.context())
    assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_prepared_data_of_another_snapshot_are_refused(job: PreparedJob) -> None:
    with pytest.raises(StageError, match="another configuration"):
        train.run(job.with_spec(training={"seed": 7}).context())


def test_other_layers_than_prepare_counted_are_not_trained(job: PreparedJob) -> None:
    store = job.context().workspace_store()
    result = store.get_model(PREPARE_RESULT, PrepareResult)
    more = result.trainable_parameters + 1
    store.put_model(PREPARE_RESULT, result.model_copy(update={"trainable_parameters": more}))
    said = f"{result.trainable_parameters:,} weights would be trained, and the prepare stage counted {more:,}"
    with pytest.raises(StageError, match=said) as caught:
        train.run(job.context())
    assert caught.value.reason is Reason.VERIFICATION_FAILED
    assert not store.exists("train/result.json")


def other_weights(data: bytes) -> bytes:
    return save({n: t + 1 if n == "model.norm.weight" else t for n, t in load(data).items()}, {"format": "pt"})


@pytest.mark.parametrize("scheme", ["s3", "pvc"])
def test_weights_that_were_changed_since_prepare_fail_before_training(
    bench: Bench, tiny_model: Path, scheme: str
) -> None:
    bench.put(ROWS)
    local = bench.pod.volumes / "claim" / "model"
    shutil.copytree(tiny_model, local)
    uri = {"s3": f"s3://{bench.bucket}/model", "pvc": "pvc://claim/model"}[scheme]
    changes = {"model": {"uri": uri}, "training": {"useCpu": True}}
    bench.run(**changes)
    changed = other_weights((local / "model.safetensors").read_bytes())
    (local / "model.safetensors").write_bytes(changed)
    bench.s3.put(bench.bucket, "model/model.safetensors", changed)
    with pytest.raises(
        StageError, match=r"model\.safetensors changed since the prepare stage: it had 503144 bytes and"
    ) as caught:
        train.run(bench.pod.context(merged(bench.spec, changes), Stage.TRAIN))
    assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_a_tampered_tokenizer_fails_although_no_answers_are_wanted(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare_job(
        s3,
        tmp_path,
        tiny_model,
        prompts=3,
        training={"length": {"steps": 1}},
        evaluation={"generation": {"prompts": 0}},
    )
    tamper(monkeypatch, TOKENIZER, swapped_tokens, consistent=True)
    with pytest.raises(StageError, match="the stored tokenizer reads"):
        train.run(job.context())


def test_another_tokenizer_or_template_than_prepares_fails_before_training(job: PreparedJob) -> None:
    store = job.context().workspace_store()
    result = store.get_model(PREPARE_RESULT, PrepareResult)
    store.put_model(PREPARE_RESULT, result.model_copy(update={"tokenizer_hash": "1" * 64}))
    with pytest.raises(StageError, match="is not the one that prepared the data") as caught:
        train.run(job.context())
    assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_results_of_a_newer_image_are_refused_not_taken_for_missing(job: PreparedJob) -> None:
    store = job.context().workspace_store()
    result = json.loads(store.get_bytes(PREPARE_RESULT))
    store.put_bytes(PREPARE_RESULT, json.dumps({**result, "version": RESULT_VERSION + 1, "newField": 1}).encode())
    for stage in (train.run, prepare.run):
        with pytest.raises(
            StageError, match=r"result\.json has version 2; this image reads versions up to 1"
        ) as caught:
            stage(job.context())
        assert caught.value.reason is Reason.INVALID_CONFIG


def test_prepared_rows_of_a_newer_image_are_refused(tmp_path: Path) -> None:
    metadata = {"finetune.prepared_version": str(PREPARED_VERSION + 1)}
    pq.write_table(table([([1, 2], [1, 2])]).replace_schema_metadata(metadata), tmp_path / "train.parquet")
    with pytest.raises(StageError, match=r"train\.parquet has version 2"):
        read_rows(tmp_path / "train.parquet")
