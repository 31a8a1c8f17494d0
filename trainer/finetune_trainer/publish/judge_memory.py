"""What a judge has answered, kept in the workspace: a publish stage that is stopped and started again asks only what is missing."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable

from pydantic import TypeAdapter, ValidationError

from finetune_api.results import JUDGE_LETTERS
from finetune_api.spec import Judge
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.publish.judge import Chat, letter_of
from finetune_trainer.s3 import S3Store

log = logging.getLogger(__name__)

LETTERS = TypeAdapter(dict[str, str | None])


class JudgeMemory:
    """Answers from memory, or asks and remembers. One small object is written after each question, at most two for a pair; it holds no texts,
    only a letter for the hash of each question."""

    def __init__(
        self, judge: Judge, ask: Callable[[Chat], str], workspace: S3Store, known: dict[str, str | None]
    ) -> None:
        self._asked = [judge.endpoint_url, judge.model]
        self._ask = ask
        self._workspace = workspace
        self._letters = known

    def ask(self, messages: Chat) -> str:
        """The judge's reply; of one that is remembered, the verdict alone.

        Raises:
            JudgeError: as ``ask`` does. What was not answered is not remembered.
        """
        question = hashlib.sha256(json.dumps([*self._asked, messages]).encode()).hexdigest()
        if question in self._letters:
            letter = self._letters[question]
            return f"[[{letter}]]" if letter is not None else ""
        reply = self._ask(messages)
        self._letters[question] = letter_of(reply)
        try:
            self._workspace.put_bytes(JUDGE_LETTERS, LETTERS.dump_json(self._letters))
        except StageError as error:
            log.warning("the judge's answer is not kept: %s", error)
        return reply


def remembered(workspace: S3Store) -> dict[str, str | None]:
    """What earlier executions were answered, by the hash of the question; the letter is None for a reply without a verdict."""
    try:
        return LETTERS.validate_json(workspace.get_bytes(JUDGE_LETTERS))
    except NotFound:
        return {}
    except ValidationError as error:
        log.warning("what the judge answered before cannot be read, and it is asked again: %s", error)
        return {}
