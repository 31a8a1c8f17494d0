"""A language model as judge, over HTTP: what counts as a win, and what happens when the judge is away, refuses or talks nonsense."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.results import Answer, PreparedPrompt
from finetune_api.scores import JudgeVerdict
from finetune_api.spec import Judge
from finetune_trainer.credentials import Credentials
from finetune_trainer.publish import judge_client
from finetune_trainer.publish.judge import Outcome, Preferred, judge_answers, letter_of, outcome
from finetune_trainer.publish.judge_client import ATTEMPTS, JudgeClient
from tests.support.judge_server import Fault, JudgeServer

KEY = "sk-very-secret"
GOOD, BAD = "It is a good answer.", "It is a bad answer."


def honest(a: str, b: str) -> str:
    """Prefers what is good, wherever it stands."""
    if (a == GOOD) is (b == GOOD):
        return "Both the same. [[C]]"
    return "[[B]] would be too easy; A is better: [[A]]" if a == GOOD else "[[B]]"


def answer(base: str, tuned: str, reference: str = "", row: int = 0) -> Answer:
    return Answer(row=row, prompt="What is it?", reference=reference, base=base, tuned=tuned)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited."""
    waited: list[float] = []
    monkeypatch.setattr("finetune_trainer.waiting.pause", waited.append)
    return waited


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(honest) as running:
        yield running


def credentials(tmp_path: Path, key: str | None = KEY) -> Credentials:
    folder = tmp_path / "judge"
    folder.mkdir(exist_ok=True)
    if key is not None:
        (folder / "OPENAI_API_KEY").write_text(f"{key}\n")
    return Credentials("judge", "openai", folder)


def judged(
    server: JudgeServer, known: Credentials, answers: list[Answer], prompts: dict[int, PreparedPrompt] | None = None, **spec: Any
) -> tuple[JudgeVerdict, list[str]]:  # fmt: skip
    judge = Judge(endpoint_url=spec.pop("url", server.url), model="judge-1", **spec)
    with JudgeClient(judge, known) as client:
        return judge_answers(judge, answers, prompts or {}, client.ask)


def counts(verdict: JudgeVerdict) -> tuple[int, int, int, int]:
    assert verdict.pairs == verdict.wins + verdict.ties + verdict.losses + verdict.invalid
    return verdict.wins, verdict.ties, verdict.losses, verdict.invalid


def test_wins_ties_and_losses_are_counted_with_every_pair_asked_about_in_both_orders(
    server: JudgeServer, tmp_path: Path
) -> None:
    pairs = [answer(BAD, GOOD), answer(BAD, GOOD), answer(GOOD, BAD), answer(BAD, "Also bad."), answer(BAD, BAD)]
    verdict, warnings = judged(server, credentials(tmp_path), pairs)
    assert counts(verdict) == (2, 2, 1, 0)
    assert (verdict.model, verdict.pairs, verdict.problem, warnings) == ("judge-1", 5, None, [])
    assert len(server.requests) == 8, "two each, and none where both say the same"
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert set(server.paths) == {"/v1/chat/completions"}
    first, second = (r["messages"][1]["content"] for r in server.requests[:2])
    assert first.index(BAD) < first.index(GOOD)
    assert second.index(GOOD) < second.index(BAD)
    assert server.requests[0] | {"messages": None} == {"model": "judge-1", "messages": None, "temperature": 0}


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_that_always_prefers_one_place_gives_ties_alone(
    server: JudgeServer, tmp_path: Path, letter: str
) -> None:
    server.reply = lambda a, b: f"[[{letter}]]"
    verdict, _ = judged(server, credentials(tmp_path), [answer(BAD, GOOD), answer(GOOD, BAD), answer("x", "y")])
    assert counts(verdict) == (0, 3, 0, 0)


def test_only_agreement_of_both_orders_wins() -> None:
    table = {
        (Preferred.TUNED, Preferred.TUNED): Outcome.WIN,
        (Preferred.BASE, Preferred.BASE): Outcome.LOSS,
    }
    for one in Preferred:
        for other in Preferred:
            assert outcome(one, other) is table.get((one, other), Outcome.TIE)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("[[A]]", "A"),
        ("First [[A]], but no: [[B]]", "B"),
        ("tie [[C]].", "C"),
        ("A", None),
        ("", None),
        ("[[D]]", None),
    ],
)
def test_the_last_verdict_of_a_reply_counts(reply: str, letter: str | None) -> None:
    assert letter_of(reply) == letter


