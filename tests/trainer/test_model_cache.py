"""Base models on a volume that jobs share: fetched once, never half there, and evicted only when nobody uses them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finetune_api.names import Stage
from finetune_trainer.context import StageContext
from finetune_trainer.sources import cache as module
from finetune_trainer.sources.cache import ModelCache, cache_of, key_of
from finetune_trainer.sources.model import ModelSource, resolve_model
from finetune_trainer.train import inputs
from tests.support.prepared import PreparedJob, prepare_job
from tests.support.tiny_model import build_tiny_model

CACHE = {"model": {"cache": {"claimName": "models"}}}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The volume; locks of entries in it end with the test."""
    root = tmp_path / "cache"
    root.mkdir()
    yield root
    for folder in list(module._HELD):
        ModelCache(root)._release(folder)


@pytest.fixture
def job(s3: Any, tiny_model: Path, tmp_path: Path) -> PreparedJob:
    return prepare_job(s3, tmp_path / "job", tiny_model).with_spec(**CACHE)


def context(job: PreparedJob, root: Path, stage: Stage = Stage.TRAIN) -> StageContext:
    return replace(job.context(stage), cache_dir=root)


def source(job: PreparedJob, root: Path) -> ModelSource:
    return resolve_model(context(job, root))


def fetched(ctx: StageContext) -> list[int]:
    """Bytes that were told to have moved."""
    moved = [post["download"] for post in ctx.reporter.posts if "download" in post]  # type: ignore[attr-defined]
    return [transfer.completed_bytes for transfer in moved]


def other_model(s3: Any, job: PreparedJob, tmp_path: Path, name: str) -> PreparedJob:
    """A job on another model in the same bucket."""
    folder = build_tiny_model(tmp_path / name)
    (folder / "generation_config.json").write_text(json.dumps({"name": name}))
    s3.put_dir(job.bucket, name, folder)
    return job.with_spec(model={"uri": f"s3://{job.bucket}/{name}"})


def base_of(ctx: StageContext) -> inputs.BaseFiles:
    return inputs.bring(ctx, resolve_model(ctx))


def test_the_second_job_fetches_nothing(job: PreparedJob, root: Path) -> None:
    first, second = context(job, root), context(job, root, Stage.PUBLISH)
    before = base_of(first)
    after = base_of(second)
    assert fetched(first)
    assert not fetched(second)
    assert before == after
    assert before.folder.parent == root
    assert not list(first.work_dir.glob("base/*"))
    names = {f.path for f in source(job, root).list_files()}
    assert {p.name for p in before.folder.iterdir()} == names


def test_a_changed_model_is_another_entry(s3: Any, job: PreparedJob, root: Path) -> None:
    old = base_of(context(job, root)).folder
    s3.put(job.bucket, "base/generation_config.json", "{}")
    new = base_of(context(job, root)).folder
    assert old != new
    assert (new / "generation_config.json").read_text() == "{}"


def test_a_fetch_that_was_killed_is_gone_on_with(s3: Any, job: PreparedJob, root: Path) -> None:
    part = root / f"{key_of(source(job, root))}.part"
    code = f"""
import os, signal
from tests.trainer.test_model_cache import kill_in_the_middle
kill_in_the_middle({str(root)!r}, {str(part)!r}, {job.bucket!r}, {job.snapshot.canonical_json()!r}, {str(job.folder)!r})
"""
    paths = [str(Path(__file__).parents[2]), *sys.path]
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False
    )
    assert process.returncode == -signal.SIGKILL
    begun = {p.name for p in part.iterdir()}
    assert begun
    folder = base_of(context(job, root)).folder
    assert {p.name for p in folder.iterdir()} == {f.path for f in source(job, root).list_files()}
    assert not part.exists()


def kill_in_the_middle(root: str, part: str, bucket: str, snapshot: str, folder: str) -> None:
    """Die as soon as a file is there and the next one is begun."""
    from finetune_api.snapshot import Snapshot

    job = PreparedJob(Snapshot.model_validate_json(snapshot), bucket, Path(folder))

    def moved(_: int) -> None:
        if Path(part, "config.json").is_file():
            os.kill(os.getpid(), signal.SIGKILL)

    ModelCache(Path(root)).fetch(source(job, Path(root)), moved)


