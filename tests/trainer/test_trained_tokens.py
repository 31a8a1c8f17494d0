"""New tokens and tokens whose rows of the embeddings are trained: from the data to the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.results import PrepareResult, TrainedToken, TrainedTokens
from finetune_api.snapshot import Snapshot
from finetune_trainer.errors import StageError
from finetune_trainer.publish.adapter import read_adapter
from finetune_trainer.publish.merge import BaseWeights, merge
from finetune_trainer.publish.run import run as publish
from finetune_trainer.publish.safetensors_stream import Checkpoint
from finetune_trainer.publish.tokens import must_train, with_shared_head
from finetune_trainer.publish.written import check_written
from finetune_trainer.train import device, model
from finetune_trainer.train.loss import LearnedTokenLoss
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.run import run as train
from finetune_trainer.train.tokens import check_ids, make_room
from tests.support.prepare_bench import Bench, row
from tests.support.prepared import deep_merge, job_spec, snapshot_of
from tests.support.tiny_families import build_tiny_family
from tests.support.tiny_model import HIDDEN, VOCABULARY, build_tiny_model

CPU32 = device.Compute(torch.device("cpu"), torch.float32, "cpu")
CALL, RESULT = "<call>", "<result>"
ROWS = [row(f"What is {i} plus {i}?", f"{CALL}add {i} {i}{RESULT} It is {2 * i}.") for i in range(40)]
TOKENS = {"model": {"newTokens": [CALL, RESULT]}, "method": {"lora": {"trainableTokens": ["<|im_start|>"]}}}
TRAINED = TrainedTokens(
    tokens=[
        TrainedToken(token="<|im_start|>", id=1, new=False),
        TrainedToken(token=CALL, id=VOCABULARY, new=True),
        TrainedToken(token=RESULT, id=VOCABULARY + 1, new=True),
    ],
    resized_to=VOCABULARY + 2,
)


def snapshot(**updates: Any) -> Snapshot:
    return snapshot_of(deep_merge(job_spec(None, "bucket"), updates), "u" * 32)


def result(bench: Bench) -> PrepareResult:
    return PrepareResult.model_validate_json(bench.object("prepare/result.json"))


def with_tokens(folder: Path, method: str = "LoRA") -> tuple[PeftModelForCausalLM, Any]:
    """An adapter with random weights and rows, and its base before it was attached (resized)."""
    run = snapshot(method={"type": method})
    base = model.load_base(folder, run, CPU32)
    make_room(base, TRAINED, Ranks())
    begun = {n: p.detach().clone() for n, p in base.named_parameters()}
    adapted = model.attach_adapter(base, run, None, TRAINED.ids)
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval(), begun


def test_ids_and_labels_of_rows_with_a_new_token(bench: Bench) -> None:
    bench.put(ROWS)
    bench.run()
    before = result(bench)
    bench.run(**TOKENS)
    after = result(bench)
    assert after.tokenizer_hash != before.tokenizer_hash
    assert after.trained_tokens is not None
    assert after.trained_tokens.ids == TRAINED.ids
    assert after.trained_tokens.resized_to == VOCABULARY + 2
    assert after.total_parameters - before.total_parameters == 2 * 2 * HIDDEN
    assert after.trainable_parameters - before.trainable_parameters == 2 * 3 * HIDDEN
    train_rows = bench.table("train").to_pylist()
    plain = AutoTokenizer.from_pretrained(bench.pod.work / "model-config")
    for found in train_rows:
        i = VOCABULARY
        ids, labels = found["input_ids"], found["labels"]
        start = ids.index(i)
        middle = ids.index(i + 1)
        end = ids.index(plain.eos_token_id, start) + 1
        assert labels[start:end] == ids[start:end], "the answer begins with the new token, and is learned"
        assert set(labels[:start]) == {-100}
        between = plain.decode(ids[start + 1 : middle])
        assert between.startswith("add ")
        assert plain(between, add_special_tokens=False)["input_ids"] == ids[start + 1 : middle], "the rest as before"
    counts = {t.token: t.occurrences for t in after.trained_tokens.tokens}
    assert counts == {"<|im_start|>": 2 * len(train_rows), CALL: len(train_rows), RESULT: len(train_rows)}
    assert not any("in no training row" in w for w in after.warnings)


def test_tokens_that_never_occur_are_warned_of(bench: Bench) -> None:
    bench.put(ROWS)
    report = bench.run(
        model={"newTokens": [CALL, "<never>"]}, method={"lora": {"trainableTokens": [CALL, "<|endoftext|>"]}}
    )
    assert any("model.newTokens: '<never>' in no training row" in w for w in report.warnings)
    assert any("method.lora.trainableTokens: '<|endoftext|>' in no training row" in w for w in report.warnings)
    found = result(bench).trained_tokens
    assert found is not None
    assert [t.new for t in found.tokens] == [False, True, True], "a new token is not named twice"


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"model": {"newTokens": [CALL, "<|im_end|>"]}}, Reason.INVALID_CONFIG, "'<|im_end|>' is token 2 of this tokenizer already.*trainableTokens"),
        ({"method": {"lora": {"trainableTokens": ["<call>"]}}}, Reason.INVALID_CONFIG, "'<call>' is no token of this tokenizer, which reads .*newTokens"),
        ({"model": {"newTokens": [CALL]}, "method": {"lora": {"modulesToSave": ["output"]}}}, Reason.INVALID_CONFIG, "trains output whole"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_gpu_is_used(
    bench: Bench, changes: dict[str, Any], reason: Reason, said: str
) -> None:
    bench.put(ROWS)
    with pytest.raises(StageError, match=said) as caught:
        bench.run(**changes)
    assert caught.value.reason is reason


def test_an_adapter_with_trained_tokens_is_none_to_go_on_from(tmp_path: Path) -> None:
    from finetune_api.spec import Lora
    from finetune_trainer.prepare.initial_adapter import settings_of

    adapted, _ = with_tokens(build_tiny_model(tmp_path / "base"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(StageError, match=r"more than a plain LoRA adapter \(trainable_token_indices\)"):
        settings_of(config, Lora(), "s3://bucket/adapter", [])


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_begin_as_the_mean_and_the_base_is_as_before_in_the_end(tmp_path: Path, tied: bool) -> None:
    folder = build_tiny_model(tmp_path, tied=tied)
    adapted, begun = with_tokens(folder, "QLoRA")
    stored = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        assert torch.equal(begun[name][:VOCABULARY], stored[name])
        for new in begun[name][VOCABULARY:]:
            torch.testing.assert_close(new, stored[name].mean(0))
    trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    rows = sum(p.numel() for n, p in trainable.items() if "trainable_tokens" in n)
    assert rows == 3 * HIDDEN * (1 if tied else 2)
    base = model.detach_adapter(adapted, model.trained_base_weights(adapted), torch.float32)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, begun[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_counts_the_heads_trained_rows(tmp_path: Path, tied: bool) -> None:
    """Decoder and head are called apart there: the same as the whole model's own, and gradients reach the rows of both."""
    adapted, _ = with_tokens(build_tiny_model(tmp_path, tied=tied))
    ids = torch.tensor([[1, 50, VOCABULARY, 60, VOCABULARY + 1, 2]])
    tuned = adapted.get_base_model()
    loss = LearnedTokenLoss(tuned, chunk_bytes=4 * (VOCABULARY + 2) * 2)
    found = loss({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    logits = tuned(input_ids=ids).logits[0, :-1]
    assert logits.shape[-1] == VOCABULARY + 2
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert loss.head_apart
    found.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "trainable_tokens" in n]
    assert all(g is not None and bool((g.abs().sum(1) > 0).all()) for g in gradients)


@pytest.mark.parametrize("kind", ["shards", "tied", "tied, stored twice"])
def test_the_merge_is_pefts_and_misses_no_row(tmp_path: Path, kind: str) -> None:
    folder = build_tiny_model(tmp_path / "base", shards=3 if kind == "shards" else 1, tied=kind != "shards")
    adapted, _ = with_tokens(folder)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    if kind == "tied, stored twice":
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(folder)
    base, adapter = (
        BaseWeights(checkpoint, None),
        with_shared_head(
            read_adapter(tmp_path / "adapter"), "lm_head.weight" if kind == "tied, stored twice" else None
        ),
    )
    merge(base, adapter, torch.float32, tmp_path / "merged", lambda _: None)
    if (folder / "model.safetensors.index.json").exists():
        (tmp_path / "merged" / "model.safetensors.index.json").write_bytes(
            (folder / "model.safetensors.index.json").read_bytes()
        )
    check_written(base, adapter, tmp_path / "merged")
    ours = {n: t for f in checkpoint.files for n, t in load_file(tmp_path / "merged" / f).items()}
    theirs = adapted.merge_and_unload().state_dict()
    assert ours["model.embed_tokens.weight"].shape == (VOCABULARY + 2, HIDDEN)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)

    # One trained row is as it was in the base; one that is not trained has moved; the last one is missing.
    file = tmp_path / "merged" / checkpoint.tensors["model.embed_tokens.weight"].file
    good = load_file(file)
    for spoilt in (1, 2, None):
        weight = good["model.embed_tokens.weight"].clone()
        if spoilt is None:
            weight = weight[:-1].contiguous()
        else:
            weight[spoilt] = checkpoint.read("model.embed_tokens.weight")[1]
        save_file({**good, "model.embed_tokens.weight": weight}, file)
        with pytest.raises(StageError, match=r"model\.embed_tokens\.weight \(") as caught:
            check_written(base, adapter, tmp_path / "merged")
        assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_an_adapter_without_the_rows_of_all_tokens_is_refused(tmp_path: Path) -> None:
    adapted, _ = with_tokens(build_tiny_model(tmp_path / "base"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = read_adapter(tmp_path / "adapter")
    must_train(adapter, TRAINED)
    for tokens in (None, TRAINED.model_copy(update={"tokens": TRAINED.tokens[:2]})):
        with pytest.raises(StageError, match="trained rows of other tokens") as caught:
            must_train(adapter, tokens)
        assert caught.value.reason is Reason.VERIFICATION_FAILED
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t[:2].contiguous() if "trainable_tokens" in n else t for n, t in tensors.items()}, path)
    with pytest.raises(StageError, match="the adapter is not whole: it has trained rows"):
        read_adapter(tmp_path / "adapter")


