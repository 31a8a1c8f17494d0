"""Method Full from the prepared job to the published model: what is trained, stored, resumed, verified and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from transformers import AutoModelForCausalLM

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.results import (
    MANIFEST,
    PREPARE_RESULT,
    TRAIN_RESULT,
    WEIGHTS_DIR,
    WEIGHTS_FILE,
    Manifest,
    PrepareResult,
    TrainedWeights,
    TrainResult,
)
from finetune_trainer.errors import Interrupted, StageError
from finetune_trainer.publish import merge, merged
from finetune_trainer.publish import run as publish
from finetune_trainer.publish.adapter import read_weights
from finetune_trainer.publish.merge import BaseWeights
from finetune_trainer.publish.safetensors_stream import Checkpoint
from finetune_trainer.publish.written import check_written
from finetune_trainer.train import full
from finetune_trainer.train import run as train
from finetune_trainer.train import save as save_module
from tests.support.prepared import PreparedJob, prepare_job
from tests.support.served_layout import check_model_folder
from tests.support.tiny_model import build_tiny_model
from tests.support.train_process import kill_all, pod_of
from tests.trainer.test_train_ranks import ROUNDING
from tests.trainer.test_train_resume import curve, interrupt, sigterm

SPECTRUM = {"spectrum": {"fraction": 0.5}}
GALORE = {"name": "galore_adamw", "galore": {"rank": 8, "updateIntervalSteps": 2, "scale": 1.0}}
FLOAT32 = {"merged": {"dtype": "float32"}, "workspace": {"retention": "Keep"}}
STORED = f"{WEIGHTS_DIR}/{WEIGHTS_FILE}"


def full_job(
    s3: Any, folder: Path, base: Path, choice: dict[str, Any], optimizer: dict[str, Any], **more: Any
) -> PreparedJob:
    return prepare_job(
        s3, folder, base,
        method={"type": "Full", **({"full": choice} if choice else {})},
        training={"length": {"steps": 5}, "optimizer": {"learningRate": 0.003, **optimizer}},
        evaluation={"generation": {"prompts": 0}},
        **{"output": FLOAT32, "recovery": {"checkpoint": {"interval": {"steps": 2}}}, **more},
    )  # fmt: skip


def result(job: PreparedJob) -> TrainResult:
    return job.context().workspace_store().get_model(TRAIN_RESULT, TrainResult)


def stored(job: PreparedJob) -> bytes:
    return job.context().workspace_store().get_bytes(STORED)


def published(s3: Any, job: PreparedJob, folder: Path) -> Path:
    s3.get_dir(job.bucket, job.context().output_store().location.key, folder)
    check_model_folder(folder / "model", job.snapshot.spec.output.merged.dtype.value)
    return folder / "model"


@pytest.mark.parametrize(
    ("choice", "optimizer", "tied", "dtype"),
    [
        ({}, {}, True, "float32"),
        (SPECTRUM, {}, False, "bfloat16"),
        (SPECTRUM, GALORE, False, "float32"),
        ({"modules": ["mlp", "lm_head", "layers.1.input_layernorm"]}, {}, False, "float32"),
    ],
    ids=["everything", "Spectrum", "Spectrum with GaLore", "some modules"],
)  # fmt: skip
def test_the_published_model_is_the_one_that_was_trained(
    s3: Any, tmp_path: Path, choice: dict[str, Any], optimizer: dict[str, Any], tied: bool, dtype: str
) -> None:
    base = build_tiny_model(tmp_path / "base", shards=3, tied=tied)
    job = full_job(s3, tmp_path, base, choice, optimizer, output={**FLOAT32, "merged": {"dtype": dtype}})
    report = train.run(job.context())
    done = result(job)
    values, before = load(stored(job)), Checkpoint(base)
    assert set(values) == set(done.weights.tensors if done.weights else [])
    assert {t.dtype for t in values.values()} == {torch.float32}
    assert all(not torch.equal(value, before.read(name)) for name, value in values.items()), "every chosen tensor moved"
    assert done.trainable_parameters == sum(t.numel() for t in values.values())
    assert report.metrics.held_out_loss < report.metrics.held_out_loss_base
    assert done.verification.relative_difference == 0
    assert done.adapter_files == []

    told = publish.run(job.context(Stage.PUBLISH))
    assert told.merge_check is not None
    model = published(s3, job, tmp_path / "got")
    loaded, loading = AutoModelForCausalLM.from_pretrained(model, dtype="auto", output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.load_state_dict(values, strict=False)
    plain.tie_weights()
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.float()(ids).logits, plain(ids).logits)
    written = Checkpoint(model)
    assert {n: t.file for n, t in written.tensors.items()} == {n: t.file for n, t in before.tensors.items()}
    for name in before.tensors:
        assert torch.equal(written.read(name), values.get(name, before.read(name)).to(getattr(torch, dtype))), name

    output = job.context().output_store()
    manifest = output.get_model(MANIFEST, Manifest)
    assert manifest.weights == done.weights
    assert told.model_bytes == sum(f.size for f in manifest.files if f.path.startswith("model/"))
    assert (told.adapter_bytes, told.merged_bytes) == (0, None)
    card, page = (model / "README.md").read_text(), (tmp_path / "got" / "reports" / "index.html").read_text()
    assert "| method | Full" in card
    assert "alpha" not in card
    assert "adapter" not in card
    assert f"{len(values)} tensors" in page


def test_a_copy_of_tied_embeddings_gets_the_trained_values(tmp_path: Path) -> None:
    """Some files have a head beside the embedding that it is tied to: a stale one would be another model to whoever reads it."""
    base = build_tiny_model(tmp_path / "base", tied=True)
    tensors, name = load_file(base / "model.safetensors"), "model.embed_tokens.weight"
    save_file(
        {**tensors, "lm_head.weight": tensors[name].clone()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    (tmp_path / "trained").mkdir()
    save_file({name: tensors[name] + 1}, tmp_path / "trained" / WEIGHTS_FILE)
    weights, checkpoint = BaseWeights(Checkpoint(base), None), Checkpoint(base)
    for tied in (True, False):
        model = read_weights(tmp_path / "trained", TrainedWeights(tensors=[name]), checkpoint.tensors, tied)
        merge.merge(weights, model, torch.float32, tmp_path / "model", lambda _: None)
        check_written(weights, model, tmp_path / "model")
        written = Checkpoint(tmp_path / "model")
        assert torch.equal(written.read("lm_head.weight"), tensors[name] + (1 if tied else 0))


def test_a_run_that_was_told_to_stop_ends_with_the_same_bytes(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 4, between two of GaLore's projections: the one in the checkpoint is gone on with."""
    job = full_job(s3, tmp_path, tiny_model, SPECTRUM, GALORE)
    train.run(job.context())
    undisturbed, losses = stored(job), curve(job)
    for folder in ("train", "checkpoints"):
        job.context().workspace_store().delete_prefix(folder)
    interrupt(monkeypatch, 4, 1, sigterm)
    with pytest.raises(Interrupted):
        train.run(job.context())
    train.run(job.context(execution="execution-2"))
    assert stored(job) == undisturbed
    assert curve(job) == losses
    assert result(job).resumed_from_steps == [3]


