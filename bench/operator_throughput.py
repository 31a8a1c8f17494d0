"""How fast the operator turns FineTuneJobs into Jobs, against a bare loop that does the same two kinds of writes.

    python -m bench.operator_throughput [--json FILE] [--bursts 100,1000] [--repeat 1]

A light cluster (etcd, kube-apiserver, controller-manager with its Job controller) and the operator as a process of its own with
the chart's defaults: leader election, Events and the TLS progress endpoint on. For every burst all FineTuneJobs are POSTed by a
few concurrent clients; each job's clock runs from the answer to its POST until its prepare Job is seen on a watch. jobs/s is
the burst's size over the time from the first answer to the last Job. Afterwards every status must be right. The bare loop,
in the same run, on the same API server: 16 workers, each POST Job + server-side apply of a small status; its jobs/s is the
yardstick of the ratio.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import ssl
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from bench import figures
from finetune_cluster.light import LightCluster
from tests.operator.certificates import make_tls
from tests.operator.harness import Bench, OperatorProcess, Tls, decode
from tests.operator.manifests import finetunejob
from tests.support.apiserver import ApiServer

Raw = dict[str, Any]
WORKERS = 16
CREATORS = 16
LABEL = "finetune.dev/job-name"


class Client:
    """Plain JSON over one aiohttp session: what the bare loop and the load generator use."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.server = cluster["server"]
        context = ssl.create_default_context(cadata=decode(cluster["certificate-authority-data"]).decode())
        with tempfile.NamedTemporaryFile() as file:
            file.write(decode(user["client-certificate-data"]) + decode(user["client-key-data"]))
            file.flush()
            context.load_cert_chain(file.name)
        self.session = aiohttp.ClientSession(
            self.server, connector=aiohttp.TCPConnector(ssl=context, limit=64), read_bufsize=1 << 22
        )

    async def request(self, method: str, path: str, body: Raw | None = None, kind: str = "application/json") -> Raw:
        data = json.dumps(body) if body is not None else None
        async with self.session.request(method, path, data=data, headers={"Content-Type": kind}) as response:
            answer = await response.json()
            if response.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.get('message')}")
            assert isinstance(answer, dict)
            return answer

    async def watch_jobs(self, namespace: str, seen: dict[str, float], ready: asyncio.Event) -> None:
        """Note when each FineTuneJob's Job is first seen."""
        path = f"/apis/batch/v1/namespaces/{namespace}/jobs?watch=true&timeoutSeconds=600"
        async with self.session.get(path, timeout=aiohttp.ClientTimeout(total=None)) as response:
            response.raise_for_status()
            ready.set()
            async for line in response.content:
                now = time.perf_counter()
                event = json.loads(line)
                name = event["object"]["metadata"].get("labels", {}).get(LABEL)
                if name and event["type"] == "ADDED":
                    seen.setdefault(name, now)


async def burst(client: Client, namespace: str, size: int) -> dict[str, float]:
    """Create FineTuneJobs at once; seconds from create to Job."""
    seen: dict[str, float] = {}
    created: dict[str, float] = {}
    ready = asyncio.Event()
    watch = asyncio.create_task(client.watch_jobs(namespace, seen, ready))
    await ready.wait()
    names = iter([f"burst-{size}-{i}" for i in range(size)])
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"

    async def create() -> None:
        for name in names:
            await client.request("POST", path, finetunejob(name, namespace).build())
            created[name] = time.perf_counter()

    begin = time.perf_counter()
    await asyncio.gather(*(create() for _ in range(CREATORS)))
    submitted = time.perf_counter()
    while len(seen) < size:
        if time.perf_counter() - begin > 300:
            raise RuntimeError(f"only {len(seen)} of {size} Jobs after 300 s")
        await asyncio.sleep(0.02)
    last = max(seen.values())
    watch.cancel()
    waits = sorted(max(0.0, seen[n] - created[n]) for n in created)
    statuses = time.perf_counter()
    while True:
        items = (await client.request("GET", path))["items"]
        right = [j for j in items if is_right(j)]
        if len(right) == size:
            break
        if time.perf_counter() - statuses > 120:
            raise RuntimeError(f"only {len(right)} of {size} statuses are right")
        await asyncio.sleep(0.1)
    owners = [
        j["metadata"]["ownerReferences"][0]["uid"]
        for j in (await client.request("GET", f"/apis/batch/v1/namespaces/{namespace}/jobs"))["items"]
    ]
    if sorted(owners) != sorted(j["metadata"]["uid"] for j in items):
        raise RuntimeError(f"{len(owners)} Jobs of {len(set(owners))} FineTuneJobs; expected one for each of {size}")
    return {
        "p50_s": statistics.median(waits),
        "p99_s": waits[min(len(waits) - 1, int(len(waits) * 0.99))],
        "jobs_per_s": size / (last - begin),
        "submit_s": submitted - begin,
        "statuses_after_s": time.perf_counter() - last,
    }


