"""The cleanup stage against a real S3 server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_api.names import ENV_SNAPSHOT, Stage
from finetune_api.snapshot import Images, JobIdentity, make_snapshot
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.cleanup.run import run
from finetune_trainer.context import StageContext, load_context

UID = "3f9c2a11-0000-4000-8000-000000000000"


def context(s3: Any, tmp_path: Path, bucket: str, workspace: str | None = None) -> StageContext:
    output: dict[str, Any] = {
        "uri": f"s3://{bucket}/out",
        "endpointURL": s3.endpoint,
        "secretRef": {"name": "s3"},
        "deletionPolicy": "Delete",
    }
    if workspace:
        output["workspace"] = {"uri": workspace}
    spec = FineTuneJobSpec.model_validate(
        {"model": {"uri": "hf://a/b"}, "data": {"train": [{"uri": "s3://data/x.jsonl"}]}, "output": output}
    )
    identity = JobIdentity(name="story", namespace="ns", uid=UID, generation=1)
    snapshot = make_snapshot(spec, identity, Images(prepare="p", train="t"), "1")
    folder = tmp_path / "secrets" / "output"
    folder.mkdir(parents=True)
    (folder / "AWS_ACCESS_KEY_ID").write_text(s3.access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(s3.secret_key)
    return load_context(
        Stage.CLEANUP,
        snapshot_dir=tmp_path / "no-config-map",
        secrets_dir=tmp_path / "secrets",
        work_dir=tmp_path / "work",
        environ={ENV_SNAPSHOT: snapshot.canonical_json()},
    )


def test_everything_of_the_job_goes_and_nothing_else(s3: Any, tmp_path: Path) -> None:
    bucket, scratch = s3.new_bucket(), s3.new_bucket()
    mine = ["out/story-3f9c2a11/manifest.json", "out/story-3f9c2a11/adapter/a.bin"]
    others = ["out/story-3f9c2a11b/manifest.json", "out/other-3f9c2a11/x", "top"]
    for key in (*mine, *others):
        s3.put(bucket, key, b"x")
    s3.put(scratch, "w/story-3f9c2a11/workspace/train/result.json", b"x")
    s3.put(scratch, "w/other/workspace/x", b"x")
    assert run(context(s3, tmp_path, bucket, f"s3://{scratch}/w")).objects == 3
    assert sorted(s3.keys(bucket)) == sorted(others)
    assert s3.keys(scratch) == ["w/other/workspace/x"]


def test_uploads_that_were_never_completed_go_too(s3: Any, tmp_path: Path) -> None:
    bucket = s3.new_bucket()
    mine = ["out/story-3f9c2a11/merged/x", "out/story-3f9c2a11/workspace/checkpoints/1/x"]
    for key in (*mine, "out/other-3f9c2a11/x"):
        s3.client.create_multipart_upload(Bucket=bucket, Key=key)
    run(context(s3, tmp_path, bucket))
    left = s3.client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [u["Key"] for u in left] == ["out/other-3f9c2a11/x"]


def test_what_is_gone_already_is_no_failure(s3: Any, tmp_path: Path) -> None:
    assert run(context(s3, tmp_path, "no-such-bucket")).objects == 0