def test_two_ranks_train_as_one_does(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Gradients of whole weights are added up, and the ranks project them alike."""
    alone = full_job(s3, tmp_path / "one", tiny_model, SPECTRUM, GALORE)
    train.run(alone.context())
    together = full_job(s3, tmp_path / "two", tiny_model, SPECTRUM, GALORE, compute={"gpusPerNode": 2})
    pod = pod_of(together).start()
    try:
        assert pod.wait() == 0, pod.log
    finally:
        kill_all()
    assert curve(together) == pytest.approx(curve(alone), rel=ROUNDING)
    assert result(together).metrics.held_out_loss == pytest.approx(result(alone).metrics.held_out_loss, rel=ROUNDING)


def spoil(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[..., Any]:
    """An upload that stores something else than was saved."""
    original = save_module.upload_folder

    def upload(ctx: Any, folder: Path, *rest: Any) -> Any:
        values = load_file(folder / WEIGHTS_FILE)
        change(values)
        (folder / WEIGHTS_FILE).write_bytes(save(values, metadata={"format": "pt"}))
        return original(ctx, folder, *rest)

    return upload


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: [v.mul_(1.5) for v in values.values()], "has held-out loss"),
        (lambda values: values.popitem(), "tensors; "),
        (lambda values: values.update({n: v[:-1].contiguous() for n, v in values.items()}), "in the bucket, and"),
    ],
    ids=["other values", "a tensor less", "other shapes"],
)  # fmt: skip
def test_what_is_in_the_bucket_must_be_what_was_trained(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str
) -> None:
    job = full_job(s3, tmp_path, tiny_model, SPECTRUM, {})
    monkeypatch.setattr(save_module, "upload_folder", spoil(change))
    with pytest.raises(StageError, match=words) as failed:
        train.run(job.context())
    assert failed.value.reason is Reason.VERIFICATION_FAILED


def test_what_is_no_parameter_is_refused_before_the_base_is_evaluated(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = full_job(s3, tmp_path, tiny_model, {"modules": ["mlp"]}, {})
    known = job.context().workspace_store().get_model(PREPARE_RESULT, PrepareResult)
    assert known.weights is not None
    other = TrainedWeights(tensors=[*known.weights.tensors, "model.mtp_layers.0.mlp.up_proj.weight"])
    changed = known.model_copy(update={"weights": other})
    job.context().workspace_store().put_model(PREPARE_RESULT, changed)
    monkeypatch.setattr(train, "evaluate_base", lambda *_: pytest.fail("a GPU was used"))
    with pytest.raises(StageError, match=r"1 tensors .*mtp_layers.* are no parameters of LlamaForCausalLM") as refused:
        train.run(job.context())
    assert refused.value.reason is Reason.UNSUPPORTED_MODEL


@pytest.fixture(scope="module")
def trained(s3: Any, tmp_path_factory: Any) -> PreparedJob:
    """To be published wrongly."""
    folder = tmp_path_factory.mktemp("trained")
    job = full_job(s3, folder, build_tiny_model(folder / "base", shards=2), SPECTRUM, {})
    train.run(job.context())
    return job


def keep_the_base(parts: Callable[..., Any]) -> Callable[..., Any]:
    """A merge that forgets what was trained."""
    return lambda base, adapter, info: parts(base, adapter.__class__(adapter.folder, {}, frozenset(), {}), info)


def touch_another(parts: Callable[..., Any]) -> Callable[..., Any]:
    """A merge that changes a tensor that was not trained."""

    def other(base: Any, adapter: Any, info: Any) -> Any:
        for part in parts(base, adapter, info):
            yield part * 1.01 if info.name == "model.embed_tokens.weight" else part

    return other


@pytest.mark.parametrize("wrong", [keep_the_base, touch_another])
def test_a_model_with_one_wrong_tensor_is_not_published(
    trained: PreparedJob, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    monkeypatch.setattr(merge, "merged_parts", wrong(merge.merged_parts))
    with pytest.raises(StageError, match="are not base and trained weights within rounding") as failed:
        publish.run(trained.context(Stage.PUBLISH))
    assert failed.value.reason is Reason.VERIFICATION_FAILED
    assert not trained.context().output_store().exists(MANIFEST)


def test_a_model_that_computes_otherwise_is_not_published(
    trained: PreparedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor may be right and the model wrong: its configuration is part of it."""
    original = merged.write_companions

    def other_angles(*arguments: Any) -> None:
        original(*arguments)
        path = arguments[4] / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1.0}))

    monkeypatch.setattr(merged, "write_companions", other_angles)
    with pytest.raises(StageError, match="the merged model has") as failed:
        publish.run(trained.context(Stage.PUBLISH))
    assert failed.value.reason is Reason.VERIFICATION_FAILED


