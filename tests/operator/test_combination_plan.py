"""What an AdapterCombination needs next, as tables: the plan is a pure function."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api import COMBINATION_KIND
from finetune_api.combination import AdapterCombinationStatus, CombinationSnapshot
from finetune_api.failures import FAILURES, INTERRUPTED_EXIT_CODES, Consequence, Reason
from finetune_api.names import ENV_ENDPOINT, ENV_SNAPSHOT, LABEL_UID, Stage
from finetune_api.snapshot import JobIdentity
from finetune_api.spec import AdapterCombinationSpec, CombinationRuntime
from finetune_api.status import ConditionType, FineTuneJobStatus
from finetune_operator.apply import Applier
from finetune_operator.cache import Cache, Key
from finetune_operator.combinations.job import combine_job
from finetune_operator.combinations.observe import trim_combination
from finetune_operator.combinations.reconciler import CombinationReconciler
from finetune_operator.planning.combination import CombinationPlan, CombinationView, plan_combination
from finetune_operator.planning.conditions import find, is_true
from finetune_operator.planning.model import DeleteJob, JobView, Observation, PlannerConfig, Pod, Refusal, StageJob
from finetune_operator.pods import failure_rules
from finetune_operator.settings import Settings
from finetune_operator.workqueue import WorkQueue
from tests.operator.manifests import COMBINED, combination, failure, success

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
UID = "3f9c2a11-0000-4000-8000-000000000000"
OWNER = JobView("ns", "mix", UID, 1, NOW, False, None, "", FineTuneJobStatus(), kind=COMBINATION_KIND)
JOB = StageJob("mix-3f9c2a11-combine", "job", Stage.COMBINE, NOW)
POD = Pod("p", "pod", "job", Stage.COMBINE, NOW, started_at=NOW, phase="Running")


def spec(**fields: Any) -> AdapterCombinationSpec:
    return AdapterCombinationSpec.model_validate(combination("mix", **fields)["spec"])


def planned(
    *pods: Pod,
    job: StageJob | None = JOB,
    status: AdapterCombinationStatus | None = None,
    later: float = 0,
    own: AdapterCombinationSpec | None = None,
    **seen: Any,
) -> CombinationPlan:
    view = CombinationView(own or spec(), "", status or AdapterCombinationStatus())
    obs = Observation(OWNER, NOW + timedelta(seconds=later), (job,) if job else (), pods, **seen)
    return plan_combination(view, obs, PlannerConfig())


def ended(reason: Reason, message: str, name: str = "p", created: float = 0) -> Pod:
    at = NOW + timedelta(seconds=created)
    code = FAILURES[reason].exit_code
    report = failure(Stage.COMBINE, reason, message)
    return Pod(
        name,
        name,
        "job",
        Stage.COMBINE,
        at,
        phase="Failed",
        started_at=at,
        finished_at=at,
        exit_code=code,
        report=report,
    )


def told(plan: CombinationPlan, kind: ConditionType) -> tuple[str, str]:
    assert plan.status is not None
    condition = find(plan.status, kind)
    assert condition is not None
    assert condition.status == "True"
    return condition.reason, condition.message


def test_its_job_is_created_and_its_first_status_says_so() -> None:
    plan = planned(job=None)
    assert plan.create_job
    assert plan.status is not None
    assert (plan.status.phase, plan.status.start_time) == ("Pending", "2026-03-01T12:00:00Z")


def test_nothing_is_written_while_nothing_changes() -> None:
    running = planned(POD)
    assert running.status is not None
    assert (running.status.phase, running.create_job) == ("Running", False)
    assert running.status.message == "Combines 2 adapters (Cat) on a CPU."
    assert planned(POD, status=running.status, later=60).status is None


@pytest.mark.parametrize(
    ("job", "pods", "words"),
    [
        (JOB, (), "Starts a pod on a CPU."),
        (replace(JOB, suspended=True), (), "Its Job is suspended: a queue, or somebody, holds it."),
        (replace(JOB, deleting=True), (POD,), "Waits for the pods of a Job that was deleted to stop."),
        (None, (POD,), "Waits for the pods of a Job that was deleted to stop."),
    ],
    ids=["starting", "queued", "deleted", "gone"],
)
def test_what_it_does_before_a_pod_runs(job: StageJob | None, pods: tuple[Pod, ...], words: str) -> None:
    plan = planned(*pods, job=job)
    assert plan.status is not None
    assert (plan.status.phase, plan.status.message, plan.create_job) == ("Pending", words, False)


def test_its_end_names_artifacts_and_how_exact_it_is() -> None:
    done = replace(POD, phase="Succeeded", finished_at=NOW, exit_code=0, report=success(Stage.COMBINE))
    plan = planned(done, job=replace(JOB, complete_at=NOW))
    status = plan.status
    assert status is not None
    assert is_true(status, ConditionType.COMPLETE)
    assert is_true(status, ConditionType.FINISHED)
    assert status.artifacts is not None
    assert status.artifacts.adapter_uri == "s3://results/here/mix-3f9c2a11/adapter"
    assert status.artifacts.manifest_uri == "s3://results/here/mix-3f9c2a11/manifest.json"
    assert status.artifacts.adapter_sha256 == COMBINED.adapter_sha256
    assert (status.rank, status.modules, status.base_model, status.phase) == (12, 14, "org/smol", "Succeeded")
    assert "the weighted sum, but for rounding (2e-08)" in (status.message or "")
    assert [e.reason for e in plan.events] == ["Combined"]
    assert planned(done, job=replace(JOB, complete_at=NOW), status=status, later=9) == CombinationPlan()


def test_a_rough_result_says_how_rough() -> None:
    result = COMBINED.model_copy(update={"exact": False, "relative_error": 0.31}).to_json_dict()
    report = success(Stage.COMBINE).model_copy(update={"result": result})
    done = replace(POD, phase="Succeeded", finished_at=NOW, exit_code=0, report=report)
    status = planned(done, job=replace(JOB, complete_at=NOW)).status
    assert status is not None
    assert (status.message or "").endswith("its update is 0.31 (relative) from the weighted sum.")


def test_a_lost_report_is_no_lost_result() -> None:
    complete = replace(JOB, complete_at=NOW)
    assert planned(job=complete).requeue_after == 5.0
    status = planned(job=complete, later=6).status
    assert status is not None
    assert is_true(status, ConditionType.COMPLETE)
    assert status.artifacts is not None
    assert status.artifacts.adapter_bytes is None


def test_a_failure_carries_reason_words_and_advice() -> None:
    bad = ended(Reason.INVALID_CONFIG, "adapters[1]: s3://a/b is more than a plain LoRA adapter (use_dora)")
    plan = planned(bad, job=replace(JOB, failed_at=NOW, failed_reason="PodFailurePolicy"))
    reason, message = told(plan, ConditionType.FAILED)
    assert reason == "InvalidConfig"
    assert "more than a plain LoRA adapter (use_dora)." in message
    assert FAILURES[Reason.INVALID_CONFIG].advice in message
    assert [e.reason for e in plan.events] == ["Failed"]


def test_what_is_missing_is_waited_for_between_pods() -> None:
    missing = ended(Reason.SECRET_MISSING, "Secret s3 (for adapter-1) does not exist or is empty")
    plan = planned(missing)
    reason, message = told(plan, ConditionType.WAITING)
    assert reason == "SecretMissing"
    assert message.startswith(
        "Secret s3 (for adapter-1) does not exist or is empty. It fails when it is not done 3600 s"
    )
    assert plan.status is not None
    after = planned(missing, replace(POD, name="q", uid="q", created=NOW + timedelta(seconds=10)), status=plan.status)
    assert after.status is not None, "the next pod runs"
    assert after.status.phase == "Running"
    assert told(after, ConditionType.WAITING)[0] == "SecretMissing"


def test_the_deadline_names_what_was_missing_last() -> None:
    missing = ended(Reason.STORAGE_UNAVAILABLE, "s3.example.com cannot be reached")
    stopped = ended(Reason.INTERRUPTED, "the container was told to stop (SIGTERM)", "q", 10)
    plan = planned(missing, stopped, job=replace(JOB, failed_at=NOW, failed_reason="DeadlineExceeded"))
    reason, message = told(plan, ConditionType.FAILED)
    assert reason == "DeadlineExceeded"
    assert "after 3600 s" in message
    assert (
        "StorageUnavailable: S3.example.com cannot be reached." in message
        or "StorageUnavailable: s3.example.com" in message
    )


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        ({"conflict": "Job x exists and is not controlled by this AdapterCombination."}, "NameConflict"),
        ({"refusal": Refusal("spec.template: invalid", NOW, for_good=True)}, "AdmissionRefused"),
    ],
)
def test_what_nobody_can_mend_fails_at_once(seen: dict[str, Any], reason: str) -> None:
    assert told(planned(job=None, **seen), ConditionType.FAILED)[0] == reason


def test_a_refused_job_is_asked_for_again_when_it_is_time() -> None:
    refusal = Refusal("exceeded quota", NOW + timedelta(seconds=4))
    plan = planned(job=None, refusal=refusal)
    assert not plan.create_job
    assert told(plan, ConditionType.WAITING)[0] == "AdmissionRefused"
    again = planned(job=None, refusal=refusal, status=plan.status)
    assert (again.status, again.requeue_after) == (None, 4.0)
    assert planned(job=None, refusal=refusal, status=plan.status, later=4).create_job


@pytest.mark.parametrize(
    ("job", "seen", "words"),
    [
        (None, {"refusal": Refusal("exceeded quota", NOW + timedelta(days=1))}, "AdmissionRefused: exceeded quota."),
        (None, {}, "Starts a pod on a CPU."),
        (replace(JOB, suspended=True, started_at=NOW), {}, "Its Job is suspended: a queue, or somebody, holds it."),
    ],
    ids=["refused", "deleted again and again", "suspended"],
)
def test_its_deadline_also_ends_what_no_job_ends(job: StageJob | None, seen: dict[str, Any], words: str) -> None:
    status = planned(job=job, **seen).status
    waits = planned(job=job, status=status, later=3599, **seen)
    assert (waits.status, waits.requeue_after) == (None, 1.0)
    over = planned(job=job, status=status, later=3600, **seen)
    reason, message = told(over, ConditionType.FAILED)
    assert (reason, over.create_job) == ("DeadlineExceeded", False)
    assert f"It was not done after 3600 s (activeDeadlineSeconds). {words}" in message
    gone = planned(job=job, status=over.status, later=3601, **seen)
    assert gone.deletes == ((DeleteJob(job.name, job.uid),) if job else ())


async def test_the_suspended_job_of_one_that_has_failed_is_deleted() -> None:
    status = planned(job=replace(JOB, suspended=True), later=3600, own=spec(activeDeadlineSeconds=1)).status
    over = planned(
        job=replace(JOB, suspended=True), later=3601, status=status, own=spec(activeDeadlineSeconds=1)
    ).status
    assert over is not None
    raw = combination("mix")
    raw["metadata"] |= {"namespace": "ns", "uid": UID}
    raw["status"] = over.to_json_dict()
    cache = Cache()
    cache.put(COMBINATION_KIND, raw)
    body = combine_job(OWNER, spec(), Settings())
    body["metadata"] |= {"uid": "job", "resourceVersion": "1"}
    body["spec"]["suspend"] = True
    cache.put_job(body)
    deleted: list[DeleteJob] = []

    class Api:
        clock = SimpleNamespace(now=lambda: NOW)

        async def delete_job(self, namespace: str, delete: DeleteJob) -> Any:
            deleted.append(delete)
            return {}

    settings, queue = Settings(), WorkQueue[Key]()
    applier = Applier(Api(), cache, None, settings)  # type: ignore[arg-type]
    unused: Any = None
    reconciler = CombinationReconciler(cache, queue, applier, unused, unused, unused, settings)
    await reconciler.reconcile(Key("ns", "mix", COMBINATION_KIND))
    assert deleted == [DeleteJob(body["metadata"]["name"], "job")]


def test_a_job_that_was_admitted_late_has_its_whole_time() -> None:
    status = planned(job=replace(JOB, suspended=True)).status
    late = replace(JOB, started_at=NOW + timedelta(seconds=3500))
    for pods in ((), (POD,)):
        plan = planned(*pods, job=late, status=status, later=3700)
        assert plan.status is None or not is_true(plan.status, ConditionType.FINISHED)


def test_it_is_deleted_when_its_time_to_live_is_over() -> None:
    done = replace(POD, phase="Succeeded", finished_at=NOW, exit_code=0, report=success(Stage.COMBINE))
    own = spec(ttlSecondsAfterFinished=60)
    status = planned(done, job=replace(JOB, complete_at=NOW), own=own).status
    assert planned(status=status, own=own, later=20).requeue_after == 40.0
    assert planned(status=status, own=own, later=60).delete_self
    assert not planned(status=status, later=99999).delete_self


def test_one_that_is_being_deleted_or_cannot_be_read_creates_nothing() -> None:
    obs = Observation(replace(OWNER, deleting=True), NOW)
    assert (
        plan_combination(CombinationView(spec(), "", AdapterCombinationStatus()), obs, PlannerConfig())
        == CombinationPlan()
    )
    raw = combination("mix", type="Cat", density=0.5)
    raw["metadata"] |= {"namespace": "ns", "uid": UID}
    seen = trim_combination(raw)
    plan = plan_combination(seen.view(), Observation(seen.job, NOW), PlannerConfig())
    reason, message = told(plan, ConditionType.FAILED)
    assert (reason, plan.create_job) == ("InvalidConfig", False)
    assert "density, the share of values that is kept, is set for TIES" in message


def test_its_pod_has_what_it_needs_and_nothing_else() -> None:
    adapters = [
        {"uri": "s3://mine/x", "secretRef": {"name": "mine"}},
        {"uri": "pvc://models/y"},
        {"uri": "pvc://models/z", "secretRef": {"name": "other"}},
    ]
    runtime = {
        "image": "own:1",
        "nodeSelector": {"pool": "cpu"},
        "env": [{"name": "A", "value": "b"}],
        "labels": {"team": "x"},
    }
    asked = spec(
        adapters=adapters,
        runtime=runtime,
        activeDeadlineSeconds=77,
        output={"uri": "s3://out", "secretRef": {"name": "mine"}},
    )
    job = combine_job(OWNER, asked, Settings())
    assert job["metadata"]["ownerReferences"][0]["kind"] == "AdapterCombination"
    assert job["metadata"]["labels"][LABEL_UID] == UID
    assert job["spec"]["activeDeadlineSeconds"] == 77
    template = job["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "x"
    pod = template["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["nodeSelector"] == {"pool": "cpu"}
    [container] = pod["containers"]
    assert (container["image"], container["args"]) == ("own:1", ["combine"])
    assert "nvidia.com/gpu" not in str(pod)
    env = {e["name"]: e.get("value") for e in container["env"]}
    assert ENV_ENDPOINT not in env, "it reports to nobody"
    assert env["A"] == "b"
    handed = CombinationSnapshot.model_validate_json(env[ENV_SNAPSHOT] or "")
    identity = JobIdentity(name="mix", namespace="ns", uid=UID, generation=1)
    assert handed.digest() == CombinationSnapshot(job=identity, spec=asked).digest(), "all that decides the result"
    assert handed.spec.runtime == CombinationRuntime(), "Linux takes no variable above 128 KiB"
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    secrets = {f"/etc/finetune/secrets/{slot}" for slot in ("output", "adapter-0", "adapter-2")}
    assert mounts == {"/work", "/tmp", "/mnt/pvc/models", *secrets}
    assert (
        combine_job(OWNER, spec(), Settings(trainer_image="t:1"))["spec"]["template"]["spec"]["containers"][0]["image"]
        == "t:1"
    )


@pytest.mark.parametrize("failure_row", FAILURES.values(), ids=str)
def test_every_exit_code_is_followed_by_what_the_table_says(failure_row: Any) -> None:
    rules = combine_job(OWNER, spec(), Settings())["spec"]["podFailurePolicy"]["rules"]
    code = failure_row.exit_code
    if code is None:
        return
    action = next((r["action"] for r in rules if code in r.get("onExitCodes", {}).get("values", ())), "counts")
    passes = {
        Consequence.FAIL: "FailJob",
        Consequence.RETRY: "counts",
        Consequence.WAIT: "Ignore",
        Consequence.REPLACE: "Ignore",
    }
    assert action == passes[failure_row.consequence]
    assert set(INTERRUPTED_EXIT_CODES) - {137} <= set(rules[-1]["onExitCodes"]["values"])


@pytest.mark.parametrize("stage", [Stage.COMBINE, Stage.FETCH])
def test_a_pod_that_needs_more_memory_than_it_may_have_is_not_repeated_for_ever(stage: Stage) -> None:
    first, *by_code = failure_rules(stage)
    assert first["onPodConditions"][0]["type"] == "DisruptionTarget", "an evicted pod may end with any code"
    assert all(137 not in rule["onExitCodes"]["values"] for rule in by_code), "backoffLimit counts it"


@pytest.mark.parametrize("why", ["BackoffLimitExceeded", "DeadlineExceeded"])
def test_an_end_for_want_of_memory_says_so(why: str) -> None:
    killed = replace(POD, phase="Failed", finished_at=NOW, exit_code=137, terminated_reason="OOMKilled")
    reason, message = told(planned(killed, job=replace(JOB, failed_at=NOW, failed_reason=why)), ConditionType.FAILED)
    if why == "DeadlineExceeded":
        assert "The last failure: HostOutOfMemory: the combine container" in message
    else:
        assert reason == "HostOutOfMemory"
        assert "cpuStages.limits.memory" in message
