"""Token ids of many texts at a time, and where each token stands in its text."""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import models, normalizers
from transformers import PreTrainedTokenizerFast

from finetune_trainer.prepare.pieces import pieces_of, state

Ids = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]

WITH_OFFSETS = {"return_offsets_mapping": True, "return_attention_mask": False, "return_token_type_ids": False}
IDS_ALONE = {"return_attention_mask": False, "return_token_type_ids": False}


@dataclass(frozen=True)
class Placed:
    """A text's tokens: each stands for the characters from ``starts`` to ``ends``."""

    ids: Ids
    starts: Places
    ends: Places


class TextTokenizer:
    """Calls one tokenizer. Of a byte-level one, places are told by how many bytes each token stands for: the tokenizer's own offsets are the
    same, and asking for them takes a third more time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        own = type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus
        # Else what transformers does around the tokenizers library's call makes no difference for ids.
        self._backend: Any = None if own or tokenizer.split_special_tokens else tokenizer.backend_tokenizer
        self._lengths = token_bytes(self._backend) if self._backend is not None else None
        self._pieces = pieces_of(self._backend) if self._backend is not None else None
        self._around: tuple[Ids, Ids] | None = None

    def ids(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        """Each text's tokens.

        Args:
            special: with the special tokens that the tokenizer puts around a text.
        """
        if not texts:
            return []
        if self._backend is None:
            return [
                _ids(found) for found in self._tokenizer(texts, add_special_tokens=special, **IDS_ALONE)["input_ids"]
            ]
        self._backend.no_truncation()
        self._backend.no_padding()
        found = [self._by_pieces(text, special) for text in texts]
        rest = [number for number, ids in enumerate(found) if ids is None]
        if rest:
            coded = self._backend.encode_batch_fast([texts[number] for number in rest], add_special_tokens=special)
            for number, encoding in zip(rest, coded, strict=True):
                found[number] = _ids(encoding.ids)
        return [ids for ids in found if ids is not None]

    def _by_pieces(self, text: str, special: bool) -> Ids | None:
        if self._pieces is None:
            return None
        ids = self._pieces.ids(text)
        if ids is None or not special:
            return ids
        self._around = self._around or around(self._backend)
        before, after = self._around
        return np.concatenate([before, ids, after])

    def placed(self, texts: Sequence[str]) -> list[Placed]:
        """Each text's tokens and their places; the text has its special tokens in it."""
        found = dict(enumerate(self._by_bytes(texts))) if self._lengths is not None else {}
        rest = [number for number in range(len(texts)) if found.get(number) is None]
        if rest:
            coded = self._tokenizer([texts[number] for number in rest], add_special_tokens=False, **WITH_OFFSETS)
            for number, ids, offsets in zip(rest, coded["input_ids"], coded["offset_mapping"], strict=True):
                places = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(ids))
                found[number] = Placed(_ids(ids), places[::2], places[1::2])
        return [placed for _, placed in sorted(found.items()) if placed is not None]

    def _by_bytes(self, texts: Sequence[str]) -> list[Placed | None]:
        assert self._lengths is not None
        return [
            _placed(text, ids, self._lengths) for text, ids in zip(texts, self.ids(texts, special=False), strict=True)
        ]


def around(backend: Any) -> tuple[Ids, Ids]:
    """The special tokens that a tokenizer puts before and after any text."""
    alone, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    begin = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
    return _ids(whole[:begin]), _ids(whole[begin + len(alone) :])


def token_bytes(backend: Any) -> Places | None:
    """How many bytes of text each token stands for; None for a tokenizer of which that cannot be said, or whose offsets leave blanks out.

    Args:
        backend: the tokenizers library's tokenizer.
    """
    model, normalizer = backend.model, backend.normalizer
    before, after = _parts(state(backend.pre_tokenizer)), _parts(state(backend.post_processor))
    if (
        not isinstance(model, models.BPE)
        or model.byte_fallback
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
        or not isinstance(normalizer, normalizers.NFC | None)
        or not {"ByteLevel"} <= {part["type"] for part in before} <= {"ByteLevel", "Split", "Digits"}
        or any(part["type"] == "ByteLevel" and part["trim_offsets"] for part in after)
    ):
        return None
    added = {number: len(token.content.encode()) for number, token in backend.get_added_tokens_decoder().items()}
    # In a byte-level vocabulary each character stands for a byte.
    every = {number: len(token) for token, number in backend.get_vocab(with_added_tokens=False).items()} | added
    lengths = np.zeros(max(every) + 1, np.int64)
    lengths[list(every)] = list(every.values())
    return lengths


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("processors") or [part]


def _placed(text: str, ids: Ids, lengths: Places) -> Placed | None:
    """None where the tokens are not the text's bytes, one after the other."""
    of_each = lengths[ids]
    ends = np.cumsum(of_each)
    starts = ends - of_each
    data = text.encode()
    if not len(ids) or ends[-1] != len(data) or not unicodedata.is_normalized("NFC", text):
        return None
    if len(data) > len(text):
        # As the tokenizer counts: a token of a part of a character stands for all of it.
        character = np.cumsum((np.frombuffer(data, np.uint8) & 0xC0) != 0x80) - 1
        starts, ends = character[starts], character[ends - 1] + 1
    return Placed(ids, starts, ends)


def _ids(numbers: list[int]) -> Ids:
    # Three times as fast as np.asarray, for a list of numbers.
    return np.frombuffer(array("i", numbers), np.int32)