def is_right(job: Raw) -> bool:
    """What the status of a job whose prepare Job was just created must say."""
    status = job.get("status") or {}
    return (
        status.get("phase") == "Preparing"
        and status.get("observedGeneration") == job["metadata"]["generation"]
        and bool(status.get("snapshot", {}).get("hash"))
        and [s["stage"] for s in status.get("stages", [])] == ["prepare"]
        and not any(c["type"] in ("Failed", "Finished") for c in status.get("conditions", []))
    )


async def bare_loop(client: Client, namespace: str, size: int) -> float:
    """Jobs/s of POST Job + status apply with 16 workers: what the API server gives at best."""
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
    owners = []
    for i in range(size):
        owners.append(await client.request("POST", path, finetunejob(f"bare-{i}", namespace).suspended().build()))
    work = iter(owners)
    template = bare_job(namespace)

    async def worker() -> None:
        for owner in work:
            name = owner["metadata"]["name"]
            body = {**template, "metadata": {"name": name, "namespace": namespace, "labels": {LABEL: name}}}
            await client.request("POST", f"/apis/batch/v1/namespaces/{namespace}/jobs", body)
            status = {
                "apiVersion": "finetune.dev/v1alpha1",
                "kind": "FineTuneJob",
                "metadata": {"name": name, "namespace": namespace},
                "status": {"phase": "Preparing", "observedGeneration": 1, "message": "started"},
            }
            query = "fieldManager=bare&force=true"
            await client.request("PATCH", f"{path}/{name}/status?{query}", status, "application/apply-patch+yaml")

    begin = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(WORKERS)))
    return size / (time.perf_counter() - begin)


def bare_job(namespace: str) -> Raw:
    """The very Job that the operator posts, built from a FineTuneJob of the bench."""
    from finetune_api.names import Stage
    from finetune_api.snapshot import Images, JobIdentity, make_snapshot
    from finetune_api.spec import FineTuneJobSpec
    from finetune_operator.manifests import Owner, stage_job
    from finetune_operator.planning.model import SnapshotRecord
    from finetune_operator.settings import Settings

    spec = FineTuneJobSpec.model_validate(finetunejob("bare", namespace).build()["spec"])
    identity = JobIdentity(name="bare", namespace=namespace, uid="0" * 36, generation=1)
    snapshot = make_snapshot(spec, identity, Images(prepare="p", train="t"), "0")
    job = stage_job(Owner(namespace, "bare", "0" * 36), SnapshotRecord(snapshot, "0" * 64), Stage.PREPARE, Settings())
    return {k: v for k, v in job.items() if k != "metadata"}


