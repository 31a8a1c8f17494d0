"""Scores of answers, by the field's usual measures. Pure: the same answers give the same scores anywhere."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Sequence
from statistics import fmean
from typing import NoReturn

import regex
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from finetune_api.results import Answer
from finetune_api.scores import AnswerScores, TextMetrics
from finetune_api.spec import TextMetric
from finetune_trainer.pattern import Search
from finetune_trainer.text import plural

ROUGES = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
BLEU_WORDS = 4
"""The longest runs that BLEU counts."""
ROUGE_WORDS = 2000
"""Of each text so many words count: time and memory of ROUGE-L grow with the product of both lengths."""
DIGITS = 4
WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts that do not separate words."""
_LETTER = regex.compile(r"\p{L}")
_WITHOUT_SPACES = regex.compile(rf"[[{WITHOUT_SPACES}]&&\p{{L}}]", regex.V1)
_WORD = regex.compile(rf"[{WITHOUT_SPACES}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{WITHOUT_SPACES}]]+", regex.V1)


class Words:
    """ROUGE's words. rouge-score's own tokenizer drops every letter that is not ASCII; on ASCII this one does the same. Where a
    script has no spaces each character is a word."""

    def tokenize(self, text: str) -> list[str]:
        """Lower case, in order."""
        return _WORD.findall(unicodedata.normalize("NFC", text).lower())[:ROUGE_WORDS]  # type: ignore[no-any-return]


def text_metrics(
    answers: Sequence[Answer], wanted: Collection[TextMetric], search: Search | None
) -> tuple[TextMetrics | None, list[str]]:
    """Scores of base and tuned model on the same prompts, and what is worth knowing of them.

    Args:
        search: whether ``evaluation.generation.regex`` is found in a text.
    """
    if not answers or not wanted:
        return None, []
    compared = [a for a in answers if a.reference.strip()]
    tokenizer = bleu_tokenizer([a.reference for a in compared])
    warnings: list[str] = []
    sides = {}
    for side in ("base", "tuned"):
        given = [getattr(a, side) for a in answers]
        pairs = [(a.reference, getattr(a, side)) for a in compared]
        scores = of_references(pairs, wanted, tokenizer) if pairs else {}
        if TextMetric.JSON_VALIDITY in wanted:
            scores["json_validity"] = fmean(is_json(text) for text in given)
        if TextMetric.REGEX in wanted and search is not None:
            found = [searched(search, text) for text in given]
            scores["regex"] = fmean(bool(f) for f in found)
            if late := found.count(None):
                warnings.append(
                    f"evaluation.generation.regex took too long on {plural(late, 'answer')} of the {side} model: they count as not found"
                )
        sides[side] = AnswerScores.model_validate({name: round(value, DIGITS) for name, value in scores.items()})
    used = tokenizer if sides["tuned"].bleu is not None else None
    return TextMetrics(answers=len(answers), references=len(compared), bleu_tokenizer=used, **sides), warnings


def of_references(pairs: Sequence[tuple[str, str]], wanted: Collection[TextMetric], tokenizer: str) -> dict[str, float]:
    """Scores of (reference, answer) pairs. What counts runs of words is left out where no reference has one so long: it would be nothing, however
    good the answers are."""
    references, answers = [list(texts) for texts in zip(*pairs, strict=True)]
    scores: dict[str, float] = {}
    longest = max(len(Words().tokenize(r)) for r in references)
    if TextMetric.EXACT_MATCH in wanted:
        scores["exact_match"] = fmean(same(r, a) for r, a in pairs)
    if TextMetric.ROUGE in wanted:
        scorer = RougeScorer(list(ROUGES), tokenizer=Words())
        each = [scorer.score(r, a) for r, a in pairs]
        scores |= {field: fmean(e[name].fmeasure for e in each) for name, field in ROUGES.items()}
        if longest < 2:
            del scores["rouge_2"]
    if TextMetric.BLEU in wanted and longest >= BLEU_WORDS:
        # force: it would warn of texts that look tokenized.
        scores["bleu"] = BLEU(tokenize=tokenizer, force=True).corpus_score(answers, [references]).score
    if TextMetric.CHRF in wanted:
        scores["chrf"] = CHRF().corpus_score(answers, [references]).score
    return scores


def bleu_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's: ``char`` where most letters are of scripts without spaces, else ``13a``, the usual one."""
    text = "".join(references)
    return "char" if 2 * len(_WITHOUT_SPACES.findall(text)) > len(_LETTER.findall(text)) else "13a"


def same(reference: str, answer: str) -> bool:
    """Whether two texts are equal but for Unicode's form and white space around."""
    return unicodedata.normalize("NFC", reference).strip() == unicodedata.normalize("NFC", answer).strip()


def is_json(text: str) -> bool:
    """Whether a text is one JSON value (RFC 8259: NaN and Infinity are none), with nothing around it but white space."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def searched(search: Search, text: str) -> bool | None:
    """Whether it is found; None if that takes too long."""
    try:
        return search(text)
    except TimeoutError:
        return None
