"""The optimization: what must not change its result, and what must stop it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer

from finetune_api.failures import Reason
from finetune_api.snapshot import Snapshot
from finetune_api.spec import ComputeDtype, Training
from finetune_api.targets import is_pattern
from finetune_trainer.cpus import usable_cpus
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.shapes import count_parameters
from finetune_trainer.train import device, evaluate, model, verify
from finetune_trainer.train.loss import LearnedTokenLoss
from finetune_trainer.train.rows import Rows
from finetune_trainer.train.schedule import make_schedule
from finetune_trainer.train.step_log import StepLog
from finetune_trainer.train.trainer import LoraTrainer, training_arguments
from tests.support.prepared import deep_merge, encode, job_spec, questions, snapshot_of, table
from tests.support.tiny_model import build_tiny_model

CPU32 = device.Compute(torch.device("cpu"), torch.float32, "cpu")
CPU16 = device.Compute(torch.device("cpu"), torch.bfloat16, "cpu")


def snapshot(**updates: Any) -> Snapshot:
    return snapshot_of(deep_merge(job_spec(None, "bucket"), updates), "u" * 32)


def rows_of(folder: Path, count: int) -> Rows:
    tokenizer = model.load_tokenizer(folder, snapshot())
    return Rows(table([encode(tokenizer, q) for q in questions(count)]))


def fit(
    folder: Path, tmp_path: Path, run: Snapshot, compute: device.Compute = CPU32, rows: Rows | None = None
) -> tuple[Any, StepLog]:
    """A trained model and its step log."""
    rows = rows or rows_of(folder, 20)
    peft_model = model.attach_adapter(model.load_base(folder, run, compute), run)
    training = run.spec.training
    schedule = make_schedule(len(rows), training.length, training.global_batch_sequences, training.seed)
    log = StepLog(schedule, rows, lambda _: None)
    LoraTrainer(
        model=peft_model, args=training_arguments(run, compute, schedule.steps, tmp_path), rows=rows, schedule=schedule,
        micro_batch=run.plan.micro_batch_sequences, pad_id=0, compute=compute, callbacks=[log],
        packing=training.packing, loraplus_lr_ratio=run.plan.method.lora.loraplus_lr_ratio,
    ).train()  # fmt: skip
    return peft_model, log


def weights_of(peft_model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in peft_model.named_parameters() if p.requires_grad}


def test_a_template_of_the_job_is_saved_with_the_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    run = snapshot(data={"chatTemplate": template})
    model.load_base_tokenizer(tiny_model, run).save_pretrained(tmp_path)
    assert model.load_tokenizer(tmp_path, snapshot()).chat_template == template
    own = model.load_tokenizer(tiny_model, snapshot()).chat_template
    assert model.load_base_tokenizer(tiny_model, snapshot()).chat_template == own != template


def test_the_loss_curve_does_not_depend_on_the_micro_batch_and_packing(tiny_model: Path, tmp_path: Path) -> None:
    # 20 rows of different lengths, 8 to a step: steps cross epochs and the last one is ragged.
    runs = [
        fit(tiny_model, tmp_path, snapshot(training={"microBatchSequences": n, "length": {"epochs": 1.3}}))
        for n in (1, 2, 4, 8)
    ]
    packed = snapshot(training={"microBatchSequences": 1, "length": {"epochs": 1.3}, "packing": True})
    runs.append(fit(tiny_model, tmp_path, packed))
    curves = [[step["loss"] for step in log.steps] for _, log in runs]
    assert len(curves[0]) == 4
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)
    first = weights_of(runs[0][0])
    for trained, _ in runs[1:]:
        for name, weight in weights_of(trained).items():
            torch.testing.assert_close(weight, first[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("Cosine", [0.0, 1.0, 0.75, 0.5, 0.0]),
        ("CosineWithMinLR", [0.0, 1.0, 0.775, 0.55, 0.1]),
        ("Linear", [0.0, 1.0, 2 / 3, 0.5, 0.0]),
        ("Constant", [0.0, 1.0, 1.0, 1.0, 1.0]),
        ("InverseSqrt", [0.0, 1.0, 0.5, (10 / 55) ** 0.5, 0.1**0.5]),
        ("WarmupStableDecay", [0.0, 1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_the_learning_rate_follows_the_schedule(tmp_path: Path, scheduler: str, rates: list[float]) -> None:
    """As a share of the peak, after 0, 10 (the warm-up), 40, 55 and 100 steps of 100."""
    run = snapshot(training={"scheduler": scheduler, "warmup": {"steps": 10}, "optimizer": {"learningRate": 1.0}})
    arguments = training_arguments(run, CPU32, 100, tmp_path)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments, optimizers=(optimizer, None))
    following = trainer.create_scheduler(100, optimizer)
    seen = []
    for _ in range(101):
        seen.append(following.get_last_lr()[0])
        optimizer.step()
        following.step()
    assert [seen[step] for step in (0, 10, 40, 55, 100)] == pytest.approx(rates, abs=1e-3)


def test_noise_on_the_embeddings_is_drawn_in_training_only(tiny_model: Path, tmp_path: Path) -> None:
    rows = rows_of(tiny_model, 20)
    plain, noisy = (
        fit(tiny_model, tmp_path, snapshot(training={"length": {"steps": 3}, **noise}), rows=rows)
        for noise in ({}, {"neftuneNoiseAlpha": 10.0})
    )
    losses = [[step["loss"] for step in log.steps] for _, log in (plain, noisy)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    tuned = noisy[0].get_base_model()
    assert len({evaluate.held_out_loss(tuned, rows, 0, CPU32).loss for _ in range(2)}) == 1, "no noise"
    assert not tuned.get_input_embeddings()._forward_hooks, "nothing is left of it"


def test_updates_and_layers_are_those_that_were_asked_for(tiny_model: Path) -> None:
    run = snapshot(
        method={
            "lora": {
                "rank": 4,
                "alpha": 8,
                "useRslora": True,
                "excludeModules": ["gate_proj"],
                "layersToTransform": [1],
            }
        }
    )
    adapted = model.attach_adapter(model.load_base(tiny_model, run, CPU32), run)
    updates = {n: m for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert {name.split(".")[4] for name in updates} == {"1"}
    assert {name.rpartition(".")[2] for name in updates} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert {m.scaling["default"] for m in updates.values()} == {8 / 4**0.5}


def test_the_layers_that_patterns_fit_are_adapted(tiny_model: Path, tmp_path: Path) -> None:
    """The same as prepare counts; and what is published names them without patterns, which peft does not know."""
    lora = {"targetModules": ["layers.1.self_attn.*", "*.down_proj"], "excludeModules": ["[kv]_proj"]}
    run = snapshot(method={"lora": lora})
    adapted = model.attach_adapter(model.load_base(tiny_model, run, CPU32), run)
    prefix = "base_model.model."
    found = {n.removeprefix(prefix) for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    headers = {name: ("F32", tuple(t.shape)) for name, t in load_file(tiny_model / "model.safetensors").items()}
    assert found == set(count_parameters(headers, run.plan.method.lora).targets)
    assert found == {
        *(f"model.layers.1.self_attn.{m}_proj" for m in "qo"), *(f"model.layers.{n}.mlp.down_proj" for n in (0, 1)),
    }  # fmt: skip
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(model.load_base(tiny_model, run, CPU32), tmp_path)
    assert {n.removeprefix(prefix) for n, m in again.named_modules() if hasattr(m, "lora_A")} == found
    assert not any(is_pattern(name) for name in again.peft_config["default"].target_modules)


def test_patterns_and_full_names_fit_the_chosen_layers_only(tiny_model: Path) -> None:
    """The same as prepare counts: peft adapts what is named in full in all layers."""
    lora = {"targetModules": ["*.[qv]_proj", "up_proj", "model.layers.0.mlp.down_proj"], "layersToTransform": [1]}
    run = snapshot(method={"lora": lora})
    adapted = model.attach_adapter(model.load_base(tiny_model, run, CPU32), run)
    found = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    headers = {name: ("F32", tuple(t.shape)) for name, t in load_file(tiny_model / "model.safetensors").items()}
    assert found == set(count_parameters(headers, run.plan.method.lora).targets)
    assert found == {f"model.layers.1.{m}_proj" for m in ("self_attn.q", "self_attn.v", "mlp.up")}


def test_tensors_of_a_stored_adapter_are_counted_without_loading_them_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = snapshot(method={"lora": {"targetModules": ["q_proj"]}})
    adapted = model.attach_adapter(model.load_base(tiny_model, run, CPU32), run)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    with monkeypatch.context() as patched:
        patched.setattr(verify, "load_file", None)
        verify.load_freshly(model.load_base(tiny_model, run, CPU32), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), tmp_path / "adapter_model.safetensors")
    with pytest.raises(StageError, match="has 3 tensors; its configuration needs 4") as caught:
        verify.load_freshly(model.load_base(tiny_model, run, CPU32), tmp_path)
    assert caught.value.reason is Reason.VERIFICATION_FAILED


def test_ranks_and_alphas_of_single_modules(tiny_model: Path) -> None:
    """The most specific name counts, in whatever order YAML's map comes; alpha is twice the rank where nothing says otherwise."""
    pattern = {"down_proj": 6, "layers.1.mlp.down_proj": 3, "up_proj": 5}
    for given in (pattern, dict(reversed(pattern.items()))):
        frozen = snapshot(method={"lora": {"rank": 4, "rankPattern": given, "alphaPattern": {"up_proj": 20}}})
        run = Snapshot.model_validate_json(frozen.canonical_json())  # as pods read it
        adapted = model.attach_adapter(model.load_base(tiny_model, run, CPU32), run)
        found = {
            n.partition(".layers.")[2]: (m.r["default"], m.scaling["default"])
            for n, m in adapted.named_modules()
            if hasattr(m, "lora_A")
        }
        assert found["0.mlp.down_proj"] == (6, 2.0)
        assert found["1.mlp.down_proj"] == (3, 2.0)
        assert found["0.mlp.up_proj"] == (5, 4.0)
        assert found["0.self_attn.q_proj"] == (4, 2.0)


