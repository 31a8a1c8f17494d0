"""What the operator reads of the API server's objects."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_api.names import LABEL_STAGE, LABEL_UID, Stage
from finetune_api.status import ConditionType
from finetune_operator.observe import parse_status, trim_job, trim_pod
from finetune_operator.planning.conditions import is_true
from tests.operator.manifests import success, termination_message

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