def cpu_seconds(operator: OperatorProcess) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{operator.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(operator: OperatorProcess) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{operator.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def measure(bench: Bench, bursts: list[int]) -> Raw:
    """One run: the bare loop, then every burst in a namespace of its own, then the bare loop again."""
    client = Client(bench.cluster.kubeconfig)
    result: Raw = {"bursts": {}}
    try:
        await client.request("POST", "/api/v1/namespaces", {"metadata": {"name": "bare"}})
        bare = [await bare_loop(client, "bare", 300)]
        await drain(client, "bare")
        operator = bench.start_operator(
            FINETUNE_NAMESPACES="", FINETUNE_LEADER_ELECTION="true", FINETUNE_LEASE_NAMESPACE="default"
        )
        await leading(operator)
        for size in bursts:
            namespace = f"burst-{size}"
            await client.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
            before = cpu_seconds(operator)
            figures = await burst(client, namespace, size)
            figures["cpu_ms_per_job"] = 1000 * (cpu_seconds(operator) - before) / size
            figures["rss_mb"] = resident_mb(operator)
            result["bursts"][str(size)] = figures
            await drain(client, namespace)
        operator.kill()
        await client.request("POST", "/api/v1/namespaces", {"metadata": {"name": "bare2"}})
        bare.append(await bare_loop(client, "bare2", 300))
        result["bare_jobs_per_s"] = statistics.mean(bare)
        result["bare_runs"] = bare
        for figures in result["bursts"].values():
            figures["ratio"] = figures["jobs_per_s"] / result["bare_jobs_per_s"]
        return result
    finally:
        await client.session.close()


async def leading(operator: OperatorProcess) -> None:
    """Wait until the operator holds the Lease."""
    end = time.monotonic() + 30
    while "leader" not in operator.get("/readyz").text:
        if time.monotonic() > end:
            raise RuntimeError("the operator did not become the leader")
        await asyncio.sleep(0.1)


async def drain(client: Client, namespace: str) -> None:
    """Delete everything and wait until it is gone, so that one measurement does not pay for another."""
    group = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
    await client.request("DELETE", group)
    await client.request("DELETE", f"/apis/batch/v1/namespaces/{namespace}/jobs?propagationPolicy=Background")
    end = time.monotonic() + 240
    for path in (group, f"/apis/batch/v1/namespaces/{namespace}/jobs", f"/api/v1/namespaces/{namespace}/pods"):
        while (await client.request("GET", f"{path}?limit=1"))["items"]:
            if time.monotonic() > end:
                raise RuntimeError(f"{path} was not emptied")
            await asyncio.sleep(0.25)


def main() -> None:
    """Measure, print, write."""
    parser = figures.parser_of(__doc__)
    parser.add_argument("--bursts", default="100,1000")
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    sizes = [int(s) for s in arguments.bursts.split(",")]
    runs = []
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory() as folder:
            tls: Tls = make_tls(Path(folder) / "tls")
            with LightCluster(Path(folder) / "cluster", name="bench") as cluster:
                ApiServer(cluster.kubeconfig, cluster.kubectl).install_crds()
                bench = Bench(cluster, Path(folder), tls)
                try:
                    runs.append(asyncio.run(measure(bench, sizes)))
                finally:
                    bench.close()
    print(
        f"{'burst':>6} {'p50 s':>7} {'p99 s':>7} {'jobs/s':>7} {'ratio':>6} {'statuses +s':>12} {'CPU ms/job':>11} {'RSS MB':>7}"
    )
    for run in runs:
        for size, f in run["bursts"].items():
            print(
                f"{size:>6} {f['p50_s']:>7.2f} {f['p99_s']:>7.2f} {f['jobs_per_s']:>7.1f} {f['ratio']:>6.2f} "
                f"{f['statuses_after_s']:>12.2f} {f['cpu_ms_per_job']:>11.1f} {f['rss_mb']:>7.0f}"
            )
        print(f"  bare loop: {run['bare_jobs_per_s']:.1f} jobs/s ({', '.join(f'{b:.1f}' for b in run['bare_runs'])})")
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
    figures.write(arguments.json, {"machine": machine, "runs": runs})


if __name__ == "__main__":
    main()