@pytest.mark.parametrize("tied", [False, True])
def test_modules_that_are_trained_whole(tmp_path: Path, tied: bool) -> None:
    """In float32, tied ones as one; the base has its own back afterwards."""
    folder = build_tiny_model(tmp_path / "base", tied=tied)
    named = ["embed_tokens", "norm"] if tied else ["embed_tokens", "lm_head", "norm"]
    run = snapshot(method={"type": "QLoRA", "lora": {"modulesToSave": named}}, training={"length": {"steps": 2}})
    fresh = model.load_base(folder, run, CPU16)
    before = {n: p.clone() for n, p in fresh.named_parameters()}
    loss = evaluate.held_out_loss(fresh, rows_of(folder, 8), 0, CPU16).loss
    trained, _ = fit(folder, tmp_path, run, CPU16)
    assert {p.dtype for p in weights_of(trained).values()} == {torch.float32}
    headers = {name: ("BF16", tuple(t.shape)) for name, t in load_file(folder / "model.safetensors").items()}
    counted = count_parameters(headers, run.plan.method.lora).trainable
    assert counted == sum(p.numel() for p in weights_of(trained).values())
    for name in named:
        [(key, value)] = [(n, p) for n, p in weights_of(trained).items() if f"{name}.modules_to_save" in n]
        original = before[key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")]
        assert not torch.equal(value, original.float()), name
    tuned = trained.get_base_model()
    weights = [tuned.get_output_embeddings().weight, tuned.get_input_embeddings().weight]
    assert (weights[0].data_ptr() == weights[1].data_ptr()) is tied
    base = model.detach_adapter(trained, model.trained_base_weights(trained), CPU16.dtype)
    assert evaluate.held_out_loss(base, rows_of(folder, 8), 0, CPU16).loss == loss


def test_with_lora_plus_b_learns_faster_than_a(tiny_model: Path, tmp_path: Path) -> None:
    """AdamW's first step is the learning rate itself, whatever the gradient, and a step later A moves too (B was zero)."""
    steps = {
        "length": {"steps": 2},
        "scheduler": "Constant",
        "warmup": {"steps": 0},
        "optimizer": {"learningRate": 2e-4},
    }
    run = snapshot(
        method={"lora": {"loraPlusLRRatio": 16, "dropout": 0.0, "useDora": True, "modulesToSave": ["norm"]}},
        training=steps,
    )
    before = weights_of(model.attach_adapter(model.load_base(tiny_model, run, CPU32), run))
    trained, log = fit(tiny_model, tmp_path, run)
    assert [step["learning_rate"] for step in log.steps] == [2e-4, 2e-4]
    moved = {n: (w - before[n]).abs().max().item() for n, w in weights_of(trained).items()}
    assert max(v for n, v in moved.items() if "lora_B" not in n) <= 2.1 * 2e-4
    assert min(v for n, v in moved.items() if "lora_B" in n) > 15 * 2e-4


def test_gradient_checkpointing_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    (off, log_off), (on, log_on) = (
        fit(tiny_model, tmp_path, snapshot(training={"gradientCheckpointing": flag, "length": {"steps": 3}}))
        for flag in (False, True)
    )
    assert any(getattr(m, "gradient_checkpointing", False) for m in on.modules())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in off.modules())
    assert [s["loss"] for s in log_on.steps] == pytest.approx([s["loss"] for s in log_off.steps], rel=1e-6)


