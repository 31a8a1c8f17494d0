"""Rows assessed by several processes are assessed as by one."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_api.failures import Reason
from finetune_trainer.cpus import memory_limit
from finetune_trainer.errors import StageError
from finetune_trainer.prepare import check, workers
from tests.support.prepare_bench import ROWS, Bench, row


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two other processes assess, from the second batch on."""
    monkeypatch.setattr(workers, "ALONE_ROWS", 64)
    monkeypatch.setattr(workers, "usable_cpus", lambda: 2)


def test_outcomes_and_their_order_do_not_depend_on_who_assesses(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    mail = [row(f"Who is a{i}@b.de?", f"Number {i} of many. " * 8) for i in range(300)]
    bad = {"messages": [{"role": "user", "content": "no answer"}]}
    cut = row("long?", "long " * 200)
    bench.put([*ROWS, *mail, bad, *ROWS, cut, *ROWS, row("why " * 300, "dropped"), "torn{", *mail])
    changes = {"data": {"checks": {"maxBadRows": 2, "pii": "Redact"}}, "training": {"maxSequenceTokens": 256}}
    monkeypatch.setattr(workers, "usable_cpus", lambda: 1)
    alone = bench.run(**changes)
    files = {name: bench.object(f"prepare/{name}") for name in ("train.parquet", "held_out.parquet", "prompts.json")}
    bench.s3.client.delete_object(Bucket=bench.bucket, Key="out/job-0a1b2c3d/workspace/prepare/result.json")
    monkeypatch.setattr(workers, "ALONE_ROWS", 64)
    monkeypatch.setattr(workers, "usable_cpus", lambda: 2)
    started = []
    pool = workers.ProcessPoolExecutor
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *args: started.append(args[0]) or pool(*args))
    assert bench.run(**changes) == alone
    assert started == [2], "other processes assessed"
    assert {name: bench.object(f"prepare/{name}") for name in files} == files
    assert (alone.data.bad_rows, alone.data.truncated_rows, alone.data.dropped_rows) == (2, 1, 1)
    assert alone.data.pii == {"EMAIL": 600}


def test_rows_assessed_one_at_a_time_are_assessed_as_many_at_a_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids, labels, counts and what is told of bad rows; long rows and short ones, with answers in several turns, texts of many alphabets."""
    turns = [
        {"role": role, "content": f"{role} {i} 東京 ñ 👩‍🚀 " * (1 + i)}
        for i in range(3)
        for role in ("user", "assistant")
    ]
    texts = [row(f"ask {i} ", "tell " * (i % 90 + 1)) for i in range(150)]
    bad = [{"messages": turns[:1]}, row("", "empty"), {"messages": [{**turns[0], "role": "assistant"}]}, "torn{"]
    bench.put([*texts[:70], *bad, {"messages": turns}, {"messages": turns[:2]}, *texts[70:]])
    changes = {"data": {"checks": {"maxBadRows": 4}}, "training": {"maxSequenceTokens": 80}}
    many = bench.run(**changes)
    names = ("train.parquet", "held_out.parquet", "prompts.json", "preview.json")
    files = [bench.object(f"prepare/{name}") for name in names]
    bench.s3.client.delete_object(Bucket=bench.bucket, Key="out/job-0a1b2c3d/workspace/prepare/result.json")
    monkeypatch.setattr(check, "BATCH_ROWS", 1)
    assert bench.run(**changes) == many
    assert [bench.object(f"prepare/{name}") for name in names] == files
    assert many.data.bad_rows == 3
    assert many.data.truncated_rows > 10


@pytest.mark.usefixtures("in_processes")
def test_all_bad_rows_are_counted_also_those_that_only_tokens_show(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = row("q", "long " * 300)
    bench.put([*[{"messages": []}] * 30, *[long, row("q", "a")] * 500])
    changes = {"data": {"checks": {"overlength": "Fail"}}, "training": {"maxSequenceTokens": 64}}
    in_processes = bench.fails(**changes)
    assert "530 of 1,030 rows cannot be used" in in_processes.message
    monkeypatch.setattr(workers, "usable_cpus", lambda: 1)
    assert bench.fails(**changes).message == in_processes.message


@pytest.mark.usefixtures("in_processes")
def test_what_fails_the_job_in_another_process_fails_it_with_its_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = workers.Recipe.of
    bench.put([row(f"q {i}", "a") for i in range(400)])
    small = lambda spec, model: of(spec, replace(model, vocabulary=3))  # noqa: E731
    monkeypatch.setattr(check.Recipe, "of", small)
    monkeypatch.setattr(workers.Assessor, "_check_vocabulary", lambda *_: None)  # in this process only
    assert bench.fails().reason is Reason.UNSUPPORTED_MODEL


@pytest.mark.usefixtures("in_processes")
def test_a_killed_process_is_told_of_as_want_of_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put([row(f"q {i}", "a") for i in range(2000)])
    take = check._take

    def kill_one(*args: object) -> None:
        pool = [p for p in workers.multiprocessing.active_children() if p.name.startswith("ForkServerProcess")]
        if pool and pool[0].pid is not None:
            os.kill(pool[0].pid, signal.SIGKILL)
        take(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(check, "_take", kill_one)
    failed = bench.fails()
    assert isinstance(failed, StageError)
    assert failed.reason is Reason.HOST_OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("cpus", "memory", "expected"),
    [(64, None, 4), (2, None, 2), (64, 4 << 30, 4), (64, 2 << 30, 2), (64, 512 << 20, 0)],
)
def test_processes_are_as_many_as_cpus_and_memory_allow(cpus: int, memory: int | None, expected: int) -> None:
    assert workers.most_workers(cpus, memory) == expected


def test_the_memory_limit_is_the_containers(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    assert memory_limit(limit) is None
    limit.write_text("max\n")
    assert memory_limit(limit) is None
    limit.write_text("4294967296\n")
    assert memory_limit(limit) == 4 << 30
