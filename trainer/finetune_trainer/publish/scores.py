"""``reports/metrics.json``: everything that base and tuned model are compared by, for machines."""

from __future__ import annotations

import math

from pydantic import TypeAdapter, ValidationError

from finetune_api.names import JUDGE_SLOT
from finetune_api.results import (
    ANSWERS_FILE,
    PREPARED_PROMPTS,
    SCORES_FILE,
    Answer,
    FileRecord,
    HeldOutComparison,
    HeldOutScores,
    PreparedPrompt,
    PrepareResult,
    Scores,
    TrainMetrics,
    TrainResult,
)
from finetune_api.scores import JudgeVerdict, TextMetrics
from finetune_trainer.context import StageContext
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import NotFound
from finetune_trainer.pattern import compiled
from finetune_trainer.publish.judge import judge_answers
from finetune_trainer.publish.judge_client import JudgeClient
from finetune_trainer.publish.judge_memory import JudgeMemory, remembered
from finetune_trainer.publish.tasks import task_scores
from finetune_trainer.publish.text_metrics import text_metrics
from finetune_trainer.s3 import S3Store
from finetune_trainer.waiting import wait_until_available

LABELS = (
    ("exact match", "exact_match", "{:.1%}"),
    ("ROUGE-1", "rouge_1", "{:.3f}"),
    ("ROUGE-2", "rouge_2", "{:.3f}"),
    ("ROUGE-L", "rouge_l", "{:.3f}"),
    ("BLEU", "bleu", "{:.1f}"),
    ("chrF", "chrf", "{:.1f}"),
    ("valid JSON", "json_validity", "{:.1%}"),
    ("regular expression found", "regex", "{:.1%}"),
)
ANSWERS = TypeAdapter(list[Answer])
PROMPTS = TypeAdapter(list[PreparedPrompt])


def publish_scores(
    ctx: StageContext, prepared: PrepareResult, trained: TrainResult, output: S3Store, workspace: S3Store
) -> tuple[Scores, FileRecord]:
    """Compute the scores and store them. What an earlier execution has stored is taken as it is."""
    answers_sha256 = next(f.sha256 for f in trained.report_files if f.path == ANSWERS_FILE)
    scores = wait_until_available(ctx, lambda: read_scores(output))
    digest = ctx.snapshot.digest()
    if scores is None or (scores.snapshot_digest, scores.answers_sha256) != (digest, answers_sha256):
        answers = ANSWERS.validate_json(wait_until_available(ctx, lambda: output.get_bytes(ANSWERS_FILE)))
        generation = ctx.snapshot.spec.evaluation.generation
        search = compiled(generation.regex) if generation.regex is not None else None
        text, warnings = text_metrics(answers, generation.metrics, search)
        verdict, told = judged(ctx, answers, workspace)
        tasks, of_tasks = task_scores(ctx, prepared, trained, workspace)
        scores = Scores(
            snapshot_digest=digest,
            answers_sha256=answers_sha256,
            held_out=held_out_scores(prepared.data.held_out_rows, trained.metrics),
            text=text,
            judge=verdict,
            tasks=tasks,
            warnings=[*warnings, *told, *of_tasks],
        )
    found = scores
    return found, wait_until_available(ctx, lambda: output.put_model(SCORES_FILE, found))


def judged(ctx: StageContext, answers: list[Answer], workspace: S3Store) -> tuple[JudgeVerdict | None, list[str]]:
    """What the judge says, if there is to be one, and what is worth knowing of it."""
    judge = ctx.snapshot.spec.evaluation.judge
    if judge is None:
        return None, []
    ctx.reporter.report(activity="Judging")
    prompts = PROMPTS.validate_json(wait_until_available(ctx, lambda: workspace.get_bytes(PREPARED_PROMPTS)))
    asked = {prompt.row: prompt for prompt in prompts if prompt.answered}
    secret = judge.secret_ref.name if judge.secret_ref is not None else None
    credentials = Credentials(JUDGE_SLOT, secret, ctx.secrets_dir / JUDGE_SLOT if secret is not None else None)
    known = wait_until_available(ctx, lambda: remembered(workspace))
    with JudgeClient(judge, credentials) as client:
        memory = JudgeMemory(judge, client.ask, workspace, known)
        return judge_answers(judge, answers, asked, memory.ask)


def score_rows(text: TextMetrics) -> list[tuple[str, str, str]]:
    """Name, base and tuned of every score there is, for people."""
    both = [(label, getattr(text.base, field), getattr(text.tuned, field), form) for label, field, form in LABELS]
    return [(label, form.format(b), form.format(t)) for label, b, t, form in both if b is not None and t is not None]


def read_scores(output: S3Store) -> Scores | None:
    """Those of an earlier execution, if they can be read."""
    try:
        return output.get_model(SCORES_FILE, Scores)
    except (NotFound, ValidationError):
        return None


def held_out_scores(rows: int, metrics: TrainMetrics) -> HeldOutComparison:
    """What training measured, side by side."""
    return HeldOutComparison(
        rows=rows,
        base=_side(metrics.held_out_loss_base, metrics.perplexity_base, metrics.token_accuracy_base),
        tuned=_side(metrics.held_out_loss, metrics.perplexity, metrics.token_accuracy),
    )


def _side(loss: float, perplexity: float, accuracy: float | None) -> HeldOutScores:
    finite = perplexity if math.isfinite(perplexity) else None
    return HeldOutScores(loss=loss, perplexity=finite, token_accuracy=accuracy)
