"""A bucket with model and data, and the smallest spec that trains them: what tests of the prepare stage start from."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

import finetune_trainer.prepare.run as stage
from finetune_api.results import PrepareReport
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from tests.support.trainer_run import Pod, merged

if TYPE_CHECKING:
    from tests.trainer.conftest import S3

WORKSPACE = "out/job-0a1b2c3d/workspace/"
REF = {"secretRef": {"name": "s3"}}


def row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lines(rows: list[Any]) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


ROWS = [row(f"What is {i} plus {i}?", f"It is {2 * i}.") for i in range(40)]


class Bench:
    """A pod, a bucket with model and data, and the smallest spec that trains them."""

    def __init__(self, root: Path, s3: S3, model: Path) -> None:
        self.s3 = s3
        self.bucket = s3.new_bucket()
        self.pod = Pod(root)
        s3.put_dir(self.bucket, "model", model)
        for slot in ("model", "output", "train-0", "held-out-0"):
            s3.write_secret(self.pod.secrets / slot)
        self.spec: dict[str, Any] = {
            "model": {"uri": f"s3://{self.bucket}/model", **REF},
            "data": {"train": [{"uri": f"s3://{self.bucket}/train.jsonl", **REF}]},
            "output": {"uri": f"s3://{self.bucket}/out", **REF},
        }

    def put(self, rows: list[Any], name: str = "train.jsonl") -> None:
        self.s3.put(self.bucket, name, lines(rows))

    def context(self, changes: dict[str, Any]) -> StageContext:
        """A new pod: what the last one downloaded is gone."""
        shutil.rmtree(self.pod.work, ignore_errors=True)
        return self.pod.context(merged(self.spec, changes))

    def run(self, **changes: Any) -> PrepareReport:
        return stage.run(self.context(changes))

    def fails(self, **changes: Any) -> StageError:
        with pytest.raises(StageError) as info:
            self.run(**changes)
        return info.value

    def object(self, name: str) -> bytes:
        return self.s3.client.get_object(Bucket=self.bucket, Key=WORKSPACE + name)["Body"].read()

    def table(self, side: str) -> Any:
        return pq.read_table(io.BytesIO(self.object(f"prepare/{side}.parquet")))
