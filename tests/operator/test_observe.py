"""What the operator reads of the API server's objects."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

from finetune_api import COMBINATION_KIND, KIND
from finetune_api.names import LABEL_STAGE, LABEL_UID, Stage
from finetune_api.status import AttemptStatus, ConditionType
from finetune_operator.apply import Applier
from finetune_operator.cache import Cache, Key
from finetune_operator.client import Api
from finetune_operator.observe import parse_status, trim_finetunejob, trim_job, trim_pod
from finetune_operator.planning.conditions import is_true
from finetune_operator.settings import Settings
from finetune_operator.snapshots import Snapshots
from finetune_operator.unknown import unknown_fields, with_unknown
from tests.operator.manifests import finetunejob, success, termination_message

Raw = dict[str, Any]
AT = "2026-03-01T12:00:00Z"
MOMENT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def meta(**more: object) -> Raw:
    owner = {"uid": "owner", "controller": True}
    return {
        "name": "x",
        "uid": "u",
        "labels": {LABEL_UID: "owner", LABEL_STAGE: "train"},
        "ownerReferences": [owner],
        "creationTimestamp": AT,
        **more,
    }


def pod(status: Raw, **more: object) -> Raw:
    return {"metadata": meta(**more), "spec": {"nodeName": "n"}, "status": status}


def finished(**more: object) -> Raw:
    return {
        "type": "Finished",
        "status": "True",
        "lastTransitionTime": AT,
        "reason": "Succeeded",
        "message": "done",
        **more,
    }


def test_a_status_of_a_newer_version_keeps_its_conditions_and_so_a_finished_job_is_not_run_again() -> None:
    status = parse_status(
        {
            "phase": "Succeeded",
            "conditions": [finished(newField=1)],
            "attempts": [{"executionId": "e", "stage": "train", "pod": "p", "outcome": "Succeeded", "gpuSeconds": 5}],
            "alsoNew": {"a": 1},
        }
    )
    assert is_true(status, ConditionType.FINISHED)
    assert [a.execution_id for a in status.attempts] == ["e"]


def test_a_running_job_with_a_spec_field_of_a_newer_version_goes_on() -> None:
    raw = finetunejob("newer").set(suspend=True, priority="high").build()
    raw["spec"]["training"] = {"useCpu": True, "newField": {"a": 1}}
    raw["metadata"] |= {"uid": "u", "generation": 2}
    seen = trim_finetunejob(raw, None)
    assert seen.spec is not None
    assert seen.spec.suspend
    assert seen.spec.training.use_cpu


def test_a_spec_that_means_what_this_version_cannot_do_is_still_refused() -> None:
    raw = finetunejob("newer").set(method={"type": "Quantum"}).build()
    raw["metadata"] |= {"uid": "u"}
    assert "spec.method.type" in trim_finetunejob(raw, None).spec_error


NEWER = {
    "phase": "Training",
    "alsoNew": {"a": 1},
    "plan": {
        **{"method": "LoRA", "rank": 8, "alpha": 16, "learningRate": 2e-4, "microBatchSequences": 4},
        **{"gradientAccumulationSteps": 4, "summary": "", "shards": 8},
    },
    "conditions": [finished(severity="Info")],
    "attempts": [{"executionId": "e", "stage": "train", "pod": "p", "outcome": "Running", "gpuSeconds": 5}],
    "progress": {"executionId": "e", "stage": "train", "flops": 1.5},
}


def test_what_only_a_newer_version_knows_of_a_status_is_written_again() -> None:
    status = parse_status(NEWER)
    unknown = unknown_fields(NEWER, status)
    ended = [a.model_copy(update={"outcome": "Failed"}) for a in status.attempts]
    new = AttemptStatus(execution_id="f", stage="train", pod="q")
    body = status.model_copy(update={"attempts": [*ended, new], "progress": None}).to_json_dict()
    written = with_unknown(body, unknown, type(status))
    assert written["alsoNew"] == {"a": 1}
    assert written["plan"]["shards"] == 8
    assert written["conditions"][0]["severity"] == "Info"
    assert [(a["outcome"], a.get("gpuSeconds")) for a in written["attempts"]] == [("Failed", 5), ("Running", None)]
    assert "progress" not in written, "another manager's"
    assert unknown_fields(status.to_json_dict(), status) == {}, "nothing is kept of what is known"


def test_of_a_list_only_the_item_that_cannot_be_read_is_left_out() -> None:
    status = parse_status({"phase": "Evaluating", "conditions": [finished(type="New", status="Perhaps"), finished()]})
    assert status.phase is None
    assert [c.type for c in status.conditions] == ["Finished"]


def test_a_sidecar_that_was_injected_before_our_container_is_not_taken_for_it() -> None:
    report = termination_message(success(Stage.TRAIN))
    sidecar = {"name": "proxy", "state": {"terminated": {"exitCode": 9, "finishedAt": AT, "message": "bye"}}}
    ours = {"name": "train", "state": {"terminated": {"exitCode": 0, "finishedAt": AT, "message": report}}}
    seen = trim_pod(pod({"phase": "Running", "containerStatuses": [sidecar, ours]}))
    assert seen is not None
    assert seen.exit_code == 0
    assert seen.report is not None
    only = trim_pod(pod({"phase": "Running", "containerStatuses": [sidecar]}))
    assert only is not None
    assert not only.ended


def test_the_report_of_a_newer_trainer_is_read() -> None:
    message = termination_message(success(Stage.TRAIN)).replace('{"stage"', '{"new":1,"stage"', 1)
    ours = {"name": "train", "state": {"terminated": {"exitCode": 0, "finishedAt": AT, "message": message}}}
    seen = trim_pod(pod({"phase": "Succeeded", "containerStatuses": [ours]}))
    assert seen is not None
    assert seen.report is not None


def test_a_deleted_pod_tells_when_its_grace_period_ends() -> None:
    seen = trim_pod(pod({"phase": "Running"}, deletionTimestamp=AT))
    assert seen is not None
    assert (seen.deleting, seen.deletion_due) == (True, MOMENT)


def test_a_pod_tells_when_it_was_bound_to_its_node() -> None:
    bound = {"type": "PodScheduled", "status": "True", "lastTransitionTime": AT}
    seen = trim_pod(pod({"phase": "Pending", "conditions": [bound]}))
    assert seen is not None
    assert (seen.bound_at, seen.unschedulable) == (MOMENT, "")


def test_a_terminating_pod_is_one_that_the_job_controller_counts() -> None:
    seen = trim_job({"metadata": meta(), "status": {"active": 0, "terminating": 1, "startTime": AT}})
    assert seen is not None
    assert (seen.active, seen.started_at) == (1, MOMENT)


def test_a_resumed_job_counts_as_suspended_until_the_job_controller_has_noticed() -> None:
    suspended = {"type": "Suspended", "status": "True", "lastTransitionTime": AT}
    job = {"metadata": meta(), "spec": {"suspend": False}, "status": {"conditions": [suspended]}}
    seen = trim_job(job)
    assert seen is not None
    assert seen.suspended


async def test_a_status_write_carries_what_only_a_newer_version_knows() -> None:
    written: list[Raw] = []

    class Server:
        async def apply_status(self, kind: str, namespace: str, name: str, uid: str, status: Raw, *_: str) -> Raw:
            written.append(status)
            return {**raw, "metadata": {**raw["metadata"], "resourceVersion": "6"}, "status": status}

    raw = {**finetunejob("newer").build(), "status": NEWER}
    raw["metadata"] |= {"uid": "u", "resourceVersion": "5"}
    cache, api = Cache(), cast(Api, Server())
    applier = Applier(api, cache, Snapshots(api, Settings()), Settings())
    cache.put(KIND, raw)
    seen = cache.jobs[Key("default", "newer")]
    await applier.write_status(seen.view(), seen.status.model_copy(update={"message": "on"}), seen.resource_version)
    assert (written[0]["message"], written[0]["alsoNew"]) == ("on", {"a": 1})
    assert written[0]["attempts"][0]["gpuSeconds"] == 5

    raw = {**raw, "kind": COMBINATION_KIND, "status": {"alsoNew": 2, "conditions": [finished(severity="Info")]}}
    key = cache.put(COMBINATION_KIND, raw)
    assert key is not None
    combination = cache.combinations[key]
    on = combination.status.model_copy(update={"message": "on"})
    await applier.write_status(combination.job, on, combination.resource_version)
    assert (written[1]["message"], written[1]["alsoNew"]) == ("on", 2)
    assert written[1]["conditions"][0]["severity"] == "Info"
