"""How the answers of base and tuned model score, and which a judge prefers: in ``reports/metrics.json``, the manifest and the status alike."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel

Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]


class AnswerScores(ApiModel):
    """What one model's answers score. Absent: not asked for, or no prompt has a reference."""

    exact_match: Share | None = Field(
        None,
        description="Share of the answers that are the reference, in Unicode's form NFC and without white space around.",
    )
    rouge_1: Share | None = Field(
        None, description="ROUGE-1 (F-measure, mean): words in common. Words of any script, without stemming."
    )
    rouge_2: Share | None = Field(None, description="ROUGE-2: pairs of words in common.")
    rouge_l: Share | None = Field(None, description="ROUGE-L: the longest sequence of words in common.")
    bleu: Percent | None = Field(None, description="BLEU of all answers together (sacrebleu), 0 to 100.")
    chrf: Percent | None = Field(
        None, alias="chrF", description="chrF of all answers together (sacrebleu's chrF2), 0 to 100."
    )
    json_validity: Share | None = Field(None, description="Share of the answers that are JSON as a whole.")
    regex: Share | None = Field(
        None, description="Share of the answers in which evaluation.generation.regex finds something."
    )


class TextMetrics(ApiModel):
    """Answers to the same prompts by base and tuned model."""

    answers: Annotated[int, Field(ge=0)] = Field(description="Prompts that both have answered.")
    references: Annotated[int, Field(ge=0)] = Field(
        description="Those that have a reference: only on them exact match, ROUGE, BLEU and chrF are computed."
    )
    bleu_tokenizer: str | None = Field(
        None,
        description="sacrebleu's tokenizer: 13a, or char where most letters of the references are of scripts without spaces.",
    )
    base: AnswerScores
    tuned: AnswerScores


class TaskScore(ApiModel):
    """One number of a task of lm-eval, of both models."""

    task: str
    metric: str = Field(description="lm-eval's name of it, such as acc, acc_norm or exact_match.")
    filter: str = Field("none", description="lm-eval's filter of the answers.")
    part_of: str | None = Field(None, description="The group asked for, of which this task is a part.")
    documents: Annotated[int, Field(ge=0)] = Field(
        0, description="On how many documents; 0 where a group is summed up."
    )
    few_shot: int | None = Field(None, description="Examples before each question.")
    higher_is_better: bool | None = None
    base: float
    base_stderr: float | None = Field(None, description="Standard error of the mean.")
    tuned: float
    tuned_stderr: float | None = None


class JudgeVerdict(ApiModel):
    """What a language model prefers: the tuned model's answers against the base's, each pair asked about in both orders."""

    model: str = Field(description="The judge.")
    pairs: Annotated[int, Field(ge=0)] = Field(description="Pairs judged: wins + ties + losses + invalid.")
    wins: Annotated[int, Field(ge=0)] = Field(description="The tuned model's answer was preferred in both orders.")
    ties: Annotated[int, Field(ge=0)] = Field(
        description="Neither was, or the order decided, or both answers are the same."
    )
    losses: Annotated[int, Field(ge=0)] = Field(description="The base's answer was preferred in both orders.")
    invalid: Annotated[int, Field(ge=0)] = Field(description="A reply held no verdict.")
    problem: str | None = Field(None, description="Why not all pairs, or none, were judged.")
