"""The base model's room on the training pod's disk."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.prepare.disk import disk_warnings
from tests.support.prepare_bench import ROWS, Bench
from tests.support.prepared import deep_merge, job_spec, snapshot_of

GIB = 1 << 30
NONE = "the base model takes 131.4 GiB of the training pod's disk, which asks for none: set compute.ephemeralStorage, "


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({}, 14 * GIB, None),
        ({}, int(131.4 * GIB), NONE),
        ({"compute": {"ephemeralStorage": "300Gi"}}, int(131.4 * GIB), None),
        ({"compute": {"ephemeralStorage": "10Gi"}}, 14 * GIB, "which asks for 10Gi: raise compute.ephemeralStorage, "),
        ({"model": {"cache": {"claimName": "models"}}}, int(131.4 * GIB), None),
        ({"model": {"uri": "pvc://models/llama", "secretRef": None, "endpointURL": None}}, int(131.4 * GIB), None),
    ],
    ids=["small", "none asked", "enough", "too little", "cache", "volume"],
)
def test_a_large_base_asks_for_disk(changes: dict[str, Any], size: int, said: str | None) -> None:
    found = disk_warnings(snapshot_of(deep_merge(job_spec(None, "bucket"), changes), "u" * 32).spec, size)
    if said is None:
        assert found == []
    else:
        [warning] = found
        assert said in warning


def test_prepare_counts_the_models_files(bench: Bench) -> None:
    bench.put(ROWS)
    size = sum(o["Size"] for o in bench.s3.client.list_objects_v2(Bucket=bench.bucket, Prefix="model/")["Contents"])
    enough, less = ({"ephemeralStorage": str(size - n)} for n in (0, 1))
    told = "of the training pod's disk"
    assert not any(told in warning for warning in bench.run(compute=enough).warnings)
    assert any(told in warning for warning in bench.run(compute=less).warnings)
