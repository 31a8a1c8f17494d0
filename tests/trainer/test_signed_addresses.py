"""Signed addresses of data: fetched as they are, and their query, which is a key, is written and told nowhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.snapshot import Snapshot
from finetune_trainer.private import shareable_snapshot
from tests.support.hub_server import HubServer
from tests.support.prepare_bench import ROWS, Bench, lines
from tests.support.tls import localhost_certificate
from tests.support.trainer_run import snapshot_of

SECRET = "5f2e-signature"


@pytest.fixture
def server(bench: Bench, tmp_path: Path) -> Iterator[HubServer]:
    """A web server whose certificate the job's Secret knows."""
    ca, tls = localhost_certificate(tmp_path / "tls")
    for slot in ("train-0", "prompts-0"):
        (bench.pod.secrets / slot).mkdir(exist_ok=True)
        (bench.pod.secrets / slot / "AWS_CA_BUNDLE").write_text(ca.read_text())
    with HubServer(tls) as running:
        yield running


def signed(server: HubServer, name: str) -> dict[str, Any]:
    return {"uri": f"{server.endpoint}/{name}?X-Amz-Signature={SECRET}", "secretRef": {"name": "ca"}}


def test_what_prepare_stores_logs_and_says_holds_no_signature(
    bench: Bench, server: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="finetune_trainer")
    server.files |= {"/train.jsonl": lines(ROWS).encode(), "/empty.jsonl": b""}
    report = bench.run(data={"train": [signed(server, "train.jsonl")]})
    assert report.data.rows == len(ROWS)
    errors = [
        bench.fails(data={"train": [signed(server, "empty.jsonl")]}),
        bench.fails(data={"train": [signed(server, "none.jsonl")]}),
        bench.fails(data={"train": [signed(server, "[::1.jsonl")]}),
        bench.fails(evaluation={"generation": {"sources": [signed(server, "empty.jsonl")]}}, data={"train": [signed(server, "train.jsonl")]}),
    ]  # fmt: skip
    assert [error.reason for error in errors[:2]] == [Reason.TOO_FEW_ROWS, Reason.DATASET_NOT_FOUND]
    assert errors[3].reason is Reason.TOO_FEW_ROWS
    assert f"{server.endpoint}/empty.jsonl" in errors[0].message
    assert SECRET not in str([error.message for error in errors]) + caplog.text + report.model_dump_json()
    for key in bench.s3.keys(bench.bucket, "out/"):
        assert SECRET.encode() not in bench.s3.client.get_object(Bucket=bench.bucket, Key=key)["Body"].read(), key


def test_the_snapshot_is_shown_without_secrets_and_keeps_its_digest() -> None:
    uri = f"https://example.com/a.jsonl?X-Amz-Signature={SECRET}"
    snapshot = snapshot_of(
        {
            "model": {"uri": "hf://org/model"},
            "data": {"train": [{"uri": uri}], "heldOut": {"sources": [{"uri": uri}]}},
            "evaluation": {"generation": {"sources": [{"uri": uri}]}},
            "runtime": {"env": [{"name": "A_KEY", "value": SECRET}], "image": "trainer:1"},
            "output": {"uri": "s3://bucket/out", "endpointURL": f"https://me:{SECRET}@store.example.com"},
        }
    )
    shown = shareable_snapshot(snapshot)
    assert SECRET not in str(shown)
    known = Snapshot.model_validate(shown)
    assert known.spec.data.train[0].uri == "https://example.com/a.jsonl"
    assert known.spec.output.endpoint_url == "https://store.example.com"
    assert known.spec.runtime.env is not None
    assert [(v.name, v.value) for v in known.spec.runtime.env] == [("A_KEY", "…")]
    assert (known.spec.runtime.image, known.plan, known.job) == ("trainer:1", snapshot.plan, snapshot.job)
    assert snapshot.spec.data.train[0].uri == uri
    assert known.digest() != snapshot.digest()
