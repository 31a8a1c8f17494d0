"""New tokens, and tokens whose rows of the embeddings are trained: whether the tokenizer and the model can have them, before a GPU is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune_api.failures import Reason
from finetune_api.planner import UnknownArchitecture, parse_config
from finetune_api.results import TrainedToken, TrainedTokens
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import add_new_tokens
from finetune_trainer.prepare.shapes import HEAD, INPUTS
from finetune_trainer.sources.model import TensorHeaders
from finetune_trainer.text import shorten

NAMED = 5


def trained_tokens(tokenizer: Any, spec: FineTuneJobSpec, headers: TensorHeaders) -> TrainedTokens | None:
    """Add the job's new tokens to ``tokenizer``, and find those that are trained; None where there are none.

    Raises:
        StageError: InvalidConfig for a new token that exists or another one that does not; UnsupportedModel.
    """
    new, named = spec.model.new_tokens or [], spec.method.lora.trainable_tokens or []
    if not new and not named:
        return None
    refuse_existing(tokenizer, new)
    before = len(tokenizer)
    ids = {text: existing_id(tokenizer, text) for text in named if text not in new}
    add_new_tokens(tokenizer, new)
    by_id = {token: TrainedToken(token=text, id=token, new=False) for text, token in ids.items()}
    for text in new:
        token = tokenizer.convert_tokens_to_ids(text)
        by_id[token] = TrainedToken(token=text, id=token, new=True)
    rows = embedding_rows(headers)
    refuse_untrainable(headers, spec)
    needed = max(by_id) + 1
    if new and rows < before:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"model.newTokens: the tokenizer has {before:,} tokens, and the embeddings have {rows:,} rows: the new tokens' rows would not follow them.",
        )
    if needed > rows and not new:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"method.lora.trainableTokens: {by_id[needed - 1].token!r} is token {needed - 1:,}, and the embeddings have {rows:,} rows.",
        )
    return TrainedTokens(tokens=[by_id[i] for i in sorted(by_id)], resized_to=needed if needed > rows else None)


def refuse_existing(tokenizer: Any, new: Sequence[str]) -> None:
    """Raises InvalidConfig for a new token that is none."""
    vocabulary = tokenizer.get_vocab()
    if found := [token for token in new if token in vocabulary]:
        told = ", ".join(f"{token!r} is token {vocabulary[token]}" for token in found[:NAMED])
        raise StageError(
            Reason.INVALID_CONFIG,
            f"model.newTokens: {told} of this tokenizer already. Leave it out; method.lora.trainableTokens trains the rows of tokens that exist.",
        )


def existing_id(tokenizer: Any, text: str) -> int:
    """The id of the token that is so called, or that the text is read as.

    Raises:
        StageError: InvalidConfig, with what the text is read as.
    """
    vocabulary = tokenizer.get_vocab()
    if text in vocabulary:
        return int(vocabulary[text])
    read = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(read) == 1 and tokenizer.decode(read) == text:
        return int(read[0])
    parts = ", ".join(repr(tokenizer.decode([token])) for token in read[:NAMED])
    raise StageError(
        Reason.INVALID_CONFIG,
        f"method.lora.trainableTokens: {shorten(text, 64)!r} is no token of this tokenizer, which reads {len(read)} of it ({parts}"
        f"{', …' if len(read) > NAMED else ''}). Name those, or make it one by model.newTokens.",
    )


def embedding_of(headers: TensorHeaders) -> str | None:
    """The name of the input embeddings' tensor."""
    return next((n for n, (_, shape) in headers.items() if len(shape) == 2 and INPUTS.search(_module(n))), None)


def head_of(headers: TensorHeaders) -> str | None:
    """The name of the output head's tensor, where the files have one."""
    return next(
        (n for n, (_, s) in headers.items() if len(s) == 2 and HEAD.search(_module(n)) and ".layers." not in n), None
    )


def embedding_rows(headers: TensorHeaders) -> int:
    """Raises UnsupportedModel where they are not found."""
    name = embedding_of(headers)
    if name is None:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"model.newTokens and method.lora.trainableTokens: the model's files have no embeddings of a known name (such as {min(headers)}).",
        )
    return int(headers[name][1][0])


def is_tied(tensors: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether input embeddings and output head are one; where config.json does not say so, by what the model's family does."""
    try:
        return parse_config(config).tied_embeddings
    except UnknownArchitecture:
        has_head = any(HEAD.search(_module(name)) and ".layers." not in name for name in tensors)
        return bool(config.get("tie_word_embeddings", not has_head))


def refuse_untrainable(headers: TensorHeaders, spec: FineTuneJobSpec) -> None:
    """What peft would compute wrongly, or train twice.

    Raises:
        StageError: UnsupportedModel, InvalidConfig.
    """
    head = head_of(headers)
    if head is not None and f"{_module(head)}.bias" in headers:
        # TrainableTokensLayer (peft 0.21.2) multiplies by the weight alone.
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"model.newTokens and method.lora.trainableTokens: the output head {_module(head)} has a bias, which peft would leave out. Train it by "
            "modulesToSave, with tokens that exist.",
        )
    lora = spec.method.lora
    for module in lora.modules_to_save or []:
        if INPUTS.search(module) or HEAD.search(module):
            raise StageError(
                Reason.INVALID_CONFIG,
                f"method.lora.modulesToSave trains {module} whole, and model.newTokens or trainableTokens rows of it: leave one of them out.",
            )


def grown(headers: TensorHeaders, rows: int) -> TensorHeaders:
    """The headers as they are once the embeddings have so many rows."""
    resized = {embedding_of(headers), head_of(headers)}
    return {n: (t, (rows, *s[1:])) if n in resized else (t, s) for n, (t, s) in headers.items()}


def resized_config(config: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """config.json of a model whose embeddings have so many rows."""
    text = config.get("text_config")
    if isinstance(text, dict):
        config = {**config, "text_config": {**text, "vocab_size": vocabulary}}
        return {**config, "vocab_size": vocabulary} if "vocab_size" in config else config
    return {**config, "vocab_size": vocabulary}


def trained_rows(headers: TensorHeaders, config: Mapping[str, Any], tokens: TrainedTokens | None) -> int:
    """How many numbers they are."""
    if tokens is None:
        return 0
    name = embedding_of(headers)
    assert name is not None  # found when the tokens were
    return len(tokens.tokens) * int(headers[name][1][1]) * (1 if is_tied(headers, config) else 2)


def counted(tokens: TrainedTokens, found: Counter[int]) -> TrainedTokens:
    """With how often each stands in the training rows."""
    told = [token.model_copy(update={"occurrences": found[token.id]}) for token in tokens.tokens]
    return tokens.model_copy(update={"tokens": told})


def warnings_of(tokens: TrainedTokens) -> list[str]:
    """What is trained on nothing."""
    warnings = []
    for field, is_new, stay in (
        ("model.newTokens", True, "its rows stay nearly the mean of all others"),
        ("method.lora.trainableTokens", False, "its rows are trained as those of what is never said"),
    ):
        missing = [t.token for t in tokens.tokens if t.new is is_new and not t.occurrences]
        if missing:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            warnings.append(f"{field}: {', '.join(map(repr, missing[:NAMED]))}{more} in no training row: {stay}")
    return warnings


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")
