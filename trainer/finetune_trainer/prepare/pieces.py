"""Token ids of texts from those of their words: byte-level tokenizers cut a text into pieces before anything else, none of which reaches
over the blank between two words, and most words were seen before. A fifth of the time that the tokenizers library takes."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import models, normalizers

Ids = npt.NDArray[np.int32]

MOST = 1 << 16
"""Words that are remembered, and those of one text more; about 200 bytes each."""
LONGEST = 64
"""Characters of a word that is remembered."""
LONGEST_TEXT = 1 << 16
"""Characters of a text that is cut here: what bounds how many words one text may add."""

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"

LLAMA_3 = rf"{_CONTRACTION}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"
QWEN_2 = rf"{_CONTRACTION}|{_BEFORE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"
O200K = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
)
TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
KNOWN = (LLAMA_3, QWEN_2, O200K, TEKKEN)
"""Patterns of which no match has a blank behind another character, and none but one of white space depends on what follows it. ByteLevel's own,
GPT-2's, is such a one too."""

_BETWEEN_WORDS = re.compile(r" (?=\S)(?<=\S )")


class Pieces:
    """Cuts texts into words where one tokenizer would cut them in any case, and remembers the words' ids."""

    def __init__(self, backend: Any) -> None:
        """
        Args:
            backend: the tokenizers library's tokenizer, of a kind that :func:`pieces_of` takes.
        """
        self._backend = backend
        # The longest of those that begin at a place, as the library takes it.
        added = sorted((token.content for token in backend.get_added_tokens_decoder().values()), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, added)) or '(?!)'})").split
        self._known: dict[str, bytes] = {}

    def ids(self, text: str) -> Ids | None:
        """The text's ids without special tokens around it; None for a text so long that the tokenizer is to be asked."""
        if len(text) > LONGEST_TEXT:
            return None
        words: list[str] = []
        for number, part in enumerate(self._split(text)):
            first, *others = [part] if number % 2 else _BETWEEN_WORDS.split(part)
            words.append(first)
            words += [" " + word for word in others]
        if len(self._known) > MOST:
            self._known.clear()
        new = [*set(words).difference(self._known)]
        if new:
            coded = self._backend.encode_batch_fast(new, add_special_tokens=False)
            ids = (np.array(found.ids, np.int32).tobytes() for found in coded)
            self._known.update(zip(new, ids, strict=True))
        found = np.frombuffer(b"".join(map(self._known.__getitem__, words)), np.int32)
        for word in new:
            if len(word) > LONGEST:
                del self._known[word]
        return found


def pieces_of(backend: Any) -> Pieces | None:
    """The pieces of a tokenizer that cuts in a known way; None for others.

    Args:
        backend: the tokenizers library's tokenizer.
    """
    kinds = {
        (token.normalized, token.lstrip, token.rstrip, token.single_word)
        for token in backend.get_added_tokens_decoder().values()
    }
    if (
        not isinstance(backend.model, models.BPE)
        or backend.model.dropout
        # NFC joins nothing to a blank.
        or not isinstance(backend.normalizer, normalizers.NFC | None)
        or not _is_known(state(backend.pre_tokenizer) or {})
        # Tokens that are found as they stand; the others would be found in the normalized text, or with the blanks beside them.
        or not kinds <= {(False, False, False, False)}
    ):
        return None
    return Pieces(backend)


def state(part: Any) -> dict[str, Any] | None:
    """What tokenizer.json has for a normalizer, pre-tokenizer or post-processor of the library's."""
    found: dict[str, Any] | None = None if part is None else json.loads(part.__getstate__())
    return found


def _is_known(pre_tokenizer: dict[str, Any]) -> bool:
    match pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return True
        case [
            {"type": "Digits"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return True
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern in KNOWN
    return False
