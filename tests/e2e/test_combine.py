"""An AdapterCombination on the real cluster: two adapters from a bucket, one back in it, without a GPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from demo import store
from demo.target import ROOT
from tests.e2e.stack import BUCKET, Space, is_true
from tests.support.adapters import make_adapter
from tests.support.tiny_model import build_tiny_model, write_tokenizer

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def test_the_example_combines_two_adapters_of_a_bucket(space: Space, tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    secret = {"secretRef": {"name": store.SECRET}}
    adapters = []
    for number, weight in ((1, 0.7), (2, 0.3)):
        folder = make_adapter(base, tmp_path / str(number), number)
        write_tokenizer(folder)
        prefix = f"adapters/{space.name}/{number}"
        store.upload_folder(space.bucket, folder, BUCKET, prefix)
        adapters.append({"uri": f"s3://{BUCKET}/{prefix}", "weight": weight, **secret})
    manifest = yaml.safe_load((ROOT / "examples" / "combine.yaml").read_text())
    manifest["spec"] |= {"adapters": adapters, "output": {"uri": f"s3://{BUCKET}/combined", **secret}}
    space.target.kubectl("apply", "-n", space.name, "-f", "-", stdin=yaml.safe_dump(manifest))
    space.target.kubectl("wait", "-n", space.name, "ftac/support", "--for=condition=Finished", "--timeout=600s")

    combined = space.target.get("ftac", "support", "-n", space.name)
    status = combined["status"]
    assert is_true(combined, "Complete"), json.dumps(status, indent=1)
    assert (status["phase"], status["rank"], status["modules"], status["baseModel"]) == ("Succeeded", 16, 4, "org/tiny")
    assert status["relativeError"] < 1e-6, "rank 16 holds all of 4 + 4"
    key = f"{status['artifacts']['adapterURI'].removeprefix(f's3://{BUCKET}/')}/adapter_model.safetensors"
    body = space.bucket.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    assert hashlib.sha256(body).hexdigest() == status["artifacts"]["adapterSHA256"]
    assert not space.gpu_pods.so_far()
    space.until_told("support", "Combined")
