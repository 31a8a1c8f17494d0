"""Scores of answers: what they count, what they leave out, and in which languages."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from finetune_api.failures import Reason
from finetune_api.results import Answer
from finetune_api.scores import TextMetrics
from finetune_api.spec import TextMetric
from finetune_trainer import pattern
from finetune_trainer.errors import StageError
from finetune_trainer.pattern import check_on, compiled
from finetune_trainer.publish.scores import score_rows
from finetune_trainer.publish.text_metrics import ROUGE_WORDS, Words, bleu_tokenizer, is_json, text_metrics

ALL = list(TextMetric)
SLOW = r"(a|a)+$"
SLOW_TEXT = "a" * 40 + "b"


def answer(reference: str, base: str, tuned: str) -> Answer:
    return Answer(row=0, prompt="?", reference=reference, base=base, tuned=tuned)


def scores(*answers: Answer, wanted: list[TextMetric] = ALL, regex: str = "x") -> TextMetrics:
    found, warnings = text_metrics(answers, wanted, compiled(regex))
    assert found is not None
    assert warnings == []
    return found


def test_what_equals_the_reference_scores_full_and_what_shares_nothing_scores_none() -> None:
    text = "the cat sat on the mat"
    found = scores(answer(text, "zzz qqq", text), answer("Zoë is here today", "vvv", "Zoe\u0308 is here today\n"))
    assert (found.answers, found.references, found.bleu_tokenizer) == (2, 2, "13a")
    full = found.tuned.to_json_dict()
    assert {k: full[k] for k in ("exactMatch", "rouge1", "rouge2", "rougeL")} == {
        "exactMatch": 1.0, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0,
    }  # fmt: skip
    assert found.tuned.chrf is not None
    assert found.tuned.chrf > 85  # two Unicode forms of one letter differ for sacrebleu
    assert (found.base.exact_match, found.base.rouge_1, found.base.rouge_l, found.base.bleu) == (0, 0, 0, 0)


def test_scores_are_those_that_the_formulas_give() -> None:
    # Four of six words, in order: precision 1, recall 2/3; of five pairs of words three.
    found = scores(answer("the cat sat on the mat", "the cat sat on", "x"), wanted=[TextMetric.ROUGE]).base
    assert (found.rouge_1, found.rouge_2, found.rouge_l) == (0.8, 0.75, 0.8)
    # Every n-gram is right, and the answer too short: only the brevity penalty, exp(1 - 6/4), is left.
    found = scores(answer("the cat sat on the mat", "the cat sat on", "x"), wanted=[TextMetric.BLEU]).base
    assert found.bleu == pytest.approx(60.6531)
    assert (found.rouge_1, found.chrf, found.exact_match) == (None, None, None), "only what was asked for"


def test_bleu_is_of_all_answers_together_not_a_mean_of_each() -> None:
    long, short = answer("a b c d e f g h", "a b c d e f g h", ""), answer("x y", "x y", "")
    assert scores(long, short, wanted=[TextMetric.BLEU]).base.bleu == 100, "two words alone have no four-grams"


def test_prompts_without_a_reference_count_only_for_what_needs_none() -> None:
    found = scores(answer("yes", "yes", "yes"), answer(" ", '{"a": 1}', "x"), answer("", "[", "x y"))
    assert (found.answers, found.references) == (3, 1)
    assert found.base.exact_match == 1
    assert found.base.json_validity == pytest.approx(1 / 3, abs=1e-4)
    assert found.tuned.regex == pytest.approx(2 / 3, abs=1e-4)
    alone = scores(answer("", "1", "x"))
    assert (alone.references, alone.base.bleu, alone.bleu_tokenizer, alone.base.json_validity) == (0, None, None, 1)


def test_nothing_is_scored_where_nothing_was_answered_or_asked_for() -> None:
    assert text_metrics([], ALL, None) == (None, [])
    assert text_metrics([answer("a", "b", "c")], [], None) == (None, [])


@given(st.text(st.characters(codec="ascii")))
def test_words_are_rouges_own_in_ascii(text: str) -> None:
    assert Words().tokenize(text) == DefaultTokenizer().tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Größe Ökonomie", ["größe", "ökonomie"]),
        ("E\u0301té, déjà", ["été", "déjà"]),
        ("Привет, мир!", ["привет", "мир"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("東京は tower", ["東", "京", "は", "tower"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
    ],
)
def test_words_of_every_script_count(text: str, words: list[str]) -> None:
    assert Words().tokenize(text) == words


def test_bleu_counts_characters_where_words_have_no_spaces() -> None:
    japanese = answer("私は東京に住んでいます。", "私は東京に住んでいました。", "x")
    found = scores(japanese, wanted=[TextMetric.BLEU])
    assert found.bleu_tokenizer == "char"
    assert found.base.bleu is not None
    assert found.base.bleu > 50, "13a would take the sentence for one word"
    assert bleu_tokenizer(["한국어 문장", "a plain text", "12 + 34"]) == "13a"
    assert bleu_tokenizer(["", "…"]) == "13a"


def test_long_texts_are_compared_up_to_a_number_of_words() -> None:
    text = "word " * 50_000
    assert len(Words().tokenize(text)) == ROUGE_WORDS
    began = time.monotonic()
    assert scores(answer(text, text, "x"), wanted=[TextMetric.ROUGE]).base.rouge_l == 1
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("text", ['{"a": [1, null]}', " 3\n", '"text"', "[]"])
def test_json_is_json(text: str) -> None:
    assert is_json(text)


@pytest.mark.parametrize(
    "text", ["", "{", "{'a': 1}", "NaN", "[Infinity]", '{"a": 1} done', "```json\n{}\n```", "[" * 99_999]
)
def test_what_is_not_json_as_a_whole_is_none(text: str) -> None:
    assert not is_json(text)


def test_a_pattern_that_takes_too_long_counts_as_not_found_and_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern, "SEARCH_SECONDS", 0.05)
    answers = [answer("", SLOW_TEXT, "aaa"), answer("", "aa", "a")]
    found, warnings = text_metrics(answers, [TextMetric.REGEX], compiled(SLOW))
    assert found is not None
    assert (found.base.regex, found.tuned.regex) == (0.5, 1.0)
    assert warnings == [
        "evaluation.generation.regex took too long on 1 answer of the base model: they count as not found"
    ]


def test_a_pattern_is_refused_that_is_none_or_takes_too_long_on_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern, "SEARCH_SECONDS", 0.05)
    for refused in (lambda: compiled("(a"), lambda: check_on(compiled(SLOW), ["aaa", SLOW_TEXT])):
        with pytest.raises(StageError) as info:
            refused()
        assert info.value.reason is Reason.INVALID_CONFIG
        assert "evaluation.generation.regex" in info.value.message
    check_on(compiled(SLOW), ["aaa"])


@pytest.mark.parametrize(
    "text", ["(?R)", "(yes){e<=1}(?", "(" * 500 + ")" * 500, "a{99999999999999999999}", "[a-", "\\"]
)
def test_what_python_does_not_take_for_a_pattern_is_refused(text: str) -> None:
    with pytest.raises(StageError, match="is not a regular expression"):
        compiled(text)


def test_scores_for_people_stand_side_by_side() -> None:
    found = scores(answer("yes", "no", "yes"), wanted=[TextMetric.EXACT_MATCH, TextMetric.CHRF])
    assert score_rows(found)[0] == ("exact match", "0.0%", "100.0%")
    assert [label for label, *_ in score_rows(found)] == ["exact match", "chrF"]


def test_scoring_downloads_nothing_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    scores(*[answer("a text that ends .", "a text .", "other .")] * 120)
    assert caplog.records == []
    code = (
        "import socket, json\n"
        "def refuse(*_): raise SystemExit('network')\n"
        "socket.socket.connect = refuse\nsocket.getaddrinfo = refuse\n"
        "from finetune_api.results import Answer\n"
        "from finetune_api.spec import TextMetric\n"
        "from finetune_trainer.publish.text_metrics import text_metrics\n"
        "a = Answer(row=0, prompt='?', reference='eins zwei', base='eins', tuned='eins zwei')\n"
        "found, _ = text_metrics([a], list(TextMetric), None)\n"
        "print(json.dumps(found.to_json_dict()))\n"
    )
    env: dict[str, Any] = {"HOME": "/nonexistent", "PYTHONPATH": "api:trainer"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["tuned"]["exactMatch"] == 1


def test_short_references_have_no_runs_of_words_to_score() -> None:
    found = scores(answer("yes", "no", "yes"), answer("no", "no", "no"))
    assert (found.tuned.exact_match, found.tuned.rouge_1) == (1, 1)
    assert (found.tuned.bleu, found.tuned.rouge_2, found.bleu_tokenizer) == (None, None, None)
    found = scores(answer("it is so", "no", "it is so"))
    assert (found.tuned.rouge_2, found.tuned.bleu) == (1, None)


@pytest.mark.parametrize(
    ("pattern", "text"), [("^x{e}$", "qqqq"), (r"\\boxed{d}", r"\boxe"), ("(?:answer){i}", "answer")]
)
def test_braces_that_repeat_nothing_are_braces(pattern: str, text: str) -> None:
    """To the library that has a timeout they would be fuzzy matches."""
    assert not compiled(pattern)(text)
    assert compiled(pattern)(pattern.replace("\\\\", "\\").replace("(?:", "").replace(")", "").strip("^$"))
    assert compiled(r"[{]a{2,3}\{b{1}")("{aa{b")
