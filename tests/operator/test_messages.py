"""Sentences for people, from what stages told."""

from __future__ import annotations

from finetune_api.scores import AnswerScores, TextMetrics
from finetune_operator.planning.messages import metrics_status
from tests.operator.manifests import METRICS, publish_report

TEXT = TextMetrics(
    answers=20,
    references=18,
    base=AnswerScores(exact_match=0.1, rouge_l=0.25, bleu=3.0, json_validity=0.5),
    tuned=AnswerScores(exact_match=0.4, rouge_l=0.5, bleu=21.25, json_validity=1.0),
)


def test_scores_of_answers_stand_in_the_metrics_once_they_are_published() -> None:
    published = publish_report().model_copy(update={"text_metrics": TEXT})
    found = metrics_status(METRICS, published)
    assert found.text == TEXT
    assert found.summary == (
        "held-out loss 1.402 → 0.861 (perplexity 4.06 → 2.37); exact match 0.10 → 0.40, ROUGE-L 0.25 → 0.50, "
        "BLEU 3.00 → 21.25, JSON 0.50 → 1.00 on 20 answers; 1,052 tokens/s"
    )
    assert metrics_status(METRICS).text is None
    accurate = METRICS.model_copy(update={"token_accuracy_base": 0.4, "token_accuracy": 0.6125})
    assert "; token accuracy 40.0% → 61.3%; 1,052 tokens/s" in metrics_status(accurate).summary
    assert metrics_status(accurate).token_accuracy == 0.6125
    assert "answers" not in metrics_status(METRICS, publish_report()).summary
