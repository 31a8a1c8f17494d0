"""AdapterCombinations on a real API server with real Job controllers and scripted pods."""

from __future__ import annotations

import pytest

from finetune_api.failures import FAILURES, Reason
from finetune_api.names import Stage
from finetune_cluster.steps import Pod, Running, Step, Terminated
from tests.operator.harness import Bench, Raw, combinations_of, condition, is_true, jobs_of, succeed_stage
from tests.operator.manifests import combination, failure, finetunejob, termination_message
from tests.support.apiserver import ApiServer

pytestmark = pytest.mark.light

CRD = "adaptercombinations.finetune.dev"


def finished(raw: Raw) -> bool:
    return is_true(raw, "Finished")


def fails(reason: Reason, message: str) -> list[Step]:
    report = termination_message(failure(Stage.COMBINE, reason, message))
    return [Running(), Terminated(FAILURES[reason].exit_code or 1, report)]


def test_from_apply_to_combined_and_everything_goes_with_it(bench: Bench) -> None:
    operator = bench.start_operator()
    with bench.script() as kubelet:
        bench.combine(combination("mix"))
        done = bench.until_combined("mix", finished, "Finished")
        assert kubelet.errors == []
    status, uid = done["status"], done["metadata"]["uid"][:8]
    assert is_true(done, "Complete"), status
    assert (status["phase"], status["rank"], status["observedGeneration"]) == ("Succeeded", 12, 1)
    assert status["artifacts"]["adapterURI"] == f"s3://results/here/mix-{uid}/adapter"
    assert [j["metadata"]["name"] for j in bench.stage_jobs()] == [f"mix-{uid}-combine"]
    assert "weighted sum" in dict(bench.told("mix", "Combined", kind="AdapterCombination"))["Combined"]
    assert operator.metric("finetune_combinations_finished_total") == 1
    bench.api.delete(f"{combinations_of(bench.namespace)}/mix")
    bench.until_gone(jobs_of(bench.namespace))


def test_what_is_missing_is_waited_for_and_what_cannot_work_fails_at_once(bench: Bench) -> None:
    there = False

    def script(pod: Pod) -> list[Step]:
        nonlocal there
        if pod["metadata"]["name"].startswith("bad"):
            return fails(Reason.INVALID_CONFIG, "adapters[1] was trained on another base")
        if there:
            return succeed_stage(pod)
        there = True
        return fails(Reason.SECRET_MISSING, "Secret s3 (for output) does not exist or is empty")

    bench.start_operator()
    with bench.script(script):
        bench.combine(combination("late"))
        bench.combine(combination("bad"))
        waiting = bench.until_combined("late", lambda raw: is_true(raw, "Waiting"), "Waiting")
        assert condition(waiting, "Waiting")["reason"] == "SecretMissing"
        bad = bench.until_combined("bad", finished, "Finished")
        assert condition(bad, "Failed")["reason"] == "InvalidConfig"
        assert "adapters[1] was trained on another base" in bad["status"]["message"]
        done = bench.until_combined("late", finished, "Finished")
    assert is_true(done, "Complete"), "the Job's next pod found it"
    assert not is_true(done, "Waiting")


def test_an_operator_that_starts_anew_goes_on_where_it_was(bench: Bench) -> None:
    first = bench.start_operator()
    bench.combine(combination("mix"))
    bench.until_combined("mix", lambda raw: (raw.get("status") or {}).get("phase") == "Pending", "Pending")
    first.kill()
    with bench.script():
        bench.start_operator()
        done = bench.until_combined("mix", finished, "Finished")
    assert is_true(done, "Complete")
    assert len(bench.stage_jobs()) == 1


def test_a_cluster_without_the_crd_is_served_and_with_it_later(bench: Bench) -> None:
    server = ApiServer(bench.cluster.kubeconfig, bench.cluster.kubectl)
    server.kubectl("delete", "crd", CRD, "--wait=true").check_returncode()
    try:
        operator = bench.start_operator(FINETUNE_RESYNC_SECONDS="2")
        operator.until_logged("AdapterCombinations are not served (404")
        with bench.script():
            bench.apply(finetunejob("story").build())
            assert is_true(bench.until_finished("story"), "Complete")
            server.install_crds()
            operator.until_logged("AdapterCombinations are served from now on")
            bench.combine(combination("mix"))
            assert is_true(bench.until_combined("mix", finished, "Finished"), "Complete")
    finally:
        server.install_crds()
