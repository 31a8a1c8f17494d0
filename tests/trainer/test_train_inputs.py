"""What training starts from has teeth: each file is the one that prepare recorded, or the job fails before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.results import (
    PREPARE_RESULT,
    PREPARED_ADAPTER,
    PREPARED_HELD_OUT,
    PREPARED_PROMPTS,
    PREPARED_TASK_PROMPTS,
    PREPARED_TASK_ROWS,
    PREPARED_TRAIN,
    FileRecord,
    InitialAdapterRecord,
    PrepareResult,
    SourceFile,
)
from finetune_api.spec import Lora
from finetune_trainer.errors import StageError
from finetune_trainer.s3 import S3Store
from finetune_trainer.train import run as train
from finetune_trainer.train.inputs import fetch_base, fetch_prepared, must_be_unchanged
from tests.support.prepared import PreparedJob, prepare_job

ADAPTER = f"{PREPARED_ADAPTER}/adapter_model.safetensors"
MORE = (ADAPTER, PREPARED_TASK_ROWS, PREPARED_TASK_PROMPTS)


@pytest.fixture
def job(s3: Any, tiny_model: Path, tmp_path: Path) -> PreparedJob:
    """Goes on from an adapter, and has tasks."""
    made = prepare_job(s3, tmp_path, tiny_model)
    store = made.context().workspace_store()
    result = store.get_model(PREPARE_RESULT, PrepareResult)
    files = [*result.files, *(store.put_bytes(name, name.encode()) for name in MORE)]
    adapter = InitialAdapterRecord(uri="pvc://claim/adapter", lora=Lora())
    store.put_model(PREPARE_RESULT, result.model_copy(update={"files": files, "initial_adapter": adapter}))
    return made


def gone(store: S3Store, key: str) -> None:
    store.delete(key)


def torn(store: S3Store, key: str) -> None:
    store.put_bytes(key, store.get_bytes(key)[:-1] + b"?")


def shortened(store: S3Store, key: str) -> None:
    store.put_bytes(key, store.get_bytes(key)[:-1])


@pytest.mark.parametrize(
    ("change", "said"), [(gone, "has disappeared"), (torn, "changed: found"), (shortened, "bytes")]
)
@pytest.mark.parametrize("key", [PREPARED_TRAIN, PREPARED_HELD_OUT, PREPARED_PROMPTS, *MORE])
def test_a_file_that_is_gone_or_changed_fails(
    job: PreparedJob, key: str, change: Callable[[S3Store, str], None], said: str
) -> None:
    ctx = job.context()
    store = ctx.workspace_store()
    whole = fetch_prepared(job.context(), store)
    assert whole.initial_adapter is not None
    assert whole.tasks is not None
    change(store, key)
    with pytest.raises(StageError, match=said) as caught:
        fetch_prepared(ctx, store)
    assert caught.value.reason is Reason.VERIFICATION_FAILED
    assert key in caught.value.message


def test_other_bytes_that_an_earlier_try_left_here_are_fetched_again(job: PreparedJob) -> None:
    ctx = job.context()
    left = fetch_prepared(ctx, ctx.workspace_store()).held_out
    right = left.read_bytes()
    left.write_bytes(right[:-1] + b"?")
    assert fetch_prepared(ctx, ctx.workspace_store()).held_out.read_bytes() == right


def test_without_a_result_of_prepare_nothing_is_trained(job: PreparedJob) -> None:
    job.context().workspace_store().delete(PREPARE_RESULT)
    with pytest.raises(StageError, match=r"prepare/result\.json is missing: the prepare stage has not finished") as e:
        train.run(job.context())
    assert e.value.reason is Reason.VERIFICATION_FAILED


def test_a_base_that_lacks_a_file_fails(job: PreparedJob) -> None:
    expected = [SourceFile(path="model-00002.safetensors", size=1)]
    with pytest.raises(StageError, match=r"the base model has no model-00002\.safetensors any more") as caught:
        fetch_base(job.context(), None, expected, limit_seconds=None)
    assert caught.value.reason is Reason.VERIFICATION_FAILED


@pytest.mark.parametrize(
    ("known", "now", "fails"),
    [
        ({"size": 5}, None, False),
        ({"size": 5, "version": "a"}, None, False),
        ({"size": 5, "version": "a"}, "a", False),
        ({"size": 5, "sha256": "1" * 64}, "b", False),
        ({"size": 4}, None, True),
        ({"size": 5, "version": "a"}, "b", True),
        ({"size": 5, "sha256": "2" * 64}, None, True),
    ],
)
def test_whatever_both_stages_know_of_a_file_must_agree(known: dict[str, Any], now: str | None, fails: bool) -> None:
    found = FileRecord(path="f", size=5, sha256="1" * 64)
    expected = SourceFile(path="f", **known)
    if not fails:
        must_be_unchanged(found, now, expected, "f")
        return
    with pytest.raises(StageError, match="f changed") as caught:
        must_be_unchanged(found, now, expected, "f")
    assert caught.value.reason is Reason.VERIFICATION_FAILED
