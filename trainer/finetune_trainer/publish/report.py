"""``reports/index.html``: what was asked, what came of it, and how far it can be trusted, on one page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from finetune_api.names import Stage
from finetune_api.results import Answer, ExecutionRecord, Manifest, PreviewRow, TrainResult
from finetune_api.snapshot import Snapshot
from finetune_trainer.private import shareable, without_credentials
from finetune_trainer.publish.chart import Point, Series, line_chart
from finetune_trainer.publish.facts import cost_facts, data_facts, duration, method_facts, size
from finetune_trainer.publish.scores import score_rows
from finetune_trainer.publish.tasks import task_rows

TEMPLATE = Path(__file__).with_name("report.html.j2")
SMOOTHED_STEPS = 20
"""A run of more steps than this also shows the mean of so many neighbours."""


@dataclass(frozen=True)
class Curves:
    """The lines of ``reports/metrics.jsonl`` as points over steps."""

    loss: list[Point]
    held_out: list[Point]
    token_accuracy: list[Point]
    learning_rate: list[Point]
    grad_norm: list[Point]


def html_report(
    snapshot: Snapshot, manifest: Manifest, trained: TrainResult, metrics: bytes, answers: bytes, preview: bytes
) -> str:
    """The page.

    Args:
        manifest: all but the record of this page.
        metrics: ``reports/metrics.jsonl``.
        answers: ``reports/answers.json``.
        preview: ``prepare/preview.json``.
    """
    if manifest.initial_adapter is not None:
        snapshot = snapshot.with_lora(manifest.initial_adapter.lora)
    method = snapshot.resolved(manifest.plan.method if manifest.plan is not None else None).plan.method
    curves = read_curves(metrics)
    # Who wants no answers to held-out prompts in the bucket wants no other rows there either.
    shown = snapshot.spec.evaluation.generation.prompts
    # Rows and answers may hold anything: everything that is not markup of ours is escaped.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    environment.filters |= {"size": size, "duration": duration}
    return environment.from_string(TEMPLATE.read_text()).render(
        snapshot=snapshot,
        manifest=manifest,
        metrics=manifest.metrics,
        text=manifest.text_metrics,
        judge=manifest.judge,
        task_rows=task_rows(manifest.tasks),
        score_rows=score_rows(manifest.text_metrics) if manifest.text_metrics is not None else [],
        data=manifest.data,
        trained=trained,
        planned=manifest.plan,
        method=method.type.value,
        method_facts=method_facts(snapshot, method, manifest.plan, trained),
        data_facts=data_facts(snapshot, manifest.data),
        cost_facts=cost_facts(manifest.plan, trained),
        charts=charts(curves),
        smoothed_steps=SMOOTHED_STEPS,
        answers=[Answer.model_validate(a) for a in json.loads(answers)],
        preview=[tokens_of(PreviewRow.model_validate(row)) for row in json.loads(preview)][:shown],
        stages=stage_seconds(manifest.attempts, manifest.created_at),
        sources=[without_credentials(source.uri) for source in snapshot.spec.data.train],
        asked=json.dumps(shareable(snapshot.spec), indent=2),
        sizes={
            kind: sum(f.size for f in manifest.files if f.path.startswith(f"{kind}/"))
            for kind in ("adapter", "merged", "model")
        },
    )


@dataclass(frozen=True)
class Tokens:
    """A row's tokens for the page: (text, id, learned) each, and how many are left out."""

    source: str
    tokens: list[tuple[str, int, bool]]
    more: int


def tokens_of(row: PreviewRow) -> Tokens:
    """Line breaks are shown, and break the line."""
    texts = [text.replace("\n", "⏎\n") for text in row.tokens]
    each = list(zip(texts, row.input_ids, row.learned, strict=True))
    return Tokens(row.source, each, row.length - len(each))


def read_curves(metrics: bytes) -> Curves:
    """Points by step; a line of metrics holds a step's numbers or an evaluation's."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in metrics.splitlines() if line.strip()]

    def of(name: str) -> list[Point]:
        return [(line["step"], line[name]) for line in lines if line.get(name) is not None]

    return Curves(of("loss"), of("held_out_loss"), of("token_accuracy"), of("learning_rate"), of("grad_norm"))


def charts(curves: Curves) -> dict[str, str]:
    """SVG by name; those without points are left out."""
    losses = [Series("training", curves.loss)]
    if len(curves.loss) > SMOOTHED_STEPS:
        losses.append(Series(f"training, mean of {SMOOTHED_STEPS} steps", smoothed(curves.loss)))
    found = {
        "loss": line_chart("Loss", [Series("held out", curves.held_out, dots=True), *losses]),
        "accuracy": line_chart("Token accuracy", [Series("token accuracy", curves.token_accuracy, dots=True)]),
        "rate": line_chart("Learning rate", [Series("learning rate", curves.learning_rate)]),
        "norm": line_chart("Gradient norm", [Series("gradient norm", curves.grad_norm)]),
    }
    return {name: svg for name, svg in found.items() if svg}


def smoothed(points: list[Point]) -> list[Point]:
    """The mean of each point and those before it, SMOOTHED_STEPS in all."""
    values = [y for _, y in points]
    return [
        (points[end][0], sum(values[end + 1 - SMOOTHED_STEPS : end + 1]) / SMOOTHED_STEPS)
        for end in range(SMOOTHED_STEPS - 1, len(points))
    ]


def stage_seconds(attempts: Sequence[ExecutionRecord], end: str) -> list[tuple[str, float]]:
    """How long each stage took, from its first execution's beginning to the next stage's, waiting included."""
    begun = {}
    for stage in (Stage.PREPARE, Stage.TRAIN, Stage.PUBLISH):
        times = [a.started_at for a in attempts if a.stage == stage.value and a.started_at is not None]
        if times:
            begun[stage.value] = datetime.fromisoformat(min(times))
    if not begun:
        return []
    ends = [*list(begun.values())[1:], datetime.fromisoformat(end)]
    return [
        (stage, max(0.0, (last - first).total_seconds()))
        for (stage, first), last in zip(begun.items(), ends, strict=True)
    ]
