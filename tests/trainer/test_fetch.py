"""When the base model comes into the cache: before the training Job joins its queue, or while it waits there."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_api.names import Stage
from finetune_trainer.context import StageContext
from finetune_trainer.fetch import run as stage
from finetune_trainer.sources import cache as module
from finetune_trainer.sources.ahead import fetch_or_leave
from finetune_trainer.sources.cache import ModelCache, key_of
from finetune_trainer.sources.model import resolve_model
from finetune_trainer.train import inputs
from tests.support.prepare_bench import ROWS, Bench
from tests.support.prepared import PreparedJob, prepare_job

CACHE = {"claimName": "models"}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The volume; locks of entries in it end with the test."""
    root = tmp_path / "cache"
    root.mkdir()
    yield root
    for folder in list(module._HELD):
        ModelCache(root)._release(folder)


@pytest.fixture
def plain(s3: Any, tiny_model: Path, tmp_path: Path) -> PreparedJob:
    return prepare_job(s3, tmp_path / "job", tiny_model)


def context(job: PreparedJob, root: Path, stage: Stage) -> StageContext:
    return replace(job.context(stage), cache_dir=root)


def fetched(ctx: StageContext) -> int:
    """The most that it told to have moved."""
    posts = ctx.reporter.posts  # type: ignore[attr-defined]
    return max((post["download"].completed_bytes for post in posts if "download" in post), default=0)


def entries(root: Path) -> list[str]:
    return [p.name for p in root.iterdir() if p.is_dir()]


def size_of(job: PreparedJob, root: Path) -> int:
    return sum(f.size for f in resolve_model(context(job, root, Stage.TRAIN)).list_files())


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        ({"model": {"cache": CACHE}}, False),
        ({"model": {"cache": CACHE}, "queue": {"name": "team"}}, True),
        ({"model": {"cache": {**CACHE, "fetch": "BeforeQueue"}}, "queue": {"name": "team"}}, False),
    ],
    ids=["without a queue it is fetched first", "with one while it waits there", "unless that is not wanted"],
)
def test_prepare_fetches_the_base_or_leaves_it_to_the_time_in_the_queue(
    plain: PreparedJob, root: Path, spec: dict[str, Any], left: bool
) -> None:
    job = plain.with_spec(**spec)
    ctx = context(job, root, Stage.PREPARE)
    assert fetch_or_leave(ctx, None) is left
    assert bool(fetched(ctx)) is (not left)
    assert len(entries(root)) == int(not left)


def test_prepares_report_says_that_the_fetch_is_left_each_time_it_runs(bench: Bench) -> None:
    bench.put(ROWS)
    queued = {"model": {"cache": CACHE}, "queue": {"name": "team"}}
    assert bench.run(**queued).fetch_pending
    assert bench.run(**queued).fetch_pending, "prepared before, and still not there"
    assert not bench.run(**queued, planOnly=True).fetch_pending, "nothing will train"
    assert not bench.run().fetch_pending


def test_what_prepare_left_the_fetch_stage_brings_and_training_fetches_nothing(plain: PreparedJob, root: Path) -> None:
    job = plain.with_spec(model={"cache": CACHE}, queue={"name": "team"})
    beside = context(job, root, Stage.FETCH)
    assert stage.run(beside).cached
    assert fetched(beside) == size_of(job, root)
    ctx = context(job, root, Stage.TRAIN)
    assert inputs.bring(ctx, resolve_model(ctx)).folder.parent == root
    assert not fetched(ctx)
    assert not fetch_or_leave(context(job, root, Stage.PREPARE), None), "it is there for the next job"


def test_a_volume_that_cannot_take_it_ends_the_fetch_stage_well(plain: PreparedJob) -> None:
    job = plain.with_spec(model={"cache": CACHE}, queue={"name": "team"})
    unusable = Path("/sys/kernel")  # takes no files, not even root's
    assert not stage.run(context(job, unusable, Stage.FETCH)).cached
    assert fetch_or_leave(context(job, unusable, Stage.PREPARE), None)


def test_a_job_without_a_cache_leaves_nothing(plain: PreparedJob, root: Path) -> None:
    assert not fetch_or_leave(context(plain.with_spec(queue={"name": "team"}), root, Stage.PREPARE), None)
    assert not entries(root)


def test_training_waits_for_a_fetch_as_long_as_that_gets_on(
    plain: PreparedJob, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(module, "GPU_PATIENCE_SECONDS", 0.5)
    job = plain.with_spec(model={"cache": CACHE}, queue={"name": "team"})
    source = resolve_model(context(job, root, Stage.FETCH))
    key, never = key_of(source), threading.Event()
    lock = os.open(root / f"{key}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    part = root / f"{key}.part"
    part.mkdir()

    def get_on() -> None:
        """As another pod's fetch, three times as long as training has patience."""
        with (part / "model.safetensors.part").open("ab") as file:
            for _ in range(15):
                file.write(b"x")
                file.flush()
                never.wait(0.1)
        (part / "model.safetensors.part").unlink()
        os.close(lock)

    fetch = threading.Thread(target=get_on)
    fetch.start()
    ctx = context(job, root, Stage.TRAIN)
    found = inputs.bring(ctx, resolve_model(ctx))
    fetch.join()
    assert found.folder.parent == root, "not on its own disk, a second time over the network"


@pytest.mark.parametrize("shared", [True, False])
def test_two_pods_of_a_job_fetch_the_base_once_with_a_cache_and_once_each_without(
    plain: PreparedJob, root: Path, shared: bool
) -> None:
    job = plain.with_spec(compute={"nodes": 2}, **({"model": {"cache": CACHE}} if shared else {}))
    pods = [context(job, root, Stage.TRAIN) for _ in range(2)]
    threads = [threading.Thread(target=lambda ctx=ctx: inputs.bring(ctx, resolve_model(ctx))) for ctx in pods]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    size = size_of(job, root)
    assert sorted(fetched(ctx) for ctx in pods) == ([0, size] if shared else [size, size])