def test_weights_that_changed_in_the_bucket_are_not_published(trained: PreparedJob) -> None:
    store = trained.context().workspace_store()
    kept = store.get_bytes(STORED)
    store.put_bytes(STORED, kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        with pytest.raises(StageError, match="changed: found") as failed:
            publish.run(trained.context(Stage.PUBLISH))
    finally:
        store.put_bytes(STORED, kept)
    assert failed.value.reason is Reason.VERIFICATION_FAILED


def test_updates_below_half_a_step_of_bfloat16_are_not_lost(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).requires_grad_(False)
    name = "model.layers.0.mlp.up_proj.weight"
    model = full.train_weights(base, TrainedWeights(tensors=[name]), tiny_model)
    parameters = full.trained_parameters(model)
    assert {n: p.dtype for n, p in parameters.items()} == {name: torch.float32}
    first = load_file(tiny_model / "model.safetensors")[name]
    assert torch.equal(parameters[name], first), "as stored"
    assert not torch.equal(first, first.bfloat16().float()), "not rounded to the type that the base was loaded in"
    before = parameters[name].detach().clone()
    with torch.no_grad():
        parameters[name].add_(1e-5)
    assert torch.all(parameters[name] != before)
    assert model.lm_head.weight.dtype is torch.bfloat16
