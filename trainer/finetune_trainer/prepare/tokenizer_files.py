"""One hash for what makes token ids of a conversation: the tokenizer's files, the chat template and the job's own tokens."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence

from finetune_trainer.sources.model import CONFIG_PATTERNS

PATTERNS = tuple(p for p in CONFIG_PATTERNS if p not in ("config.json", "generation_config.json"))


def tokenizer_hash(files: Mapping[str, str], template: str | None, new_tokens: Sequence[str] = ()) -> str:
    """SHA-256 over names and hashes of the tokenizer's files among ``files`` (SHA-256 by path), the template as it is used, and the tokens
    that the job adds."""
    digest = hashlib.sha256()
    for path in sorted(files):
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in PATTERNS):
            digest.update(f"{path} {files[path]}\n".encode())
    digest.update(json.dumps(template).encode())
    if new_tokens:
        digest.update(json.dumps(list(new_tokens)).encode())
    return digest.hexdigest()
