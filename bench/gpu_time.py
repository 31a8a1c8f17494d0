"""What share of the time for which a GPU is held is training: a FineTuneJob against the usual way, one pod that does everything.

    python -m bench.gpu_time [--steps 250] [--pairs 1] [--download-seconds 128] [--json FILE]

Both on the real local cluster (whose node pretends to have GPUs), both SmolLM2-135M-Instruct, LoRA on all linear layers, the same rows,
steps and batches, trained on the CPU, merged and uploaded. The pod runs trl (bench/one_pod.py) in the same image. Held is from bound to
terminated, training is from the first optimizer step to the last; for a FineTuneJob status.gpuTime says both. The Hub that both
download from is a server on this machine, slowed so that the model takes as long as an 8B in 16 bit (16 GB) does with 1 Gbit/s.
The FineTuneJob has a model cache, which its prepare stage fills.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench import figures
from demo import images, store
from demo.install import dataset_folder, model_folder
from demo.show import seconds_between
from finetune_cluster.instance import require
from finetune_trainer.train.device import cpu_dtype
from tests.e2e.stack import BUCKET, GPU, Space, claim_on, finished, is_true, new_space, whole_stack
from tests.support.hub_server import HubServer

MODEL = "acme/SmolLM2-135M-Instruct"
BATCH = 8
HELD_OUT_ROWS = 48
LIMIT_SECONDS = 3600.0


def fine_tune_job(space: Space, name: str, hub: str, claim: str, data: dict[str, str], steps: int) -> dict[str, Any]:
    """Run it, and what its status tells."""
    secret = {"name": store.SECRET}

    def source(key: str) -> list[dict[str, Any]]:
        return [{"uri": f"s3://{BUCKET}/{data[key]}", "secretRef": secret}]

    spec = {
        "model": {"uri": f"hf://{MODEL}", "endpointURL": hub, "cache": {"claimName": claim}},
        "data": {"train": source("train"), "heldOut": {"sources": source("held_out")}},
        "method": {"type": "LoRA", "lora": {"rank": 16, "dropout": 0.0}},
        "training": {
            "length": {"steps": steps},
            "globalBatchSequences": BATCH,
            "microBatchSequences": BATCH,
            "maxSequenceTokens": 512,
            "gradientCheckpointing": False,
            "useCpu": True,
        },
        "compute": {"gpusPerNode": 1},
        "output": {"uri": f"s3://{BUCKET}/results", "secretRef": secret, "merged": {"enabled": True}},
    }
    space.apply(name, spec)
    job = space.until(name, finished, LIMIT_SECONDS, "finished")
    status = job["status"]
    assert is_true(job, "Complete"), json.dumps(status, indent=1)
    used = status["gpuTime"]
    stages = {a["stage"]: seconds_between(a["startedAt"], a["finishedAt"]) for a in status["attempts"]}
    return {
        "held_seconds": used["heldSeconds"],
        "training_seconds": used["trainingSeconds"],
        "ratio": used["trainingSeconds"] / used["heldSeconds"],
        "held_out_loss": status["metrics"]["heldOutLoss"],
        "stage_seconds": stages,
    }


def one_pod(space: Space, name: str, hub: str, image: str, data: dict[str, str], steps: int) -> dict[str, Any]:
    """Run it, and what the API server and its log tell."""
    asked = {
        "model": MODEL, "bucket": BUCKET, **data, "steps": steps, "batch": BATCH,
        "dtype": str(cpu_dtype()).removeprefix("torch."),
    }  # fmt: skip
    script = (Path(__file__).parent / "one_pod.py").read_text()
    environ = {"JOB": json.dumps(asked), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
    environ |= {"HOME": "/work", "TMPDIR": "/work", "HF_HOME": "/work/hf", "PYTHONDONTWRITEBYTECODE": "1"}
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
        "runAsNonRoot": True,
    }
    container = {
        "name": "train",
        "image": image,
        "command": ["python", "/script/one_pod.py"],
        "env": [{"name": k, "value": v} for k, v in environ.items()],
        "envFrom": [{"secretRef": {"name": store.SECRET}}],
        "resources": {"limits": {GPU: "1"}},
        "volumeMounts": [{"name": "script", "mountPath": "/script"}, {"name": "work", "mountPath": "/work"}],
        "securityContext": security,
    }
    space.target.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": space.name},
            "data": {"one_pod.py": script},
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": space.name},
            "spec": {
                "restartPolicy": "Never",
                "containers": [container],
                "volumes": [{"name": "script", "configMap": {"name": name}}, {"name": "work", "emptyDir": {}}],
            },
        },
    )
    wait = ["--for=jsonpath={.status.containerStatuses[0].state.terminated}", f"--timeout={LIMIT_SECONDS:.0f}s"]
    space.target.kubectl("wait", f"pod/{name}", "-n", space.name, *wait)
    pod = space.target.get("pod", name, "-n", space.name)["status"]
    log = space.target.kubectl("logs", name, "-n", space.name)
    ended = pod["containerStatuses"][0]["state"]["terminated"]
    assert ended["exitCode"] == 0, log
    found = re.search(r"^ONE_POD (.*)$", log, re.MULTILINE)
    assert found, log
    told = json.loads(found[1])
    bound = next(c["lastTransitionTime"] for c in pod["conditions"] if c["type"] == "PodScheduled")
    held = seconds_between(bound, ended["finishedAt"])
    space.target.kubectl("delete", "pod", name, "-n", space.name)
    return {
        "held_seconds": held,
        "training_seconds": told["seconds"]["training"],
        "ratio": told["seconds"]["training"] / held,
        "ratio_without_download": told["seconds"]["training"] / (held - told["seconds"]["download"]),
        "held_out_loss": told["held_out_loss"],
        "part_seconds": {k: round(v, 1) for k, v in told["seconds"].items()},
    }


def main() -> None:
    """Measure in alternating pairs, and print."""
    parser = figures.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps of both")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--download-seconds", type=float, default=128, help="how long the model takes to download")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"steps": arguments.steps, "download_seconds": arguments.download_seconds, "pairs": []}
    with (
        tempfile.TemporaryDirectory() as scratch,
        whole_stack(Path(scratch)) as stack,
        new_space(stack.target, stack.bucket) as space,
    ):
        assert stack.target.cluster_name is not None, "needs the local cluster: its pods reach a server on this machine"
        model = model_folder()
        data = {}
        for split, most in (("train", None), ("held_out", HELD_OUT_ROWS)):
            lines = (dataset_folder() / f"{split}.jsonl").read_text().splitlines(keepends=True)[:most]
            data[split] = space.put("".join(lines)).removeprefix(f"s3://{BUCKET}/")
        image = images.ensure(stack.target).trainer
        with HubServer(host=require(stack.target.cluster_name).gateway) as hub:
            hub.add_model(MODEL, model)
            size = sum(path.stat().st_size for path in model.iterdir())
            hub.faults.bytes_per_second = size / arguments.download_seconds
            for number in range(arguments.pairs):
                cache = Path(scratch) / f"cache-{number}"
                cache.mkdir()
                cache.chmod(0o777)
                Path(scratch).chmod(0o755)
                volume = claim_on(space, f"models-{number}", cache, "ReadWriteMany")
                pair = {
                    "one_pod": one_pod(space, f"one-pod-{number}", hub.endpoint, image, data, arguments.steps),
                    "fine_tune_job": fine_tune_job(
                        space, f"job-{number}", hub.endpoint, f"models-{number}", data, arguments.steps
                    ),
                }
                space.target.kubectl("delete", "pv", volume, "--wait=false")
                found["pairs"].append(pair)
                print(json.dumps(pair, indent=1), flush=True)
    for way in ("one_pod", "fine_tune_job"):
        ratios = [pair[way]["ratio"] for pair in found["pairs"]]
        print(
            f"{way}: {statistics.median(ratios):.3f} of the held time is training ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    figures.write(arguments.json, found)


if __name__ == "__main__":
    main()