@pytest.mark.parametrize(
    "method", [{"type": "LoRA"}, {"type": "QLoRA"}, {"type": "QLoRA", "quantization": {"type": "Int8"}}]
)
def test_trainables_are_float32_and_the_base_is_not_touched(
    tiny_model: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    run = snapshot(method=method, training={"length": {"steps": 2}})
    fresh = dict(model.load_base(tiny_model, run, CPU16).named_parameters())
    trained, _ = fit(tiny_model, tmp_path, run, CPU16)
    assert {p.dtype for p in weights_of(trained).values()} == {torch.float32}
    for name, parameter in trained.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, fresh[name.replace(".base_layer.", ".")]), name
            assert parameter.dtype in (torch.bfloat16, torch.uint8, torch.int8)


def test_evaluating_a_4_bit_base_first_does_not_cut_its_gradient(tiny_model: Path) -> None:
    # bitsandbytes repacks weights for the CPU at the first forward in evaluation mode; that kernel has no backward.
    run = snapshot(method={"type": "QLoRA"})
    rows = rows_of(tiny_model, 4)
    gradients = []
    for evaluate_first in (False, True):
        base = model.load_base(tiny_model, run, CPU16)
        if evaluate_first:
            evaluate.held_out_loss(base, rows, 0, CPU16)
        peft_model = model.attach_adapter(base, run).train()
        batch = {"input_ids": torch.tensor([rows.ids(0)]), "attention_mask": torch.ones(1, rows.length(0)).long()}
        with CPU16.autocast():
            peft_model(**batch, labels=torch.tensor([rows.labels(0)])).loss.backward()
        gradients.append({n: p.grad for n, p in peft_model.named_parameters() if p.grad is not None and p.grad.any()})
    assert set(gradients[0]) == set(gradients[1])
    # lora_A has no gradient yet because lora_B is zero; every lora_B has one, the first layer's too.
    assert len(gradients[1]) == 14


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_the_held_out_loss_does_not_depend_on_batches_or_padding(tiny_model: Path, method: str) -> None:
    base = model.load_base(tiny_model, snapshot(method={"type": method}), CPU32)
    rows = rows_of(tiny_model, 12)
    losses = [evaluate.held_out_loss(base, rows, pad, CPU32, budget) for pad, budget in ((0, 1), (2, 64), (7, 100_000))]
    assert all((one.tokens, one.right) == (losses[0].tokens, losses[0].right) for one in losses)
    assert [one.loss for one in losses] == pytest.approx([losses[0].loss] * 3, rel=1e-5 if method == "LoRA" else 2e-3)


