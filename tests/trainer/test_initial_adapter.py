"""Training that goes on from an adapter: what is taken over, what is refused before a GPU, and that nothing of it is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.results import Manifest, PrepareResult
from finetune_trainer.prepare.run import run as prepare
from finetune_trainer.publish.run import run as publish
from finetune_trainer.train.run import run as train
from tests.support.prepare_bench import REF, ROWS, Bench
from tests.support.prepared import deep_merge, job_spec, questions
from tests.support.tiny_families import build_tiny_family
from tests.support.trainer_run import Pod
from tests.trainer.test_publish_merge import adapter_for

NAME = "model.layers.0.self_attn.q_proj.lora_A.weight"


def put_adapter(s3: Any, bucket: str, base: Path, folder: Path, **settings: Any) -> Path:
    adapter = adapter_for(base, folder, **settings)
    s3.put_dir(bucket, "old", adapter)
    return adapter


def goes_on(bucket: str) -> dict[str, Any]:
    return {"initialAdapter": {"uri": f"s3://{bucket}/old", **REF}}


@pytest.fixture
def ready(bench: Bench) -> Bench:
    bench.put(ROWS)
    bench.s3.write_secret(bench.pod.secrets / "initial-adapter")
    bench.spec["model"] |= goes_on(bench.bucket)
    return bench


def test_rank_modules_and_variant_are_the_adapters(ready: Bench, tiny_model: Path, tmp_path: Path) -> None:
    settings = {"rank_pattern": {"up_proj": 2}, "use_rslora": True, "layers_to_transform": [1]}
    modules = ["q_proj", "up_proj"]
    adapter = put_adapter(ready.s3, ready.bucket, tiny_model, tmp_path / "old", target_modules=modules, **settings)
    report = ready.run(method={"lora": {"dropout": 0.25}})
    weights = load_file(adapter / "adapter_model.safetensors")
    assert report.trainable_parameters == sum(w.numel() for w in weights.values())
    record = PrepareResult.model_validate_json(ready.object("prepare/result.json")).initial_adapter
    assert record is not None
    lora = record.lora
    assert (lora.rank, lora.alpha, lora.rank_pattern, lora.use_rslora) == (
        4, 8, {"model.layers.1.mlp.up_proj": 2}, True,
    )  # fmt: skip
    assert (lora.target_modules, lora.layers_to_transform, lora.dropout) == (modules, [1], 0.25)
    kept = ready.object("prepare/initial-adapter/adapter_model.safetensors")
    assert kept == (adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "settings", [{"target_modules": r".*\.1\.(self_attn\.[qv]|mlp\.up)_proj"}, {"exclude_modules": ".*mlp.*"}]
)
def test_modules_that_a_regular_expression_names_are_taken_over(
    ready: Bench, tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = put_adapter(ready.s3, ready.bucket, tiny_model, tmp_path / "old", **settings)
    report = ready.run()
    weights = load_file(adapter / "adapter_model.safetensors")
    assert report.trainable_parameters == sum(w.numel() for w in weights.values())


def test_modules_that_no_setting_names_together_are_refused(ready: Bench, tiny_model: Path, tmp_path: Path) -> None:
    odd = r".*\.(0\.self_attn\.q|1\.self_attn\.v)_proj"
    put_adapter(ready.s3, ready.bucket, tiny_model, tmp_path / "old", target_modules=odd)
    error = ready.fails()
    assert error.reason is Reason.INVALID_CONFIG
    assert "is not in the adapter" in error.message


def spoil_config(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def spoil_weights(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    for name, change in changes.items():
        key = f"base_model.model.{NAME}"
        if change is None:
            del weights[key]
        else:
            weights[name if name != "shape" else key] = change(weights[key])
    save_file(weights, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: spoil_config(a, peft_type="IA3"), "more than a plain LoRA adapter (IA3)"),
        (lambda a: spoil_config(a, modules_to_save=["lm_head"]), "(modules_to_save)"),
        (lambda a: spoil_config(a, bias="all"), "(trained biases)"),
        (lambda a: spoil_config(a, init_lora_weights="pissa"), "was initialized by pissa, which changed the base's weights"),
        (lambda a: spoil_config(a, r=0), "adapter_config.json of s3://"),
        (lambda a: spoil_config(a, r=8), f"{NAME.replace('self_attn.q_proj', 'mlp.down_proj')} is [4, 128] in the adapter"),
        (lambda a: spoil_config(a, target_modules=["q_proj"]), "not adapted by its settings"),
        (lambda a: spoil_weights(a, gone=None), f"{NAME} is not in the adapter, and [4, 64] by its settings"),
        (lambda a: spoil_weights(a, shape=lambda w: w[:, :32].contiguous()), f"{NAME} is [4, 32] in the adapter"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "is no adapter of peft's"),
        (lambda a: (a / "adapter_model.safetensors").write_text("{"), "is no adapter of peft's"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_trained_on_fails_before_a_gpu(
    ready: Bench, tiny_model: Path, tmp_path: Path, spoil: Any, words: str
) -> None:
    adapter = adapter_for(tiny_model, tmp_path / "old")
    spoil(adapter)
    ready.s3.put_dir(ready.bucket, "old", adapter)
    error = ready.fails()
    assert error.reason is Reason.INVALID_CONFIG
    assert words in error.message


def test_a_job_that_asks_for_another_adapter_than_it_goes_on_from_is_refused(
    ready: Bench, tiny_model: Path, tmp_path: Path
) -> None:
    put_adapter(ready.s3, ready.bucket, tiny_model, tmp_path / "old")
    error = ready.fails(method={"lora": {"rank": 32}})
    assert error.reason is Reason.INVALID_CONFIG
    assert "method.lora asks for rank: 32, and the initial adapter has 4" in error.message


def test_the_same_settings_in_other_words_are_the_same(ready: Bench, tiny_model: Path, tmp_path: Path) -> None:
    full = {"rank_pattern": {"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.up_proj": 2}}
    put_adapter(ready.s3, ready.bucket, tiny_model, tmp_path / "old", target_modules=["q_proj", "up_proj"], **full)
    same = {"rank": 4, "alpha": 8, "targetModules": ["up_proj", "q_proj"], "rankPattern": {"up_proj": 2}}
    assert ready.run(method={"lora": same}).trainable_parameters
    error = ready.fails(method={"lora": {**same, "rankPattern": {"up_proj": 3}}})
    assert "method.lora asks for rank_pattern" in error.message


def test_dora_needs_whole_weights_also_in_an_adapter(ready: Bench, tiny_model: Path, tmp_path: Path) -> None:
    put_adapter(ready.s3, ready.bucket, tiny_model, tmp_path / "old", use_dora=True)
    error = ready.fails(training={"parallelism": "FSDP"}, compute={"gpusPerNode": 2})
    assert error.reason is Reason.INVALID_CONFIG
    assert "trained with DoRA, which needs the whole base model" in error.message


def test_no_adapter_where_one_should_be(ready: Bench) -> None:
    ready.s3.put(ready.bucket, "old/adapter_config.json", "{}")
    error = ready.fails()
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert "has no adapter_model.safetensors" in error.message


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "rank_pattern": {"up_proj": 2}}], ids=["LoRA", "DoRA"])
def test_training_goes_on_from_the_adapters_weights(
    s3: Any, tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """At a learning rate of nothing the result is the adapter that it began with; then it is better."""
    bucket = s3.new_bucket()
    s3.put_dir(bucket, "base", tiny_model)
    old = put_adapter(s3, bucket, tiny_model, tmp_path / "old", **settings)
    s3.put(bucket, "train.jsonl", "".join(json.dumps({"messages": m}) + "\n" for m in questions(48)))
    losses = []
    for rate in (1e-12, 0.01):
        pod = Pod(tmp_path / f"pod-{rate}")
        for slot in ("model", "output", "train-0", "initial-adapter"):
            s3.write_secret(pod.secrets / slot)
        own = {
            "model": goes_on(bucket),
            "method": {"lora": {"rank": 16}},
            "training": {"length": {"steps": 3}, "optimizer": {"learningRate": rate}},
            "output": {"uri": f"s3://{bucket}/out-{rate}", "merged": {"enabled": True, "dtype": "float32"}},
        }
        spec = deep_merge(job_spec(s3, bucket), own)
        prepare(pod.context(spec))
        losses.append(train(pod.context(spec, Stage.TRAIN)).metrics.held_out_loss)
        publish(pod.context(spec, Stage.PUBLISH))
        store = pod.context(spec, Stage.PUBLISH).output_store()
        if rate == 1e-12:
            got = tmp_path / "got.safetensors"
            got.write_bytes(store.get_bytes("adapter/adapter_model.safetensors"))
            before, after = load_file(old / "adapter_model.safetensors"), load_file(got)
            assert before.keys() == after.keys()
            assert max((before[n].float() - after[n]).abs().max().item() for n in before) < 1e-6
        manifest = store.get_model("manifest.json", Manifest)
        assert manifest.initial_adapter is not None
        assert manifest.initial_adapter.uri == f"s3://{bucket}/old"
        assert f"s3://{bucket}/old" in store.get_bytes("reports/index.html").decode()
        assert f"s3://{bucket}/old" in store.get_bytes("adapter/README.md").decode()
    assert losses[1] < losses[0]


def test_training_goes_on_from_an_adapter_of_gpt2s(s3: Any, tmp_path: Path) -> None:
    """Its matrices lie the other way round, and its files leave the model's own name out, which the adapter's do not."""
    bucket = s3.new_bucket()
    base = build_tiny_family(tmp_path / "base", "gpt2")
    file = base / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    s3.put_dir(bucket, "base", base)
    old = put_adapter(s3, bucket, base, tmp_path / "old", rank_pattern={"transformer.h.0.mlp.c_fc": 2})
    assert json.loads((old / "adapter_config.json").read_text())["fan_in_fan_out"]
    s3.put(bucket, "train.jsonl", "".join(json.dumps({"messages": m}) + "\n" for m in questions(16)))
    pod = Pod(tmp_path / "pod")
    for slot in ("model", "output", "train-0", "initial-adapter"):
        s3.write_secret(pod.secrets / slot)
    own = {
        "model": goes_on(bucket),
        "training": {"length": {"steps": 1}, "optimizer": {"learningRate": 1e-12}},
        "output": {"uri": f"s3://{bucket}/out"},
    }
    spec = deep_merge(job_spec(s3, bucket), own)
    report = prepare(pod.context(spec))
    train(pod.context(spec, Stage.TRAIN))
    got = tmp_path / "got.safetensors"
    got.write_bytes(pod.context(spec, Stage.PUBLISH).output_store().get_bytes("adapter/adapter_model.safetensors"))
    before, after = load_file(old / "adapter_model.safetensors"), load_file(got)
    assert before.keys() == after.keys()
    assert report.trainable_parameters == sum(w.numel() for w in before.values())
    assert max((before[n].float() - after[n]).abs().max().item() for n in before) < 1e-6
