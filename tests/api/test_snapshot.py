"""The run snapshot: what is resolved, and what it does not depend on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.snapshot import Images, JobIdentity, Snapshot, largest_divisor, make_snapshot, resolve_plan
from finetune_api.spec import FineTuneJobSpec

JOB = JobIdentity(name="job", namespace="default", uid="3f9c2a11-aaaa-bbbb-cccc-000000000000", generation=1)
IMAGES = Images(prepare="prepare:1", train="trainer:1")


def spec(**overrides: object) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"uri": "hf://a/b"},
            "data": {"train": [{"uri": "s3://bucket/x.jsonl"}]},
            "output": {"uri": "s3://bucket/prefix/"},
            **overrides,
        }
    )


def snapshot(**overrides: object) -> Snapshot:
    return make_snapshot(spec(**overrides), JOB, IMAGES, "0.1.0")


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert resolve_plan(spec(method={"lora": {"rank": 8}})).method.lora.alpha == 16
    assert resolve_plan(spec(method={"lora": {"rank": 8, "alpha": 8}})).method.lora.alpha == 8


def test_constants_are_quantized_by_default_in_4_bit_only() -> None:
    def resolved(**quantization: object) -> bool:
        found = resolve_plan(spec(method={"type": "QLoRA", "quantization": quantization})).method.quantization
        assert found is not None
        return found.doubled

    assert resolved()
    assert resolved(type="FP4", doubleQuantization=True)
    assert not resolved(doubleQuantization=False)
    assert not resolved(type="Int8")


def test_an_adapter_that_begins_at_weights_is_published_with_twice_the_rank() -> None:
    ranks = {"rank": 8, "rankPattern": {"q_proj": 12}}
    found = [
        resolve_plan(spec(method={"lora": {**ranks, "initialization": kind}})).method.lora.highest_rank
        for kind in ("EVA", "PiSSA", "OLoRA")
    ]
    assert found == [12, 24, 24]


def test_quantization_is_resolved_for_qlora_only() -> None:
    assert resolve_plan(spec()).method.quantization is None
    assert resolve_plan(spec(method={"type": "QLoRA"})).method.quantization is not None


@pytest.mark.parametrize(
    ("total", "asked", "micro", "accumulation"),
    [(16, 4, 4, 4), (16, 5, 4, 4), (15, 4, 3, 5), (7, 4, 1, 7), (16, 16, 16, 1)],
)
def test_the_global_batch_stays_exact_whatever_micro_batch_is_asked_for(
    total: int, asked: int, micro: int, accumulation: int
) -> None:
    plan = resolve_plan(spec(training={"globalBatchSequences": total, "microBatchSequences": asked}))
    assert (plan.micro_batch_sequences, plan.gradient_accumulation_steps) == (micro, accumulation)
    assert micro * accumulation == total


def test_largest_divisor_is_at_least_one() -> None:
    assert largest_divisor(13, 12) == 1


def test_fields_that_may_change_during_a_run_do_not_change_the_digest() -> None:
    changed = snapshot(suspend=True, activeDeadlineSeconds=5, pendingTimeoutSeconds=7, ttlSecondsAfterFinished=1)
    assert changed.digest() == snapshot().digest()
    assert snapshot(training={"seed": 1}).digest() != snapshot().digest()


def test_a_snapshot_survives_its_json_form() -> None:
    original = snapshot(method={"type": "QLoRA"})
    assert Snapshot.model_validate_json(original.canonical_json()) == original
    assert Snapshot.model_validate_json(original.canonical_json()).digest() == original.digest()


def test_outputs_of_two_jobs_of_one_name_never_collide() -> None:
    assert str(snapshot().output) == "s3://bucket/prefix/job-3f9c2a11"
    assert str(snapshot().workspace) == "s3://bucket/prefix/job-3f9c2a11/workspace"
    moved = snapshot(output={"uri": "s3://bucket", "workspace": {"uri": "s3://scratch/tmp"}})
    assert str(moved.workspace) == "s3://scratch/tmp/job-3f9c2a11/workspace"


PREFIXES = st.lists(st.sampled_from(["a", "b", "job", "workspace", "adapter"]), max_size=3).map("/".join)


@given(bucket=st.sampled_from(["one", "two"]), output=PREFIXES, workspace=PREFIXES, same=st.booleans())
def test_deleting_the_workspace_never_touches_the_results_whatever_the_uris(
    bucket: str, output: str, workspace: str, same: bool
) -> None:
    place = f"s3://one/{output}"
    taken = snapshot(output={"uri": place, "workspace": {"uri": place if same else f"s3://{bucket}/{workspace}"}})
    below = f"{taken.workspace}/"
    for part in ("", "adapter", "merged", "reports", "manifest.json"):
        assert not f"{taken.output.join(part)}/".startswith(below)


def test_a_jobs_own_image_is_used_from_the_first_stage_so_that_a_wrong_one_never_costs_a_gpu() -> None:
    assert snapshot(runtime={"image": "mine:2"}).images == Images(prepare="mine:2", train="mine:2")
    assert snapshot().images == IMAGES


def test_a_job_without_trackers_is_frozen_as_before_there_were_any() -> None:
    assert "trackers" not in snapshot().canonical_json()
    assert '"trackers":[{"type":"TensorBoard"}]' in snapshot(trackers=[{"type": "TensorBoard"}]).canonical_json()
