"""The base shared out over ranks (FSDP): the same numbers as with whole copies, and no rank ever holds much more than its part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from finetune_api.answering import GATHERED_PROMPTS
from finetune_api.failures import FAILURES, Reason
from finetune_api.planner import Request, Tuning, describe, parse_config, plan
from finetune_api.planner.distributed import Layout
from finetune_trainer.errors import StageError
from finetune_trainer.train import model, sharded
from finetune_trainer.train import run as train
from finetune_trainer.train.device import Compute
from finetune_trainer.train.quantized import quantized_modules
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.trainer import training_arguments
from tests.planner.simulator.tracker import LiveStorages
from tests.support import tiny_model as tiny_model_module
from tests.support.loading_ranks import CPU16, Held, held_by_ranks
from tests.support.prepared import PreparedJob, job_spec, prepare_job, snapshot_of
from tests.support.tiny_families import build_tiny_family
from tests.support.tiny_model import build_tiny_model
from tests.support.train_container import ENV_CHUNK_BYTES
from tests.support.train_process import kill_all, pod_of, steps
from tests.trainer.test_train_ranks import ROUNDING
from tests.trainer.test_train_resume import curve, result

pytestmark = pytest.mark.timeout(1200)
CPU = Compute(torch.device("cpu"), torch.float32, "cpu")
# 24 rows, 7 to a step: on two ranks some micro-batches are empty, and the ranks must compute all the same.
SPEC: dict[str, Any] = {
    "training": {"length": {"epochs": 3}, "globalBatchSequences": 7, "microBatchSequences": 2},
    "recovery": {"checkpoint": {"interval": {"steps": 3}}},
    "evaluation": {"intervalSteps": 4},
    "compute": {"gpusPerNode": 2},
}


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    kill_all()


def weights(job: PreparedJob) -> bytes:
    return job.context().output_store().get_bytes("adapter/adapter_model.safetensors")


def answers(job: PreparedJob) -> Any:
    return json.loads(job.context().output_store().get_bytes("reports/answers.json"))


def test_four_ranks_with_a_quarter_each_train_as_one_process_does(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    method = {"type": "QLoRA", "lora": {"rank": 4, "dropout": 0.0}}
    training = {**SPEC["training"], "length": {"steps": 4}}
    alone = prepare_job(
        s3,
        tmp_path / "one",
        tiny_model,
        held_out_rows=10,
        method=method,
        training=training,
        evaluation={"generation": {"prompts": 1}},
    )
    train.run(alone.context())
    shards = prepare_job(
        s3,
        tmp_path / "four",
        tiny_model,
        method=method,
        training={**training, "parallelism": "FSDP"},
        compute={"gpusPerNode": 4},
        held_out_rows=10,
        prompts=10,
        evaluation={"generation": {"prompts": 10, "maxNewTokens": 2}},
    )
    pod = pod_of(shards)
    assert pod.start().wait() == 0, pod.log
    assert len(curve(shards)) == 4
    assert curve(shards) == pytest.approx(curve(alone), rel=ROUNDING)
    assert result(shards).metrics.held_out_loss == pytest.approx(result(alone).metrics.held_out_loss, rel=ROUNDING)
    assert len(answers(shards)) == GATHERED_PROMPTS, "each token of an answer gathers the whole base"


def as_whole_copies(
    s3: Any,
    base: Path,
    folder: Path,
    method: str,
    evaluation: dict[str, Any] | None = None,
    bias: str = "None",
    **training: Any,
) -> tuple[PreparedJob, dict[str, Any]]:
    """What two ranks with a whole copy each make of a job, and its spec."""
    spec = with_training(
        {**SPEC, "method": {"type": method, "lora": {"rank": 4, "dropout": 0.2, "bias": bias}}}, **training
    )
    spec["evaluation"] = evaluation or spec["evaluation"]
    whole = prepare_job(s3, folder, base, **spec)
    pod = pod_of(whole)
    assert pod.start().wait() == 0, pod.log
    return whole, spec


def with_training(spec: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {**spec, "training": {**spec["training"], **training}}


def test_shards_give_the_bytes_that_whole_copies_give(s3: Any, tmp_path: Path) -> None:
    """Biases, too, which are trained whole on every rank. With an 8-bit optimizer, which a 70B on two GPUs with 24 GB needs: it breaks on sharded weights, and the adapter is whole. And all
    ranks pack their rows, and end early together: no second evaluation can satisfy the threshold."""
    eight_bit = {"optimizer": {"name": "paged_adamw_8bit"}, "packing": True}
    early = {"intervalSteps": 4, "earlyStopping": {"patience": 1, "threshold": 100}}
    base = build_tiny_family(tmp_path / "base", "qwen2")
    whole, spec = as_whole_copies(s3, base, tmp_path / "whole", "LoRA", early, bias="All", **eight_bit)
    shards = prepare_job(s3, tmp_path / "shards", base, **with_training(spec, parallelism="FSDP"))
    pod = pod_of(shards)
    assert pod.start().wait() == 0, pod.log
    assert weights(shards) == weights(whole)
    assert b"k_proj.base_layer.bias" in weights(whole)
    assert len(curve(shards)) == result(shards).metrics.early_stop_step == 8
    assert curve(shards) == curve(whole)
    assert answers(shards) == answers(whole)
    accuracies = [(m.token_accuracy_base, m.token_accuracy) for m in (result(shards).metrics, result(whole).metrics)]
    assert accuracies[0] == accuracies[1] != (None, None)


def test_quantized_shards_give_them_too_interrupted_and_in_host_memory(
    s3: Any, tiny_model: Path, tmp_path: Path
) -> None:
    whole, spec = as_whole_copies(s3, tiny_model, tmp_path / "whole", "QLoRA")
    shards = prepare_job(s3, tmp_path / "shards", tiny_model, **with_training(spec, parallelism="FSDP"))
    pod = pod_of(shards).start()
    pod.until_step(6)
    pod.process.send_signal(15)
    assert pod.wait() == FAILURES[Reason.INTERRUPTED].exit_code, pod.log
    made = steps(pod.lines)[-1]
    pod = pod_of(shards).start()
    assert pod.wait() == 0, pod.log
    assert steps(pod.lines)[0] == made + 1
    assert weights(shards) == weights(whole)
    assert curve(shards) == curve(whole)
    assert answers(shards) == answers(whole)
    assert result(shards).metrics.held_out_loss == result(whole).metrics.held_out_loss
    assert result(shards).metrics.token_accuracy == result(whole).metrics.token_accuracy
    assert result(shards).selected_step == result(whole).selected_step

    on_host = prepare_job(s3, tmp_path / "host", tiny_model, **with_training(spec, cpuOffload="Always"))
    pod = pod_of(on_host)
    assert pod.start().wait() == 0, pod.log
    assert weights(on_host) == weights(whole)
    assert curve(on_host) == curve(whole)


def test_one_rank_with_its_base_in_host_memory_gives_the_bytes_that_one_without_gives(
    s3: Any, tiny_model: Path, tmp_path: Path
) -> None:
    jobs = []
    for offload in ("Never", "Always"):
        training = {**SPEC["training"], "length": {"steps": 6}, "cpuOffload": offload}
        jobs.append(prepare_job(s3, tmp_path / offload, tiny_model, training=training))
        train.run(jobs[-1].context())
    here, there = jobs
    assert weights(there) == weights(here)
    assert curve(there) == curve(here)
    assert answers(there) == answers(here)


def test_ranks_whose_heads_have_different_numbers_of_chunks_do_not_wait_for_each_other(
    s3: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """Ragged steps of rows with different numbers of learned tokens, four of them a chunk."""
    spec = {**with_training(SPEC, parallelism="FSDP", length={"steps": 4}), "evaluation": {}}
    curves = []
    for chunk in (4 * 4 * 400, 1 << 28):
        job = prepare_job(s3, tmp_path / str(chunk), tiny_model, **spec)
        pod = pod_of(job)
        pod.environ[ENV_CHUNK_BYTES] = str(chunk)
        assert pod.start().wait() == 0, pod.log
        curves.append(curve(job))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.fixture
def two() -> Iterator[Ranks]:
    """The first of two ranks. Loading asks nothing of the other."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield Ranks(0, 2, sharded=True)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in the type that it is computed in, as planned: with so many layers that a part and two of them are less than all, and so wide that
    little else is held beside matrices."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HIDDEN", 512), ("INTERMEDIATE", 1024)):
            patch.setattr(tiny_model_module, name, value)
        folder = build_tiny_model(tmp_path_factory.mktemp("deep") / "model", layers=8, shards=3)
    for file in folder.glob("*.safetensors"):
        save_file({name: w.to(CPU16.dtype) for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def held(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, list[Held]]]:
    """What two and four ranks held when they had loaded it, and at most before."""
    return held_by_ranks(deep, tmp_path_factory.mktemp("told"))


def planned_loading(folder: Path, method: str, gpus: int) -> int:
    """Bytes of tensors on each GPU by plan."""
    arch = parse_config(json.loads((folder / "config.json").read_text()))
    planned = plan(
        Request(
            architecture=arch,
            shapes=describe(arch),
            tuning=Tuning(quantized=method == "QLoRA"),
            layout=Layout.SINGLE if gpus == 1 else Layout.FSDP,
            gpus=gpus,
        )
    )
    return planned.peak_loading_bytes - planned.context_bytes


def to_share_out(module: torch.nn.Module) -> int:
    """Bytes of a module's matrices, and of the constants of their blocks."""
    matrices = sum(p.nbytes for p in module.parameters() if p.dim() >= 2)
    return matrices + sum(m.weight.quant_state.absmax.nbytes for m in module.modules() if isinstance(m, Linear4bit))


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_no_rank_ever_holds_more_than_its_part_and_two_layers(
    deep: Path, held: dict[str, dict[int, list[Held]]], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what other threads make is not seen
    with LiveStorages() as alone:
        whole = model.load_base(deep, snapshot_of(job_spec(None, "bucket", method={"type": method}), "u" * 32), CPU16)
    planned = planned_loading(deep, method, gpus=1)
    assert alone.peak_bytes == pytest.approx(planned, rel=0.03)
    vectors = sum(p.nbytes for p in whole.parameters() if p.dim() < 2)
    layer = to_share_out(whole.model.layers[0])
    for size, ranks in held[method].items():
        part = to_share_out(whole) / size + vectors
        assert part + 2 * layer < 0.8 * to_share_out(whole), "or it would say nothing"
        planned = planned_loading(deep, method, size)
        for rank in ranks:
            assert rank.quantized == quantized_modules(whole), "as without sharding"
            assert rank.part_bytes == part
            assert rank.peak_bytes <= part + 2 * layer
            # Planned is another whole layer, and for QLoRA the largest tensor in 16 bit: of so few layers up to three tenths.
            assert 0.72 * planned <= rank.peak_bytes <= planned


def test_an_offloaded_base_leaves_the_device_unit_by_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU both are the same memory: that FSDP was told so, for each unit, is what can be seen here."""
    policies = []

    def told(module: Any, **arguments: Any) -> Any:
        policies.append(arguments.get("offload_policy"))
        return fully_shard(module, **arguments)

    monkeypatch.setattr(sharded, "fully_shard", told)
    folder = build_tiny_model(tmp_path / "model", layers=2)
    snapshot = snapshot_of(job_spec(None, "bucket", method={"type": "QLoRA"}), "u" * 32)
    try:
        loaded, records = sharded.load_sharded(folder, snapshot, CPU, Ranks(sharded=True, offloaded=True))
    finally:
        distributed.destroy_process_group()
    assert [isinstance(policy, CPUOffloadPolicy) for policy in policies] == [True] * 4 + [False], "root: nothing left"
    whole = model.load_base(folder, snapshot, CPU)
    assert records == quantized_modules(whole)
    matrices = [p for p in loaded.parameters() if p.dim() >= 2]
    assert matrices
    assert all(isinstance(p, DTensor) and p.to_local().device.type == "cpu" for p in matrices)


def test_a_matrix_that_was_not_sharded_is_noticed(two: Ranks, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", layers=2)
    loaded, _ = sharded.load_sharded(folder, snapshot_of(job_spec(None, "bucket"), "u" * 32), CPU, two)
    layer = loaded.model.layers[1]
    sharded.must_be_sharded([("layer", layer)], two)
    layer.mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    with pytest.raises(AssertionError, match=r"layer\.mlp\.up_proj\.weight is not sharded"):
        sharded.must_be_sharded([("layer", layer)], two)


def test_the_adapter_of_an_offloaded_base_goes_where_products_are_computed(tmp_path: Path) -> None:
    run = snapshot_of(job_spec(None, "bucket"), "u" * 32)
    adapted = model.attach_adapter(model.load_base(build_tiny_model(tmp_path / "model", layers=2), run, CPU), run)
    sharded.adapter_to(adapted, torch.device("meta"))
    assert {(p.is_meta, p.requires_grad) for p in adapted.parameters()} == {(True, True), (False, False)}
    assert training_arguments(run, CPU, 3, tmp_path, ranks=Ranks(sharded=True)).place_model_on_device is False
    assert training_arguments(run, CPU, 3, tmp_path).place_model_on_device is None


def test_tied_embeddings_are_whole_on_every_rank(two: Ranks, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", tied=True)
    snapshot = snapshot_of(job_spec(None, "bucket"), "u" * 32)
    loaded, _ = sharded.load_sharded(folder, snapshot, CPU, two)
    embeddings = loaded.get_input_embeddings().weight
    assert embeddings is loaded.get_output_embeddings().weight
    assert not isinstance(embeddings, DTensor)
    assert torch.equal(embeddings, model.load_base(folder, snapshot, CPU).get_input_embeddings().weight)


def test_a_model_whose_files_name_its_tensors_otherwise_is_refused(two: Ranks, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    tensors = {n.removeprefix("model."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    snapshot = snapshot_of(job_spec(None, "bucket"), "u" * 32)
    with pytest.raises(StageError, match=r"have no model\.embed_tokens\.weight.*parallelism: DDP") as refused:
        sharded.load_sharded(folder, snapshot, CPU, two)
    assert refused.value.reason is Reason.UNSUPPORTED_MODEL
