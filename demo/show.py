"""What the demo shows at the end."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def seconds_between(start: str, end: str) -> float:
    """Between two RFC 3339 times."""
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def stage_times(job: dict[str, Any]) -> str:
    """How long each stage took."""
    parts = [
        f"{s['stage']} {seconds_between(s['startedAt'], s['finishedAt']):.0f} s"
        for s in job["status"].get("stages", [])
        if s.get("startedAt") and s.get("finishedAt")
    ]
    return " · ".join(parts)


def status_text(job: dict[str, Any]) -> str:
    """The status, as a story."""
    status = job["status"]
    lines = [f"Phase:      {status['phase']}"]
    for title, key in (("Plan", "plan"), ("Data", "data"), ("Metrics", "metrics")):
        if key in status:
            lines.append(f"{title + ':':<11} {status[key]['summary']}")
    if "artifacts" in status:
        lines.append(f"Artifacts:  {status['artifacts']['uri']}")
    lines.append(f"Stages:     {stage_times(job)}")
    lines += [f"{c['type'] + ':':<11} {c['status']} ({c['reason']}) {c['message']}" for c in status["conditions"]]
    return "\n".join(lines)


def bucket_listing(client: S3Client, bucket: str, prefix: str) -> str:
    """Every file with its size."""
    found = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    return "\n".join(f"{o['Size']:>13,}  {o['Key'].removeprefix(prefix).lstrip('/')}" for o in found)


def read_json(client: S3Client, bucket: str, key: str) -> Any:
    """A JSON file of the bucket."""
    return json.loads(client.get_object(Bucket=bucket, Key=key)["Body"].read())


def answers_text(answers: list[dict[str, Any]]) -> str:
    """Base and tuned, one under the other."""
    blocks = []
    for answer in answers:
        blocks.append(
            f"  {answer['prompt']}\n    expected: {answer['reference']}\n    base:     {one_line(answer['base'])}\n"
            f"    tuned:    {one_line(answer['tuned'])}"
        )
    return "\n".join(blocks)


def one_line(text: str, limit: int = 160) -> str:
    """The text on one line, shortened."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