@pytest.mark.parametrize(
    ("optimizer", "value"),
    [("adamw_torch_fused", "nan"), ("adamw_torch", "nan"), ("sgd", "nan"), ("adamw_torch_fused", "inf")],
)
def test_a_loss_that_is_not_finite_fails_before_it_reaches_the_weights(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, value: str
) -> None:
    run = snapshot(training={"length": {"steps": 2}, "optimizer": {"name": optimizer}})
    base = model.load_base(tiny_model, run, CPU32)
    if value == "nan":
        base.get_parameter("model.norm.weight").data[0] = float("nan")
    original = LearnedTokenLoss.__call__
    monkeypatch.setattr(
        LearnedTokenLoss,
        "__call__",
        lambda self, batch: original(self, batch) * (float(value) if value == "inf" else 1),
    )
    rows = rows_of(tiny_model, 8)
    peft_model = model.attach_adapter(base, run)
    before = {n: w.clone() for n, w in weights_of(peft_model).items()}
    schedule = make_schedule(len(rows), run.spec.training.length, 8, 0)
    trainer = LoraTrainer(
        model=peft_model, args=training_arguments(run, CPU32, schedule.steps, tmp_path), rows=rows, schedule=schedule,
        micro_batch=4, pad_id=0, compute=CPU32, callbacks=[],
    )  # fmt: skip
    with pytest.raises(StageError, match=rf"{value} at step 1 of 2") as caught:
        trainer.train()
    assert caught.value.reason is Reason.NON_FINITE_LOSS
    assert all(torch.equal(w, before[n]) for n, w in weights_of(peft_model).items())


