"""What is saved where the base is shared out: the adapter, which every rank has whole, by the first rank alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from finetune_api.results import ADAPTER_DIR
from finetune_trainer.lora_files import WEIGHTS
from finetune_trainer.weight_files import SINGLE
from tests.support.fault_proxy import FaultProxy
from tests.support.prepared import prepare_job
from tests.support.train_container import ENV_OBSERVED
from tests.support.train_process import kill_all, pod_of
from tests.trainer.test_train_sharded import weights

pytestmark = pytest.mark.timeout(600)
STEPS = 4


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    kill_all()


def test_the_base_comes_once_nothing_of_it_is_gathered_to_save_and_one_rank_writes(
    s3: Any, s3_proxy: FaultProxy, tiny_model: Path, tmp_path: Path
) -> None:
    spec = {
        "method": {"lora": {"rank": 16}},
        "training": {"length": {"steps": STEPS}, "globalBatchSequences": 4, "parallelism": "FSDP"},
        "recovery": {"checkpoint": {"interval": {"steps": STEPS}}},
        "compute": {"gpusPerNode": 2},
    }
    job = prepare_job(s3, tmp_path, tiny_model, **spec)
    for slot in ("model", "output"):
        s3.write_secret(tmp_path / "secrets" / slot, endpoint=s3_proxy.endpoint)
    pod = pod_of(job, **{ENV_OBSERVED: "yes"})
    assert pod.start().wait() == 0, pod.log
    assert moved(s3_proxy, f"/{job.bucket}/base/{SINGLE}") == ["GET"], "once for all ranks of a pod"
    assert moved(s3_proxy, f"/{ADAPTER_DIR}/{WEIGHTS}") == ["PUT", "GET"], "once, and once to verify it"
    first, second = (json.loads((tmp_path / f"observed-{rank}.json").read_text()) for rank in range(2))

    assert first["saved"] == second["saved"] > STEPS, "after each step, and the adapter"
    assert first["sent"], "flags and random states"
    for rank in (first, second):
        assert sum(rank["sent"]) < len(weights(job)), "no weights, neither the base's nor the adapter's"

    assert second["written"] == []
    adapters = [line for line in first["written"] if line.endswith("/adapter/adapter_model.safetensors")]
    assert [line.split()[0] for line in adapters] == ["PutObject"], "once"
    assert any("/checkpoints/" in line for line in first["written"])


def moved(proxy: FaultProxy, key: str) -> list[str]:
    """How an object went over the network, in order: the requests for keys that end so."""
    return [
        method
        for method, path in proxy.faults.requests
        if method in ("GET", "PUT", "POST") and urlsplit(path).path.endswith(key)
    ]
