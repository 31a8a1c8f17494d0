"""What a run leaves in its namespace, so that two runs can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_cluster.light import LightCluster
from tests.operator.harness import Bench, Tls, finetunejobs_of
from tests.operator.manifests import Raw


@contextmanager
def bench_in(cluster: LightCluster, tls: Tls, folder: Path, namespace: str) -> Iterator[Bench]:
    with cluster.admin() as api:
        api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        api.wait(f"/api/v1/namespaces/{namespace}/serviceaccounts", "default", lambda _: True, 60, "default account")
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(cluster, folder, tls, namespace)
    try:
        yield bench
    finally:
        bench.close()


def remains(bench: Bench, name: str, collection: str = "") -> dict[str, Any]:
    """What a run leaves, without names, UIDs and times; of a FineTuneJob unless another collection is named."""
    job = bench.api.get(f"{collection or finetunejobs_of(bench.namespace)}/{name}")
    uid = job["metadata"]["uid"]
    status = job["status"]

    def plain(value: Any) -> Any:
        text = str(value)
        return text.replace(uid, "UID").replace(uid[:8], "UID8").replace(bench.namespace, "NS")

    jobs = {
        plain(j["metadata"]["name"]): plain(spec_of(j))
        for j in bench.stage_jobs()
        if not j["metadata"].get("deletionTimestamp")
    }
    maps = bench.api.get(f"/api/v1/namespaces/{bench.namespace}/configmaps")["items"]
    mine = [m for m in maps if m["metadata"]["name"] != "kube-root-ca.crt"]
    return {
        "phase": status["phase"],
        # On a busy machine a pod may take so long to come that this is told; what counts is that nothing is missing at the end.
        "conditions": [(c["type"], c["status"], c["reason"]) for c in status["conditions"] if counts(c)],
        "attempts": [(a["stage"], a["outcome"]) for a in status.get("attempts", [])],
        "plan": status.get("plan"),
        "data": status.get("data"),
        "metrics": status.get("metrics"),
        "artifacts": plain(status.get("artifacts")),
        "snapshot": [(plain(m["metadata"]["name"]), sorted(m["data"]), m["immutable"]) for m in mine],
        "jobs": jobs,
    }


def counts(condition: Raw) -> bool:
    """False for a wait that is over."""
    return bool(condition["type"] != "Waiting" or condition["status"] == "True")


def spec_of(job: Raw) -> Raw:
    template = job["spec"]["template"]
    labels = {k: v for k, v in template["metadata"]["labels"].items() if k.startswith("finetune.dev")}
    return {"labels": labels, "pod": template["spec"], "limit": job["spec"]["backoffLimit"]}