def test_nonsense_counts_as_invalid_and_as_nothing_else(server: JudgeServer, tmp_path: Path) -> None:
    server.reply = lambda a, b: "I would rather talk about the weather." if "odd" in a else honest(a, b)
    verdict, warnings = judged(server, credentials(tmp_path), [answer("odd", GOOD), answer(BAD, GOOD)])
    assert counts(verdict) == (1, 0, 0, 1)
    assert warnings == []
    server.faults = [Fault(body=b'{"choices": [{"message": {"content": null, "refusal": "no"}}]}')]
    assert counts(judged(server, credentials(tmp_path), [answer(BAD, GOOD)])[0]) == (0, 0, 0, 1)


def test_a_judge_that_is_busy_is_asked_again_when_it_says(
    server: JudgeServer, tmp_path: Path, pauses: list[float]
) -> None:
    server.faults = [
        Fault(429, b"{}", {"Retry-After": "7"}),
        Fault(503, b"busy"),
        Fault(429, b"", {"Retry-After": "9999"}),
    ]
    verdict, warnings = judged(server, credentials(tmp_path), [answer(BAD, GOOD)])
    assert counts(verdict) == (1, 0, 0, 0)
    assert warnings == []
    assert (pauses[0], pauses[2], len(pauses)) == (7, 60, 3)


def test_a_judge_that_is_away_is_given_up_after_bounded_patience_and_what_it_said_stands(
    server: JudgeServer, tmp_path: Path, pauses: list[float]
) -> None:
    server.faults = [Fault(), Fault(), *[Fault(502, b"")] * ATTEMPTS]
    verdict, warnings = judged(server, credentials(tmp_path), [answer(BAD, GOOD)] * 4)
    assert counts(verdict) == (1, 0, 0, 0)
    assert verdict.problem == f"{server.url}/chat/completions answered 502 Bad Gateway"
    assert warnings == [f"the judge gave a verdict on 1 of 4 pairs of answers (evaluation.judge): {verdict.problem}"]
    assert len(pauses) == ATTEMPTS - 1
    assert 60 < sum(pauses) < 180


def test_nobody_at_the_address_is_told(server: JudgeServer, tmp_path: Path) -> None:
    verdict, warnings = judged(server, credentials(tmp_path), [answer(BAD, GOOD)], url="http://127.0.0.1:1/v1")
    assert verdict.pairs == 0
    assert verdict.problem is not None
    assert "http://127.0.0.1:1/v1/chat/completions cannot be reached: ConnectError" in verdict.problem
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(401, f'{{"error": "Incorrect API key provided: {KEY}"}}'.encode()), "answered 401 Unauthorized: check OPENAI_API_KEY in Secret openai"),
        (Fault(404, b"{}"), "answered 404 Not Found: check evaluation.judge.endpointURL"),
        (Fault(307, b"", {"Location": "http://127.0.0.1:1/elsewhere"}), "answered 307"),
        (Fault(200, b"<html>Log in</html>"), "something that is no chat completion"),
        (Fault(200, b'{"choices": []}'), "something that is no chat completion"),
    ],
)  # fmt: skip
def test_a_refusal_is_not_asked_again_and_says_what_to_check(
    server: JudgeServer, tmp_path: Path, pauses: list[float], fault: Fault, said: str
) -> None:
    server.faults = [fault]
    verdict, warnings = judged(server, credentials(tmp_path), [answer(BAD, GOOD)] * 3)
    assert (verdict.pairs, len(server.requests), pauses) == (0, 1, [])
    assert verdict.problem is not None
    assert said in verdict.problem
    assert KEY not in str(warnings)


