"""The combine stage against a real S3 server: what it leaves, what it refuses, and that what it says of its result is true."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_api.combination import CombinationError, CombinationManifest
from finetune_api.failures import FAILURES, Reason
from finetune_api.results import PrepareResult
from finetune_trainer import waiting
from finetune_trainer.combine import files, methods, run
from finetune_trainer.combine.card import model_card
from finetune_trainer.combine.methods import Combined
from finetune_trainer.combine.run import run as combine
from finetune_trainer.context import CombineContext
from finetune_trainer.entrypoint import main
from finetune_trainer.errors import StageError
from tests.support.adapters import BASE, combine_context, make_adapter
from tests.support.hub_server import COMMIT, HubServer
from tests.support.prepare_bench import REF, ROWS, Bench
from tests.support.tiny_model import write_tokenizer

WEIGHTS = "adapter_model.safetensors"


class Mix:
    """Two adapters in a bucket, and the pod that combines them."""

    def __init__(self, s3: Any, adapters: Path, folder: Path) -> None:
        self.s3, self.folder, self.bucket = s3, folder, s3.new_bucket()
        self.adapters = [shutil.copytree(adapters / name, folder / name) for name in ("one", "two")]
        for slot in ("adapter-0", "adapter-1", "output"):
            s3.write_secret(folder / "pod" / "secrets" / slot)

    def context(self, **asked: Any) -> CombineContext:
        for adapter in self.adapters:
            self.s3.put_dir(self.bucket, f"in/{adapter.name}", adapter)
        secret = {"secretRef": {"name": "s3"}}
        spec = {
            "adapters": [
                {"uri": f"s3://{self.bucket}/in/one", "weight": 0.75, **secret},
                {"uri": f"s3://{self.bucket}/in/two", "weight": -0.5, **secret},
            ],
            "output": {"uri": f"s3://{self.bucket}/out", **secret},
        }
        return combine_context(self.folder / "pod", {**spec, **asked})

    def made(self) -> list[str]:
        return self.s3.keys(self.bucket, "out/")

    def manifest(self) -> CombinationManifest:
        return self.context().output_store().get_model("manifest.json", CombinationManifest)


@pytest.fixture(scope="module")
def two_adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name, settings in ((1, "one", {}), (2, "two", {"r": 6})):
        write_tokenizer(make_adapter(tiny_model, folder / name, seed, **settings))
    return folder


@pytest.fixture
def mix(s3: Any, two_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mix:
    monkeypatch.setattr(waiting, "pause", lambda seconds: None)
    return Mix(s3, two_adapters, tmp_path)


def test_a_combination_leaves_a_whole_result_with_its_lineage(mix: Mix, tiny_model: Path, tmp_path: Path) -> None:
    report = combine(mix.context(runtime={"env": [{"name": "KEY", "value": "secret-value"}]}))
    prefix = "out/mix-0a1b2c3d/"
    names = ["README.md", "adapter_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"]
    assert sorted(mix.made()) == sorted([*(f"{prefix}adapter/{n}" for n in names), f"{prefix}manifest.json"])
    assert (report.rank, report.modules, report.base_model, report.exact) == (10, 4, BASE, True)
    assert report.relative_error < 1e-6
    manifest = mix.manifest()
    assert [(a.weight, a.rank, a.uri) for a in manifest.adapters] == [
        (0.75, 4, f"s3://{mix.bucket}/in/one"),
        (-0.5, 6, f"s3://{mix.bucket}/in/two"),
    ]
    card = mix.context().output_store().get_bytes("adapter/README.md").decode()
    for adapter in manifest.adapters:
        assert adapter.files[1].path == WEIGHTS
        assert adapter.files[1].sha256 in card
        assert adapter.uri in card
    assert "secret-value" not in manifest.model_dump_json(), "environment variables may hold keys"
    mix.s3.get_dir(mix.bucket, f"{prefix}adapter", tmp_path / "got")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "got")
    assert loaded.peft_config["default"].base_model_name_or_path == BASE
    assert loaded.peft_config["default"].target_modules == {"q_proj", "up_proj"}


@pytest.mark.parametrize(("rank", "said"), [(10, "--max-lora-rank 16 "), (513, "vLLM serves no such adapter")])
def test_the_card_names_a_rank_that_vllm_takes(mix: Mix, rank: int, said: str) -> None:
    ctx, error = mix.context(), CombinationError(whole=0.0, largest=0.0, module="m", tolerance=1e-5)
    text = model_card(ctx.snapshot, BASE, [], rank, error, ctx.output_store(), tokenizer=False)
    assert said in text
    assert ("vllm serve" in text) == (rank <= 512)


def test_what_is_done_is_not_done_again_and_what_is_half_done_is(mix: Mix) -> None:
    first = combine(mix.context())
    key = f"out/mix-0a1b2c3d/adapter/{WEIGHTS}"
    before = mix.s3.client.head_object(Bucket=mix.bucket, Key=key)["LastModified"]
    assert combine(mix.context()) == first
    assert mix.s3.client.head_object(Bucket=mix.bucket, Key=key)["LastModified"] == before
    mix.s3.client.delete_object(Bucket=mix.bucket, Key=key)
    mix.s3.put(mix.bucket, "out/mix-0a1b2c3d/adapter/stray", "x")
    assert combine(mix.context()) == first
    assert key in mix.made()
    assert "out/mix-0a1b2c3d/adapter/stray" not in mix.made()


def test_adapters_come_from_the_hub_and_from_claims_too(mix: Mix, hub: HubServer) -> None:
    hub.add_model("acme/one", mix.adapters[0])
    shutil.copytree(mix.adapters[1], mix.folder / "pod" / "pvc" / "models" / "two")
    adapters = [{"uri": "hf://acme/one", "endpointURL": hub.endpoint}, {"uri": "pvc://models/two", "weight": 2}]
    assert combine(mix.context(adapters=adapters)).exact
    assert [(a.uri, a.commit) for a in mix.manifest().adapters] == [
        ("hf://acme/one", COMMIT),
        ("pvc://models/two", None),
    ]


@pytest.mark.parametrize(
    ("asked", "at_least", "at_most"),
    [
        ({"type": "SVD", "rank": 3}, 0.1, 0.9),
        ({"type": "SVD", "rank": 10}, 0.0, 1e-6),
        ({"type": "TIES", "density": 0.5}, 0.1, 5.0),
    ],
    ids=["SVD", "SVD of full rank", "TIES"],
)
def test_how_far_it_is_from_the_sum_stands_in_the_report(
    mix: Mix, tiny_model: Path, asked: dict[str, Any], at_least: float, at_most: float
) -> None:
    if asked["type"] == "TIES":
        mix.adapters[1] = make_adapter(tiny_model, mix.folder / "two", 2)
        write_tokenizer(mix.adapters[1])
    report = combine(mix.context(**asked))
    assert at_least <= report.relative_error <= at_most
    assert report.exact == (at_most < 1e-5)
    error = mix.manifest().relative_error
    off, total = _distance(mix, tiny_model)
    assert error.whole == pytest.approx(off / total, rel=1e-3, abs=1e-6)
    assert error.largest >= error.whole * 0.999


def _distance(mix: Mix, base: Path) -> tuple[float, float]:
    """From the sum, by peft and the whole matrices."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), mix.adapters[0], adapter_name="0")
    model.load_adapter(mix.adapters[1], adapter_name="1")
    mix.s3.get_dir(mix.bucket, "out/mix-0a1b2c3d/adapter", mix.folder / "got")
    model.load_adapter(mix.folder / "got", adapter_name="mix")
    off = total = 0.0
    for layer in model.modules():
        if hasattr(layer, "lora_A") and "mix" in layer.lora_A:
            wanted = 0.75 * layer.get_delta_weight("0") - 0.5 * layer.get_delta_weight("1")
            off += float((layer.get_delta_weight("mix") - wanted).square().sum())
            total += float(wanted.square().sum())
    return off**0.5, total**0.5


