"""Sentences for people, from what stages told."""

from __future__ import annotations

import json

import pytest

from finetune_api.results import MergeCheck
from finetune_api.scores import AnswerScores, JudgeVerdict, TaskScore, TextMetrics
from finetune_operator.client import _error
from finetune_operator.planning.messages import metrics_status
from finetune_operator.planning.phases import success_message
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
    judge = JudgeVerdict(model="m-1", pairs=20, wins=12, ties=5, losses=2, invalid=1)
    found = metrics_status(METRICS, published.model_copy(update={"judge": judge}))
    assert found.judge == judge
    assert "on 20 answers; m-1 on 20 pairs: 12 wins, 5 ties, 2 losses, 1 invalid; 1,052 tokens/s" in found.summary
    away = JudgeVerdict(model="m-1", pairs=0, wins=0, ties=0, losses=0, invalid=0, problem="away")
    found = metrics_status(METRICS, published.model_copy(update={"judge": away}))
    assert "; no verdict of m-1; " in found.summary
    task = TaskScore(task="arc_easy", metric="acc", base=0.25, tuned=0.375, documents=100)
    found = metrics_status(METRICS, published.model_copy(update={"tasks": [task]}))
    assert found.tasks == [task]
    assert "; arc_easy acc 0.250 → 0.375; 1,052 tokens/s" in found.summary
    assert metrics_status(METRICS).tasks is None
    assert metrics_status(METRICS).text is None
    accurate = METRICS.model_copy(update={"token_accuracy_base": 0.4, "token_accuracy": 0.6125})
    assert "; token accuracy 40.0% → 61.3%; 1,052 tokens/s" in metrics_status(accurate).summary
    assert metrics_status(accurate).token_accuracy == 0.6125
    assert "answers" not in metrics_status(METRICS, publish_report()).summary


@pytest.mark.parametrize(
    ("model_bytes", "verified", "agrees"),
    [
        (None, "Adapter verified", "Merged model agrees with base + adapter within 0.1%."),
        (270, "Trained weights verified", "Published model agrees with the trained weights within 0.1%."),
    ],
    ids=["adapter", "Full"],
)
def test_a_good_end_names_what_was_published(model_bytes: int | None, verified: str, agrees: str) -> None:
    check = MergeCheck(
        held_out_loss_adapter=0.86, held_out_loss_merged=0.86, relative_difference=0.001, tolerance=0.01, rows=9
    )
    text = success_message(publish_report().model_copy(update={"merge_check": check, "model_bytes": model_bytes}))
    assert text.startswith(f"{verified} from the bucket: held-out loss 0.861 reproduced")
    assert text.endswith(agrees)


def test_a_crd_that_is_too_old_for_the_operator_is_named() -> None:
    message = "failed to create typed patch object: .status.gpuStock: field not declared in schema"
    answer = json.dumps({"reason": "InternalError", "message": message}).encode()
    assert _error(500, "", answer, "PATCH", "/").message.endswith(
        "(the CRD is older than this operator: apply the CRDs of its version)"
    )