def test_the_schedule_and_optimizer_of_the_spec_are_used(tiny_model: Path, tmp_path: Path) -> None:
    training = {
        "length": {"steps": 10},
        "scheduler": "Linear",
        "warmup": {"fraction": 0.2},
        "optimizer": {"learningRate": 0.01, "weightDecay": 0.1, "maxGradNorm": 0.5},
    }
    run = snapshot(training=training)
    _, log = fit(tiny_model, tmp_path, run)
    rates = [round(step["learning_rate"], 6) for step in log.steps]
    assert rates == [0, 0.005, 0.01, 0.00875, 0.0075, 0.00625, 0.005, 0.00375, 0.0025, 0.00125]
    arguments = training_arguments(run, CPU32, 10, tmp_path)
    assert (arguments.weight_decay, arguments.max_grad_norm) == (0.1, 0.5)


def test_a_missing_gpu_is_an_error_that_says_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "void")
    with pytest.raises(StageError, match=r"sees no GPU.*NVIDIA_VISIBLE_DEVICES.*void") as caught:
        device.pick_compute(Training())
    assert caught.value.reason is Reason.NO_GPU


def test_the_cpu_is_used_when_asked_for_even_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compute = device.pick_compute(Training(use_cpu=True))
    assert (compute.device.type, compute.dtype) == ("cpu", device.cpu_dtype())


def test_the_type_that_is_asked_for_counts() -> None:
    asked = (
        Training(use_cpu=True, compute_dtype=ComputeDtype.BFLOAT16),
        Training(use_cpu=True, compute_dtype=ComputeDtype.FLOAT32),
    )
    assert [device.pick_compute(training).dtype for training in asked] == [torch.bfloat16, torch.float32]
    assert device.gpu_dtype(ComputeDtype.FLOAT16, True, "an A10G") is torch.float16
    assert device.gpu_dtype(ComputeDtype.AUTO, False, "a T4") is torch.float16
    with pytest.raises(StageError, match=r"computeDtype: bfloat16: a T4 multiplies float16 only"):
        device.gpu_dtype(ComputeDtype.BFLOAT16, False, "a T4")


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bfloat16_only_where_it_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    assert device.cpu_dtype() is dtype


@pytest.mark.parametrize(
    ("quota", "cpus"), [("150000 100000", 2), ("100000 100000", 1), ("max 100000", None), ("", None)]
)
def test_threads_follow_the_cgroup_quota(tmp_path: Path, quota: str, cpus: int | None) -> None:
    import os

    (tmp_path / "cpu.max").write_text(quota)
    assert usable_cpus(tmp_path / "cpu.max") == min(cpus or len(os.sched_getaffinity(0)), len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("Unrecognized model"), Reason.UNSUPPORTED_MODEL),
        (OSError("no file named model.safetensors found"), Reason.UNSUPPORTED_MODEL),
        (FileNotFoundError(errno.ENOENT, "No such file", "model-2.safetensors"), Reason.UNSUPPORTED_MODEL),
        (SafetensorError("MetadataIncompleteBuffer"), Reason.UNSUPPORTED_MODEL),
        (RuntimeError("size mismatch"), Reason.UNSUPPORTED_MODEL),
        (torch.OutOfMemoryError("tried to allocate"), None),
        (torch.AcceleratorError("an illegal memory access was encountered"), None),
        (OSError(errno.ENOSPC, "No space left on device", "/work/x"), None),
        (OSError(errno.EIO, "Input/output error"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_only_the_models_own_faults_fail_for_good(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: Reason | None
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(StageError if reason else type(error)) as caught:
        model.load_base(tiny_model, snapshot(), CPU32)
    assert getattr(caught.value, "reason", None) is reason


def test_an_unknown_target_module_names_the_ones_that_exist(tiny_model: Path) -> None:
    run = snapshot(method={"lora": {"targetModules": ["query_key_value"]}})
    with pytest.raises(StageError, match=r"down_proj.*q_proj") as caught:
        model.attach_adapter(model.load_base(tiny_model, run, CPU32), run)
    assert caught.value.reason is Reason.UNKNOWN_TARGET_MODULE


def test_trained_biases_are_put_back_when_the_adapter_is_taken_off(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    run = snapshot(method={"lora": {"bias": "All"}})
    base = model.load_base(tmp_path, run, CPU16)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    peft_model = model.attach_adapter(base, run)
    original = model.trained_base_weights(peft_model)
    assert set(original) == {f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkv"}
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += 1
    bare = model.detach_adapter(peft_model, original, torch.bfloat16)
    after = dict(bare.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[n], before[n]) and after[n].dtype == before[n].dtype for n in before)