def test_one_module_is_in_memory_at_a_time(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.combine
    read: list[weakref.ref[torch.Tensor]] = []
    modules = []

    def watched(spec: Any, module: str, parts: Any, rank: int) -> Combined:
        assert not [tensor for tensor in read if tensor() is not None], "what was read for the modules before is gone"
        read.extend(weakref.ref(half) for part in parts for half in (part.lora.a, part.lora.b))
        modules.append(module)
        return real(spec, module, parts, rank)

    monkeypatch.setattr(files, "combine", watched)
    combine(mix.context())
    assert len(modules) == 4
    assert len(read) == 2 * 2 * len(modules)


def spoil(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil_weights(adapter: Path, change: Any) -> None:
    weights = load_file(adapter / WEIGHTS)
    change(weights)
    save_file(weights, adapter / WEIGHTS)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: spoil(a, base_model_name_or_path="org/other"), "adapters[0] was trained on org/tiny and adapters[1] on org/other"),
        (lambda a: spoil(a, base_model_name_or_path=None), "names no base model"),
        (lambda a: spoil(a, peft_type="BONE"), "adapters[1]: s3://{bucket}/in/two is more than a plain LoRA adapter (BONE)"),
        (lambda a: spoil(a, use_dora=True), "(use_dora)"),
        (lambda a: spoil(a, modules_to_save=["lm_head"]), "(modules_to_save)"),
        (lambda a: spoil(a, trainable_token_indices={"lm_head": [5]}), "(trainable_token_indices)"),
        (lambda a: spoil(a, trainable_token_indices=[1]), "(trainable_token_indices)"),
        (lambda a: spoil(a, bias="lora_only"), "(trained biases)"),
        (lambda a: spoil(a, init_lora_weights="pissa"), "was initialized by pissa, which changed the base's weights"),
        (lambda a: spoil(a, r=8), "the adapter is not whole"),
        (lambda a: (a / "adapter_config.json").write_text("["), "is no adapter of peft's"),
        (lambda a: (a / WEIGHTS).write_text("{"), "is no adapter of peft's"),
        (lambda a: spoil_weights(a, lambda w: w.update({NAME: w[NAME][:, :32].contiguous()})), "has 64 inputs and 64 outputs in adapters[0], 32 and 64 in adapters[1]"),
        (lambda a: spoil_weights(a, lambda w: w.update({NAME: w[NAME][..., None].contiguous()})), "are not those of a linear layer"),
        (lambda a: spoil_weights(a, lambda w: w.update(extra=torch.ones(2))), "tensors other than the matrices A and B of linear layers, which cannot be combined: extra"),
        (lambda a: spoil_weights(a, lambda w: w[NAME].fill_(float("nan"))), "has values in model.layers.0.self_attn.q_proj that are infinite or not numbers"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused_and_nothing_is_written(mix: Mix, change: Any, words: str) -> None:
    change(mix.adapters[1])
    with pytest.raises(StageError) as caught:
        combine(mix.context())
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert words.format(bucket=mix.bucket) in caught.value.message
    assert mix.made() == []


def test_tokenizers_that_differ_are_left_out_with_a_warning(mix: Mix) -> None:
    write_tokenizer(mix.adapters[1], chat_template=None)
    report = combine(mix.context())
    assert report.warnings == ["The adapters' tokenizers differ, so none stands beside the result."]
    assert not [key for key in mix.made() if "tokenizer" in key]


@pytest.mark.parametrize("asked", [{}, {"type": "SVD", "rank": 3}], ids=["Cat", "SVD"])
def test_a_result_that_is_not_the_sum_is_found_out(
    mix: Mix, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    monkeypatch.setattr(files, "combine", slightly_wrong)
    with pytest.raises(StageError) as caught:
        combine(mix.context(**asked))
    assert caught.value.reason is Reason.VERIFICATION_FAILED
    assert "from the weighted sum" in caught.value.message
    assert "out/mix-0a1b2c3d/manifest.json" not in mix.made()


def slightly_wrong(*arguments: Any) -> Combined:
    made = methods.combine(*arguments)
    return replace(made, b=made.b * 1.001)


@pytest.mark.parametrize(
    "asked", [{"type": "Linear"}, {"type": "DARETIES", "density": 0.5, "seed": 3}], ids=["Linear", "DARE"]
)
def test_a_result_that_its_type_does_not_make_is_found_out(
    mix: Mix, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    """These are no sums: they are computed again, random draws included."""
    mix.adapters[1] = make_adapter(tiny_model, mix.folder / "two", 2)
    with monkeypatch.context() as patched:
        patched.setattr(files, "combine", slightly_wrong)
        with pytest.raises(StageError, match="computed again gives other numbers") as caught:
            combine(mix.context(**asked))
    assert caught.value.reason is Reason.VERIFICATION_FAILED
    assert "out/mix-0a1b2c3d/manifest.json" not in mix.made()
    assert not combine(mix.context(**asked)).exact


def test_other_bytes_in_the_bucket_are_found_out(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run.read_back

    def changed_before(output: Any, *rest: Any) -> Any:
        output.put_bytes(f"adapter/{WEIGHTS}", b"other bytes")
        return real(output, *rest)

    monkeypatch.setattr(run, "read_back", changed_before)
    with pytest.raises(StageError) as caught:
        combine(mix.context())
    assert caught.value.reason is Reason.VERIFICATION_FAILED
    assert "has SHA-256" in caught.value.message


def test_what_is_missing_ends_the_pod_with_its_name(mix: Mix, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "PATIENCE_SECONDS", 0.0)
    ctx = mix.context()
    (mix.folder / "pod" / "secrets" / "adapter-1" / "AWS_ACCESS_KEY_ID").unlink()
    code = main(["combine"], environ={}, termination_log=tmp_path / "log", context=lambda stage: ctx)
    assert code == FAILURES[Reason.SECRET_MISSING].exit_code
    told = json.loads((tmp_path / "log").read_text())
    assert (told["stage"], told["reason"]) == ("combine", "SecretMissing")
    assert "adapter-1" in told["message"]


def test_a_job_can_go_on_from_a_combined_adapter(mix: Mix, bench: Bench) -> None:
    combine(mix.context())
    bench.put(ROWS)
    bench.s3.write_secret(bench.pod.secrets / "initial-adapter")
    bench.spec["model"] |= {"initialAdapter": {"uri": f"s3://{mix.bucket}/out/mix-0a1b2c3d/adapter", **REF}}
    assert bench.run().trainable_parameters
    record = PrepareResult.model_validate_json(bench.object("prepare/result.json")).initial_adapter
    assert record is not None
    assert (record.lora.rank, record.lora.alpha, record.lora.use_rslora) == (10, 10, False)
    assert record.lora.target_modules == ["q_proj", "up_proj"]