def test_a_tokenizer_with_other_ids_is_refused(tiny_model: Path) -> None:
    tokenizer = model.load_base_tokenizer(tiny_model, snapshot(model={"newTokens": [CALL, RESULT]}))
    check_ids(tokenizer, TRAINED)
    other = model.load_base_tokenizer(tiny_model, snapshot(model={"newTokens": [RESULT, CALL]}))
    with pytest.raises(StageError, match="'<call>' is token 401 of the tokenizer; the data were prepared with 400"):
        check_ids(other, TRAINED)


@pytest.mark.parametrize(
    ("method", "tied", "begun"), [("LoRA", False, "Default"), ("QLoRA", True, "Default"), ("LoRA", True, "PiSSA")]
)
def test_a_job_with_new_tokens_ends_in_models_that_others_can_load(
    s3: Any, tmp_path: Path, method: str, tied: bool, begun: str
) -> None:
    base = build_tiny_model(tmp_path / "base", tied=tied, shards=2)
    bench = Bench(tmp_path / "pod", s3, base)
    bench.put(ROWS)
    changes = deep_merge(
        deep_merge(job_spec(s3, bench.bucket), bench.spec),
        deep_merge(
            TOKENS,
            {
                "method": {"type": method, "lora": {"initialization": begun}},
                "training": {"length": {"epochs": 4}},
                "output": {"merged": {"enabled": True, "dtype": "float32", "base": "Quantized"}},
            },
        ),
    )
    prepared = bench.run(**changes)
    trained = train(bench.pod.context(changes, Stage.TRAIN))
    assert trained.metrics.held_out_loss < 0.8 * trained.metrics.held_out_loss_base
    published = publish(bench.pod.context(changes, Stage.PUBLISH))
    assert published.merge_check is not None
    assert published.merge_check.held_out_loss_trained is not None

    store = bench.pod.context(changes, Stage.PUBLISH).output_store()
    got = tmp_path / "got"
    s3.get_dir(bench.bucket, store.location.key, got)
    stored = load_file(got / "adapter" / "adapter_model.safetensors")
    of_tokens = sum(t.numel() for n, t in stored.items() if "trainable_tokens" in n)
    assert of_tokens == 3 * HIDDEN * (1 if tied else 2)
    matrices = sum(t.numel() for n, t in stored.items() if ".lora_" in n)
    assert matrices == (2 if begun == "PiSSA" else 1) * (prepared.trainable_parameters - of_tokens)
    merged = AutoModelForCausalLM.from_pretrained(got / "merged", dtype="auto")
    assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == VOCABULARY + 2
    index = json.loads((got / "merged" / "model.safetensors.index.json").read_text())
    tensors = Checkpoint(got / "merged").tensors
    assert index["metadata"]["total_size"] == sum(4 * t.elements for t in tensors.values())
    tokenizer = AutoTokenizer.from_pretrained(got / "merged")
    assert tokenizer.convert_tokens_to_ids([CALL, RESULT]) == [VOCABULARY, VOCABULARY + 1]
    assert tokenizer.decode([VOCABULARY, 50], skip_special_tokens=True).startswith(CALL)
    card = (got / "adapter" / "README.md").read_text()
    assert f"base.resize_token_embeddings({VOCABULARY + 2})" in card
    assert "vllm serve" not in card
    if method == "LoRA":
        # As the card says.
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        plain.resize_token_embeddings(VOCABULARY + 2)
        tuned = PeftModel.from_pretrained(plain, got / "adapter").eval()
        ids = tokenizer(f"What is 3 plus 3?{CALL}add{RESULT}", return_tensors="pt")["input_ids"]
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_parameter_with_gradients_gets_their_sum_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding that is trained whole has gigabytes of them: a second copy is not planned for."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat, group: flat.mul_(2))
    with_one, without = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))
    with_one.grad = torch.full((3, 2), 5.0)
    place = with_one.grad.data_ptr()
    Ranks(size=2).add_gradients([with_one, without])
    assert with_one.grad.data_ptr() == place
    assert torch.equal(with_one.grad, torch.full((3, 2), 10.0))
    assert torch.equal(without.grad, torch.zeros(2))


def test_in_a_mixture_of_experts_the_rows_are_trained_beside_the_attention(s3: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "pod", s3, build_tiny_family(tmp_path / "base", "mixtral"))
    bench.put(ROWS)
    changes = deep_merge(
        deep_merge(job_spec(s3, bench.bucket), bench.spec),
        deep_merge(TOKENS, {"output": {"merged": {"enabled": False}}}),
    )
    prepared = bench.run(**changes)
    trained = train(bench.pod.context(changes, Stage.TRAIN))
    assert trained.verification.relative_difference < 1e-3
    store = bench.pod.context(changes, Stage.TRAIN).output_store()
    s3.get_dir(bench.bucket, store.location.key, tmp_path / "got")
    stored = load_file(tmp_path / "got" / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == prepared.trainable_parameters
    assert sorted(n.split(".")[-3] for n in stored if "trainable_tokens" in n) == ["embed_tokens", "lm_head"]
