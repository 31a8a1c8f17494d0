"""What base and tuned model answer to the requests of ``evaluation.tasks``, by the evaluation that held-out rows go through: on several GPUs, in
shards or from host memory alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from finetune_api.results import TaskPrompt, TaskReplies
from finetune_trainer.train import evaluate
from finetune_trainer.train.device import Compute
from finetune_trainer.train.rows import Rows, read_rows

PROMPTS = TypeAdapter(list[TaskPrompt])


@dataclass(frozen=True)
class Tasks:
    """The requests of all tasks, for a model with one tokenizer."""

    rows: Rows
    prompts: list[TaskPrompt]

    @classmethod
    def read(cls, files: tuple[Path, Path] | None) -> Tasks | None:
        """As prepare made them: rows and prompts."""
        if files is None:
            return None
        rows, prompts = files
        return cls(read_rows(rows), PROMPTS.validate_json(prompts.read_bytes()))

    def replies(
        self,
        causal_lm: Any,
        tokenizer: Any,
        compute: Compute,
        context_tokens: int,
        divisor: int,
        all_say: Callable[[bool], bool] | None,
    ) -> TaskReplies:
        """A model's answers. Where several ranks compute together, all call this.

        Args:
            context_tokens, divisor, all_say: as of :func:`evaluate.greedy_answers`.
        """
        likely: list[float] = []
        greedy: list[bool] = []
        if len(self.rows):
            found = evaluate.held_out_loss(
                causal_lm, self.rows, evaluate.pad_token_id(tokenizer), compute, divisor=divisor
            )
            assert found.right is not None
            likely = [-nll for nll in found.nll]
            greedy = [right == tokens for right, tokens in zip(found.right, found.tokens, strict=True)]
        texts = [""] * len(self.prompts)
        for longest, until in sorted({(p.max_new_tokens, tuple(p.until)) for p in self.prompts}):
            numbers = [i for i, p in enumerate(self.prompts) if (p.max_new_tokens, tuple(p.until)) == (longest, until)]
            tokens = evaluate.greedy_tokens(
                causal_lm,
                [self.prompts[i].input_ids for i in numbers],
                tokenizer,
                compute,
                longest,
                context_tokens,
                divisor,
                all_say,
                until,
            )
            for number, answer in zip(numbers, tokens, strict=True):
                said = str(tokenizer.decode(answer, skip_special_tokens=True))
                texts[number] = cut(said, self.prompts[number].until)
        return TaskReplies(log_likelihoods=likely, greedy=greedy, texts=texts)


def cut(text: str, until: list[str]) -> str:
    """What stands before the first stop sequence."""
    for stop in filter(None, until):
        text = text.partition(stop)[0]
    return text
