"""From apply to Succeeded, on a real API server with real Job controllers and scripted pods."""

from __future__ import annotations

import pytest

from tests.operator.harness import Bench, condition, is_true, jobs_of
from tests.operator.manifests import finetunejob

pytestmark = pytest.mark.light


def test_a_job_goes_from_apply_to_succeeded_and_tells_its_story(bench: Bench) -> None:
    bench.start_operator()
    with bench.script() as kubelet:
        bench.apply(finetunejob("story").build())
        done = bench.until_finished("story")
        assert kubelet.errors == []
    status = done["status"]
    assert status["phase"] == "Succeeded"
    assert is_true(done, "Complete")
    assert not is_true(done, "Failed")
    assert is_true(done, "Prepared")
    assert is_true(done, "Trained")
    assert condition(done, "Complete")["observedGeneration"] == 1
    assert status["modelName"] == "smol"
    assert status["plan"]["summary"] == (
        "LoRA rank 16, alpha 32 on 1 × nvidia.com/gpu: micro-batch 4 × accumulation 4, learning rate 0.0002, 640 steps; "
        "41,943,040 trainable parameters (0.52 %)."
    )
    assert status["data"]["summary"] == (
        "5,120 rows, Messages format; 4,608 train / 512 held out; 12 exact duplicates; p95 611 tokens; 3 rows truncated at 2048."
    )
    assert status["metrics"]["summary"] == "held-out loss 1.402 → 0.861 (perplexity 4.06 → 2.37); 1,052 tokens/s"
    uid = done["metadata"]["uid"][:8]
    assert status["artifacts"]["manifestURI"] == f"s3://results/here/story-{uid}/manifest.json"
    assert [s["stage"] for s in status["stages"]] == ["prepare", "train", "publish"]
    assert [a["outcome"] for a in status["attempts"]] == ["Succeeded"] * 3
    jobs = {j["metadata"]["name"]: j for j in bench.api.get(jobs_of(bench.namespace))["items"]}
    assert set(jobs) == {f"story-{uid}-{s}" for s in ("prepare", "train", "publish")}
    gpus = {n.rsplit("-", 1)[1]: j["spec"]["template"]["spec"]["containers"][0]["resources"] for n, j in jobs.items()}
    assert gpus["train"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in str(gpus["prepare"]) + str(gpus["publish"])


def test_where_a_plan_is_enough_it_ends_with_it_and_asks_for_no_gpu(bench: Bench) -> None:
    bench.start_operator()
    with bench.script() as kubelet:
        bench.apply(finetunejob("plan").set(planOnly=True).build())
        done = bench.until_finished("plan")
        assert kubelet.errors == []
    assert (done["status"]["phase"], condition(done, "Complete")["reason"]) == ("Succeeded", "Planned")
    assert is_true(done, "Complete")
    assert not is_true(done, "Trained")
    assert done["status"]["plan"]["totalSteps"] == 640
    assert [j["metadata"]["labels"]["finetune.dev/stage"] for j in bench.stage_jobs()] == ["prepare"]
    assert dict(bench.told("plan", "Prepared", "Planned"))["Planned"].startswith("Nothing was trained")
