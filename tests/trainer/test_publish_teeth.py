"""Every verification of the publish stage has teeth: what was changed between training and publishing, or while merging, fails the job."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.results import PREPARE_RESULT, PREPARED_HELD_OUT, TRAIN_RESULT, MergeCheck, TrainMetrics
from finetune_trainer.errors import StageError
from finetune_trainer.publish import merged
from finetune_trainer.publish import run as publish
from finetune_trainer.publish.adapter import read_adapter
from finetune_trainer.publish.check import lost_in_rounding, must_agree
from finetune_trainer.publish.merge import BaseWeights
from finetune_trainer.publish.safetensors_stream import Checkpoint
from finetune_trainer.publish.written import check_written
from finetune_trainer.s3 import S3Store
from finetune_trainer.train import run as train
from tests.support.prepared import PreparedJob, prepare_job
from tests.support.tiny_model import build_tiny_model
from tests.trainer.test_publish_merge import WHOLE, adapter_for
from tests.trainer.test_publish_merge import merged as merge_to


@pytest.fixture(scope="module")
def job(s3: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedJob:
    """Trained, to be merged without rounding."""
    made = prepare_job(
        s3, tmp_path_factory.mktemp("job"), tiny_model, training={"length": {"steps": 4}},
        output={"merged": {"enabled": True, "dtype": "float32"}, "workspace": {"retention": "Keep"}},
    )  # fmt: skip
    train.run(made.context())
    return made


def fails(job: PreparedJob) -> StageError:
    with pytest.raises(StageError) as caught:
        publish.run(job.context(Stage.PUBLISH))
    assert caught.value.reason is Reason.VERIFICATION_FAILED
    return caught.value


def test_a_merged_model_that_is_configured_as_another_one_fails(
    job: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is right, and the model is not."""
    write = merged.write_companions

    def spoiled(*given: Any) -> None:
        write(*given)
        config = Path(given[4]) / "config.json"
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "rms_norm_eps": 1e3}))

    with monkeypatch.context() as spoiling:
        spoiling.setattr(merged, "write_companions", spoiled)
        assert "base + adapter have loss" in fails(job).message


def test_a_model_merged_in_float16_passes(job: PreparedJob, restored: S3Store) -> None:
    half = job.with_spec(output={"merged": {"dtype": "float16"}})
    old, new = job.snapshot.digest().encode(), half.snapshot.digest().encode()
    for key in (PREPARE_RESULT, TRAIN_RESULT):
        restored.put_bytes(key, restored.get_bytes(key).replace(old, new))
    publish.run(half.context(Stage.PUBLISH))
    config = json.loads(half.context(Stage.PUBLISH).output_store().get_bytes("merged/config.json"))
    assert config.get("dtype", config.get("torch_dtype")) == "float16"


@pytest.fixture
def restored(job: PreparedJob) -> Any:
    """The workspace, which is as it was afterwards."""
    store = job.context(Stage.PUBLISH).workspace_store()
    kept = {key: store.get_bytes(key) for key in (PREPARE_RESULT, PREPARED_HELD_OUT, TRAIN_RESULT)}
    output = job.context(Stage.PUBLISH).output_store()
    if output.exists("manifest.json"):
        output.delete("manifest.json")
    yield store
    for key, data in kept.items():
        store.put_bytes(key, data)


def gone(store: S3Store, key: str) -> None:
    store.delete(key)


def torn(store: S3Store, key: str) -> None:
    store.put_bytes(key, store.get_bytes(key)[:-1] + b"x")


def anothers(store: S3Store, key: str) -> None:
    store.put_bytes(key, json.dumps({**json.loads(store.get_bytes(key)), "snapshotDigest": "0" * 64}).encode())


@pytest.mark.parametrize(("key", "change", "said"), [
    (PREPARED_HELD_OUT, gone, "has disappeared"),
    (PREPARED_HELD_OUT, torn, "held_out"),
    (TRAIN_RESULT, gone, "result.json is missing: the train stage has not finished"),
    (TRAIN_RESULT, anothers, "was written for another configuration of this job"),
])  # fmt: skip
def test_what_is_gone_or_changed_in_the_workspace_fails(
    job: PreparedJob, restored: S3Store, key: str, change: Callable[[S3Store, str], None], said: str
) -> None:
    change(restored, key)
    assert said in fails(job).message


def test_a_value_that_its_type_cannot_hold_fails_and_says_what_to_do(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({n: t * 1e8 if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    weights = BaseWeights(Checkpoint(base), None)
    for dtype, holds in ((torch.bfloat16, True), (torch.float16, False)):
        folder = tmp_path / str(dtype)
        merge_to(weights, adapter, dtype, folder)
        if holds:
            check_written(weights, read_adapter(adapter), folder)
            continue
        with pytest.raises(
            StageError, match=r"larger than the largest number of their type: set output\.merged\.dtype"
        ):
            check_written(weights, read_adapter(adapter), folder)


def test_a_module_that_was_trained_whole_and_not_written_fails(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter", **WHOLE)
    weights, folder = BaseWeights(Checkpoint(base), None), tmp_path / "merged"
    merge_to(weights, adapter, torch.bfloat16, folder)
    check_written(weights, read_adapter(adapter), folder)
    (file,) = weights.checkpoint.files
    tensors = load_file(folder / file)
    name = "model.norm.weight"
    save_file({**tensors, name: weights.read(name).to(torch.bfloat16)}, folder / file)
    with pytest.raises(StageError, match=r"not base \+ adapter within rounding: model\.norm"):
        check_written(weights, read_adapter(adapter), folder)


def test_a_loss_that_is_no_number_never_agrees() -> None:
    for pair in ((float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0)):
        with pytest.raises(StageError):
            must_agree("the merged model has", *pair, tolerance=0.5, rows=3, absolute=1.0)


def test_what_rounding_takes_of_what_was_learned_is_told() -> None:
    metrics = TrainMetrics.model_construct(held_out_loss_base=3.0, held_out_loss=2.0)
    check = MergeCheck.model_construct(held_out_loss_adapter=2.0, held_out_loss_merged=2.5)
    (warning,) = lost_in_rounding(check, metrics, "bfloat16")
    assert "loses 50 % of what was learned" in warning
    assert lost_in_rounding(check.model_copy(update={"held_out_loss_merged": 2.001}), metrics, "bfloat16") == []
