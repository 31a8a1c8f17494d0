"""A judge's answers are kept: a publish stage that is killed on the way asks only what is missing."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune_api.names import Stage
from finetune_api.results import JUDGE_LETTERS, PREPARED_PROMPTS, Answer
from finetune_api.spec import Judge
from finetune_trainer.context import StageContext
from finetune_trainer.publish.judge import JudgeError, PairRefused
from finetune_trainer.publish.judge_memory import JudgeMemory, remembered
from finetune_trainer.publish.scores import ANSWERS, judged
from tests.support.judge_server import JudgeServer
from tests.support.trainer_run import Pod
from tests.trainer.conftest import S3

PAIRS = 4
PROGRAM = """
import json, sys
from pathlib import Path
from finetune_api.names import Stage
from finetune_trainer.publish.scores import ANSWERS, judged
from tests.support.trainer_run import Pod
spec, answers = json.loads(sys.argv[2]), ANSWERS.validate_json(sys.argv[3])
ctx = Pod(Path(sys.argv[1])).context(spec, Stage.PUBLISH)
judged(ctx, answers, ctx.workspace_store())
"""


@pytest.fixture
def pod(tmp_path: Path, s3: S3) -> Pod:
    pod = Pod(tmp_path / "pod")
    s3.write_secret(pod.secrets / "output")
    return pod


def spec_of(s3: S3, url: str = "http://127.0.0.1:1/v1") -> dict[str, Any]:
    bucket = s3.new_bucket()
    return {
        "model": {"uri": f"s3://{bucket}/model"},
        "data": {"train": [{"uri": f"s3://{bucket}/x"}]},
        "evaluation": {"judge": {"endpointURL": url, "model": "judge-1"}},
        "output": {"uri": f"s3://{bucket}/out", "secretRef": {"name": "s3"}},
    }


def test_a_stage_that_is_killed_on_the_way_asks_every_question_once(pod: Pod, s3: S3) -> None:
    answers = [Answer(row=i, prompt=f"What is {i}?", reference="", base=f"b{i}", tuned=f"t{i}") for i in range(PAIRS)]
    asked_before = 5  # two pairs, and one order of the third
    running: list[subprocess.Popen[bytes]] = []

    def reply(a: str, b: str) -> str:
        if len(server.requests) == asked_before + 1 and running[0].poll() is None:
            os.kill(running[0].pid, signal.SIGKILL)
            running[0].wait()
        return "Better: [[A]]" if a.startswith("t") else "[[B]]"

    with JudgeServer(reply) as server:
        spec = spec_of(s3, server.url)
        ctx = pod.context(spec, Stage.PUBLISH)
        ctx.workspace_store().put_bytes(PREPARED_PROMPTS, b"[]")
        told = [str(pod.root), json.dumps(spec), ANSWERS.dump_json(answers).decode()]
        running.append(subprocess.Popen([sys.executable, "-c", PROGRAM, *told]))
        assert running[0].wait(60) == -signal.SIGKILL
        assert len(server.requests) == asked_before + 1
        verdict, warnings = judged(ctx, answers, ctx.workspace_store())
        times = Counter(r["messages"][1]["content"] for r in server.requests)
        last = server.requests[asked_before]["messages"][1]["content"]
        assert times == {question: 2 if question == last else 1 for question in times}, "that one was never answered"
        assert len(times) == 2 * PAIRS
        assert verdict is not None
        assert (verdict.wins, verdict.pairs, verdict.problem, warnings) == (PAIRS, PAIRS, None, [])
        assert judged(ctx, answers, ctx.workspace_store()) == (verdict, [])
        assert len(server.requests) == 2 * PAIRS + 1, "nothing is missing"
    kept = ctx.workspace_store().get_bytes(JUDGE_LETTERS)
    assert len(json.loads(kept)) == 2 * PAIRS
    assert b"What is" not in kept
    assert len(kept) < 100 * 2 * PAIRS


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def memory(ctx: StageContext, replies: list[str | JudgeError], model: str = "judge-1") -> tuple[JudgeMemory, list[Any]]:
    """A memory of what the bucket holds, and what is asked beyond that."""
    asked: list[Any] = []

    def ask(messages: list[dict[str, str]]) -> str:
        asked.append(messages[0]["content"])
        said = replies.pop(0)
        if isinstance(said, JudgeError):
            raise said
        return said

    judge = Judge(endpoint_url="http://127.0.0.1:1/v1", model=model)
    store = ctx.workspace_store()
    return JudgeMemory(judge, ask, store, remembered(store)), asked


def test_what_was_answered_is_remembered_and_refusals_are_not(pod: Pod, s3: S3) -> None:
    ctx = pod.context(spec_of(s3), Stage.PUBLISH)
    first, asked = memory(ctx, ["I prefer [[B]].", "Neither, I cannot say.", PairRefused("too long")])
    assert first.ask(question("one")) == "I prefer [[B]]."
    assert first.ask(question("two")) == "Neither, I cannot say."
    with pytest.raises(PairRefused):
        first.ask(question("three"))
    again, asked = memory(ctx, ["[[A]]", "[[C]]"])
    assert [again.ask(question(text)) for text in ("one", "two", "three")] == ["[[B]]", "", "[[A]]"]
    assert asked == ["three"]
    other, asked = memory(ctx, ["[[C]]"], model="judge-2")
    assert other.ask(question("one")) == "[[C]]", "another judge may say something else"


def test_what_cannot_be_kept_or_read_is_asked_again_and_costs_nothing_else(
    pod: Pod, s3: S3, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    ctx = pod.context(spec_of(s3), Stage.PUBLISH)
    ctx.workspace_store().put_bytes(JUDGE_LETTERS, b"{torn")
    kept, asked = memory(ctx, ["[[A]]"])
    s3.write_secret(pod.secrets / "output", secret="wrong")
    assert kept.ask(question("one")) == "[[A]]"
    assert kept.ask(question("one")) == "[[A]]"
    assert asked == ["one"]
    assert "cannot be read, and it is asked again" in caplog.text
    assert "the judge's answer is not kept" in caplog.text
