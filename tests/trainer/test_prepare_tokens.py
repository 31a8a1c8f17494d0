"""Places of tokens that are told by their bytes are the tokenizer's own offsets."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune_trainer.prepare import tokens
from finetune_trainer.prepare.tokens import TextTokenizer, token_bytes

LETTERS = [
    *"aeiou tn. \n\t",
    "ß",
    "é",
    "e\u0301",
    "東",
    "京",
    "👩‍🚀",
    "\u200d",
    "<|end|>",
    "<|mask|>",
    "Ġ",
    "don't",
    "  ",
    "12",
]


def tokenizer_of(
    *, pre: Any = None, normalizer: Any = None, post: Any = None, prefix: bool = False, byte_level: bool = True
) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE() if byte_level else models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if normalizer is not None:
        made.normalizer = normalizer
    if post is not None:
        made.post_processor = post
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["tea and toast don't 東京 ß", "eat an onion in a tent, 東 12 12"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def texts() -> list[str]:
    draw = Random(5)
    return ["", *("".join(draw.choices(LETTERS, k=draw.randint(1, 40))) for _ in range(400))]


SPLIT = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(" ", "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


@pytest.mark.parametrize(
    ("made", "by_bytes"),
    [
        ({}, True),
        ({"pre": SPLIT, "post": processors.ByteLevel(trim_offsets=False)}, True),
        ({"normalizer": normalizers.NFC()}, True),
        ({"prefix": True}, True),
        ({"post": processors.ByteLevel(trim_offsets=True)}, False),
        ({"normalizer": normalizers.Lowercase()}, False),
        ({"pre": pre_tokenizers.Whitespace(), "byte_level": False}, False),
    ],
)
def test_places_are_the_tokenizers_offsets(
    made: dict[str, Any], by_bytes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(**made)
    expected = tokenizer(texts(), add_special_tokens=False, return_offsets_mapping=True)
    assert (token_bytes(tokenizer.backend_tokenizer) is not None) is by_bytes
    told = []
    monkeypatch.setattr(tokens, "_placed", lambda *args, placed=tokens._placed: told.append(placed(*args)) or told[-1])
    found = TextTokenizer(tokenizer).placed(texts())
    assert [placed.ids.tolist() for placed in found] == expected["input_ids"]
    places = [np.stack([p.starts, p.ends], axis=1).tolist() for p in found]
    assert places == [[list(place) for place in offsets] for offsets in expected["offset_mapping"]]
    if by_bytes and not made.get("prefix"):
        assert sum(placed is not None for placed in told) > 200, "most were told by bytes"


def test_ids_are_those_of_a_call_of_the_tokenizer() -> None:
    tokenizer = tokenizer_of(post=processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)]))
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    found = TextTokenizer(tokenizer).ids(texts(), special=True)
    assert [ids.tolist() for ids in found] == tokenizer(texts())["input_ids"]


def test_a_tokenizer_with_a_call_of_its_own_is_asked_itself() -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._encode_plus([part.upper() for part in text], *args, **kwargs)

    tokenizer = tokenizer_of()
    own = Own(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    upper = TextTokenizer(tokenizer).placed(["TEA"])[0].ids.tolist()
    assert TextTokenizer(own).placed(["tea"])[0].ids.tolist() == upper
    assert TextTokenizer(own).ids(["tea"], special=False)[0].tolist() == upper