@pytest.mark.parametrize(
    ("fault", "said"), [(Fault(seconds=1), "cannot be reached: ReadTimeout"), (Fault(byte_seconds=0.05), "and no end")]
)
def test_a_judge_that_hangs_or_never_ends_is_given_up(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, said: str
) -> None:
    monkeypatch.setattr(judge_client, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(judge_client, "ATTEMPTS", 2)
    server.faults = [fault] * 2
    verdict, _ = judged(server, credentials(tmp_path), [answer(BAD, GOOD)])
    assert verdict.problem is not None
    assert said in verdict.problem
    assert len(server.requests) == 2


def test_all_questions_together_take_bounded_time(server: JudgeServer, tmp_path: Path) -> None:
    judge = Judge(endpoint_url=server.url, model="judge-1")
    now = iter(range(0, 100_000, 400))
    with JudgeClient(judge, credentials(tmp_path), clock=lambda: float(next(now))) as client:
        verdict, warnings = judge_answers(judge, [answer(BAD, GOOD)] * 50, {}, client.ask)
    assert verdict.pairs < 50
    assert verdict.problem == "it took more than 30 minutes in all"
    assert len(warnings) == 1


def test_a_judge_that_refuses_a_temperature_is_asked_without(server: JudgeServer, tmp_path: Path) -> None:
    server.faults = [Fault(400, b'{"error": "temperature"}')]
    verdict, _ = judged(server, credentials(tmp_path), [answer(BAD, GOOD)])
    assert counts(verdict) == (1, 0, 0, 0)
    assert ["temperature" in request for request in server.requests] == [True, False, False]


def test_a_key_that_is_missing_or_none_is_told_and_never_shown(
    server: JudgeServer, tmp_path: Path, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    verdict, _ = judged(server, credentials(tmp_path, key=None), [answer(BAD, GOOD)])
    assert verdict.problem is not None
    assert verdict.problem.startswith("Secret openai (for judge) does not exist or is empty")
    assert len(pauses) == ATTEMPTS - 1, "it may be on its way to the pod"
    for key in (f"{KEY}\nX-Evil: 1", f"{KEY}ß"):
        verdict, _ = judged(server, credentials(tmp_path, key=key), [answer(BAD, GOOD)])
        assert verdict.problem == "OPENAI_API_KEY in Secret openai has characters that no key has"
    assert server.requests == []
    judged(server, credentials(tmp_path), [answer(BAD, GOOD)])
    judged(server, credentials(tmp_path), [answer(BAD, GOOD)], url="http://127.0.0.1:1/v1")
    assert KEY not in caplog.text


def test_without_a_secret_no_key_is_sent(server: JudgeServer) -> None:
    verdict, _ = judged(server, Credentials("judge", None, None), [answer(BAD, GOOD)])
    assert counts(verdict) == (1, 0, 0, 0)
    assert set(server.keys) == {None}


def test_the_judge_is_told_criteria_reference_and_the_whole_conversation_of_as_many_pairs_as_it_may_see(
    server: JudgeServer, tmp_path: Path
) -> None:
    turns = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "What is it?"}]
    prompt = PreparedPrompt(row=7, prompt="What is it?", reference="", messages=turns, text="", input_ids=[])
    pairs = [answer(BAD, GOOD, row=7), answer(BAD, GOOD, reference="C'est bon."), answer(BAD, GOOD)]
    verdict, _ = judged(
        server, credentials(tmp_path), pairs, {7: prompt}, criteria="politeness {and} tone", max_pairs=2
    )
    assert verdict.pairs == 2
    first, third = server.requests[0]["messages"], server.requests[2]["messages"]
    assert "Criteria: politeness {and} tone." in first[0]["content"]
    assert first[1]["content"].startswith("[Conversation]\nsystem: Answer in French.\nuser: What is it?\n\n[Answer of")
    assert third[1]["content"].startswith("[Conversation]\nWhat is it?\n\n[Reference answer]\nC'est bon.\n\n[Answer of")


def test_a_pair_that_the_judge_does_not_take_is_left_out_and_others_go_on(server: JudgeServer, tmp_path: Path) -> None:
    """The setting that it was asked without is not to blame, and stays."""
    too_long = Fault(400, b'{"error": "context length"}')
    server.faults = [Fault(), Fault(), too_long, too_long]
    verdict, warnings = judged(server, credentials(tmp_path), [answer(BAD, GOOD)] * 3)
    assert counts(verdict) == (2, 0, 0, 1)
    assert (verdict.problem, warnings) == (None, [])
    assert ["temperature" in request for request in server.requests] == [True, True, True, False, True, True]


def test_a_judge_that_takes_nothing_is_given_up(server: JudgeServer, tmp_path: Path) -> None:
    server.faults = [Fault(422)] * 9
    verdict, warnings = judged(server, credentials(tmp_path), [answer(BAD, GOOD)] * 9)
    assert counts(verdict) == (0, 0, 0, 3)
    assert verdict.problem is not None
    assert "answered 422" in verdict.problem
    assert len(warnings) == 1
