"""The upload of the merged model through an outage."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from finetune_api.names import Stage
from finetune_api.results import MERGED_DIR
from finetune_trainer import parallel, s3_transfer, waiting
from finetune_trainer.publish.merged import upload_merged
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.trainer_run import Pod
from tests.trainer.conftest import S3

MIB = 1 << 20
FILES = {
    "README.md": b"card",
    "model-1.safetensors": random.Random(1).randbytes(6 * MIB),
    "model-2.safetensors": random.Random(2).randbytes(6 * MIB),
}


def test_files_that_are_complete_are_not_sent_again_after_an_outage(
    s3: S3, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_transfer, "PART_BYTES", 5 * MIB)  # the least that S3 takes
    monkeypatch.setattr(parallel, "WORKERS", 1)
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)  # before its second try
    folder = tmp_path / MERGED_DIR
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    bucket, pod = s3.new_bucket(), Pod(tmp_path / "pod")
    s3.write_secret(pod.secrets / "output", endpoint=s3_proxy.endpoint)
    spec = {
        "model": {"uri": "hf://o/m"},
        "data": {"train": [{"uri": "s3://bucket/x"}]},
        "output": {"uri": f"s3://{bucket}/out", "secretRef": {"name": "s3"}},
    }
    ctx = pod.context(spec, Stage.PUBLISH)
    output = ctx.output_store()
    output.put_bytes(f"{MERGED_DIR}/left-behind", b"by an earlier execution")
    s3_proxy.faults.bytes_taken = 0
    s3_proxy.faults.script = [Fault("PUT .*model-2.*partNumber=2", times=-1, status=503, code="SlowDown")]
    outage: list[float] = []

    def pause(seconds: float) -> None:
        outage.append(seconds)
        if len(outage) == 2:
            s3_proxy.faults.script.clear()

    monkeypatch.setattr(waiting, "pause", pause)
    found = upload_merged(ctx, folder, output)
    assert len(outage) == 2
    assert [(f.path, f.size) for f in found] == [(f"{MERGED_DIR}/{name}", len(data)) for name, data in FILES.items()]
    assert sorted(i.key for i in output.list(MERGED_DIR)) == [f.path for f in found]
    for record in found:
        assert output.get_bytes(record.path) == FILES[record.path.removeprefix(f"{MERGED_DIR}/")]
    tries = 2 * len(outage)  # botocore has two each
    refused = tries * MIB
    assert s3_proxy.faults.bytes_taken < sum(map(len, FILES.values())) + refused + 10_000
