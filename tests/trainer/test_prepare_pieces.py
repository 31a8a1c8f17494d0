"""Ids that are put together from those of words are the tokenizer's own."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from finetune_trainer.prepare import pieces
from finetune_trainer.prepare.pieces import KNOWN, Pieces, pieces_of

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
WORDS = [
    *(
        "don't",
        "I'LL",
        "we'Re",
        "HTML5",
        "fooBar",
        "1234",
        "12.5",
        "x=1;",
        "/path/to",
        "//\n",
        "\\t",
        "...",
        "---",
        "'sample",
    ),
    *("café", "e\u0301", "\u0301", "東京。", "ß", "²", "½", "Ⅷ", "ǅ", "ʰ", "\u093e", "👩\u200d🚀", "<|end|>", "<|e"),
]
BLANKS = [" "] * 12 + [
    *"\t\n\r\v\f\x00\x1c\x1f\x7f\x85\xa0\u180e\u200b\u2028\u2029\u3000\ufeff",
    "  ",
    "   ",
    "\n\n",
    " \n",
    "\n ",
    "\r\n",
    "",
]


def cut_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def backend_of(
    pre: Any = GPT_2, normalizer: Any = None, added: AddedToken | str = "<|end|>", dropout: float | None = None
) -> Tokenizer:
    made = Tokenizer(models.BPE(dropout=dropout))
    made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts(Random(1), 300), trainer)
    made.add_special_tokens([added])
    return made


def texts(draw: Random, count: int) -> list[str]:
    def one() -> str:
        return "".join(draw.choice(WORDS) + draw.choice(BLANKS) for _ in range(draw.randint(0, 30)))

    return [draw.choice(BLANKS) + one() for _ in range(count)]


DIGITS = [pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=alone), GPT_2]) for alone in (True, False)]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize("pre", [GPT_2, *DIGITS, *map(cut_by, KNOWN)])
def test_ids_are_the_tokenizers(pre: Any, normalizer: Any) -> None:
    backend = backend_of(pre, normalizer)
    found = pieces_of(backend)
    assert found is not None
    every = texts(Random(2), 3000)
    expected = backend.encode_batch(every, add_special_tokens=False)
    wrong = [text for text, ids in zip(every, expected, strict=True) if ids_of(found, text) != ids.ids]
    assert wrong == []


def test_the_longest_added_token_is_taken() -> None:
    backend = backend_of()
    backend.add_special_tokens(["<|end|><|end|>", "<|e"])
    found = pieces_of(backend)
    assert found is not None
    for text in ("a<|end|><|end|> b", "<|end|> <|end|><|e a", "<|e<|end|>"):
        assert ids_of(found, text) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "made",
    [
        {"pre": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre": cut_by(r"\w+ \w+|.")},
        {"pre": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(KNOWN[0]), "removed"), BYTES])},
        {"normalizer": normalizers.Lowercase()},
        {"added": AddedToken("<|end|>", lstrip=True, normalized=False)},
        {"added": AddedToken("<|end|>", normalized=True)},
        {"dropout": 0.1},
    ],
)
def test_other_tokenizers_are_asked_themselves(made: dict[str, Any]) -> None:
    assert pieces_of(backend_of(**made)) is None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MOST", 100)
    backend = backend_of()
    found = pieces_of(backend)
    assert found is not None
    for text in (" ".join(f"word{start + i}" for i in range(60)) for start in range(0, 1000, 50)):
        assert ids_of(found, text) == backend.encode(text).ids
        assert len(found._known) <= 100 + 60
    long = "x" * (pieces.LONGEST + 1)
    for _ in range(2):
        assert ids_of(found, f"{long} and {long}") == backend.encode(f"{long} and {long}").ids
    assert " and" in found._known
    assert max(map(len, found._known)) <= pieces.LONGEST
    assert found.ids("x " * pieces.LONGEST_TEXT) is None


def ids_of(found: Pieces, text: str) -> list[int]:
    ids = found.ids(text)
    assert ids is not None
    return ids.tolist()