def test_of_two_at_once_one_fetches_and_the_other_waits(job: PreparedJob, root: Path) -> None:
    contexts = [context(job, root) for _ in range(2)]
    threads = [threading.Thread(target=base_of, args=(ctx,)) for ctx in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(bool(fetched(ctx)) for ctx in contexts) == [False, True]


def test_the_one_not_used_for_longest_makes_room_unless_it_is_used_now(
    s3: Any, job: PreparedJob, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job, *(other_model(s3, job, tmp_path, name) for name in ("one", "two", "three"))]
    size = sum(f.size for f in source(job, root).list_files())

    def usage(path: Path) -> Usage:
        """A volume with room for two and a half of them."""
        used = sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())
        total = int(2.5 * size / (1 - module.RESERVE))
        return Usage(total, used, total - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    cache = ModelCache(root)
    folders = []
    for each in jobs[:2]:
        folder = cache.fetch(source(each, root))
        assert folder is not None
        folders.append(folder)
    os.utime(root / f"{folders[0].name}.lock", (1, 1))
    assert cache.fetch(source(jobs[2], root)) is None, "both are in use"
    ctx = context(jobs[2], root)
    assert base_of(ctx).folder.parent == ctx.work_dir, "the pod's own disk does it, too"
    for folder in folders:
        cache._release(folder)
    third = cache.fetch(source(jobs[2], root))
    assert third is not None
    assert (folders[0].is_dir(), folders[1].is_dir()) == (False, True), "the oldest goes, and no more than must"
    assert not (root / f"{folders[0].name}.json").exists()


def test_what_an_eviction_left_behind_does_not_stop_the_next_one(job: PreparedJob, root: Path) -> None:
    cache = ModelCache(root)
    folder = cache.fetch(source(job, root))
    assert folder is not None
    gone = root / f"{folder.name}.gone"
    gone.mkdir()
    (gone / "half").touch()  # somebody died
    assert cache.drop(folder)
    assert [p.name for p in root.iterdir()] == [f"{folder.name}.lock"]


def test_a_lock_that_is_never_let_go_is_not_waited_for_for_ever(
    job: PreparedJob, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(module, "GPU_PATIENCE_SECONDS", 0.1)
    other = os.open(root / f"{key_of(source(job, root))}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    ctx = context(job, root)
    assert base_of(ctx).folder == ctx.work_dir / "base"
    os.close(other)
    assert base_of(ctx).folder.parent == root


def test_a_model_larger_than_the_volume_evicts_nothing(
    s3: Any, job: PreparedJob, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ModelCache(root)
    kept = cache.fetch(source(job, root))
    assert kept is not None
    cache._release(kept)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 900, 100))
    assert cache.fetch(source(other_model(s3, job, tmp_path, "large"), root)) is None
    assert kept.is_dir()


@pytest.mark.parametrize("harm", ["other bytes", "a missing file"])
def test_bytes_that_rotted_are_fetched_again(job: PreparedJob, root: Path, harm: str) -> None:
    good = base_of(context(job, root))
    weights = good.folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    if harm == "other bytes":
        weights.write_bytes(bytes(data))
    else:
        weights.unlink()
    again = context(job, root)
    assert base_of(again) == good
    assert fetched(again)


def test_a_volume_that_cannot_be_written_to_costs_only_the_cache(job: PreparedJob, root: Path) -> None:
    ctx = replace(context(job, root), cache_dir=Path("/sys/kernel"))  # takes no files, not even root's
    assert base_of(ctx).folder == ctx.work_dir / "base"


def test_without_a_cache_the_pods_own_disk_is_used(s3: Any, tiny_model: Path, tmp_path: Path, root: Path) -> None:
    plain = prepare_job(s3, tmp_path / "plain", tiny_model)
    ctx = context(plain, root)
    assert cache_of(ctx) is None
    assert base_of(ctx).folder == ctx.work_dir / "base"
    assert not list(root.iterdir())
