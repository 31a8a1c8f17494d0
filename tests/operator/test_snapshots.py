"""What is read of run snapshots."""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import pytest

from finetune_api.names import SNAPSHOT_KEY
from finetune_operator.client import Api
from finetune_operator.settings import Settings
from finetune_operator.snapshots import Conflict, Snapshots
from tests.operator.world import UID, World, world

Raw = dict[str, Any]


class Stored:
    """An API server with one ConfigMap."""

    def __init__(self, text: str) -> None:
        self.text = text

    async def get(self, path: str) -> Raw:
        meta = {"name": path.rsplit("/", 1)[1], "ownerReferences": [{"uid": UID, "controller": True}]}
        return {"metadata": meta, "data": {SNAPSHOT_KEY: self.text}}


def frozen() -> tuple[World, Raw]:
    w = world()
    w.make_snapshot()
    assert w.snapshot is not None
    return w, json.loads(w.snapshot.snapshot.canonical_json())


async def test_a_snapshot_of_a_newer_version_is_read_and_its_digest_is_that_of_its_text() -> None:
    w, raw = frozen()
    raw |= {"newField": 1}
    raw["spec"]["training"]["newField"] = {"a": 1}
    text = json.dumps(raw)
    record = await Snapshots(cast(Api, Stored(text)), Settings()).find(w.observe().job)
    assert record is not None
    assert w.snapshot is not None
    assert record.snapshot == w.snapshot.snapshot
    assert record.digest == hashlib.sha256(text.encode()).hexdigest()


async def test_a_snapshot_that_means_what_this_version_cannot_do_is_refused() -> None:
    w, raw = frozen()
    raw["plan"]["method"]["type"] = "Quantum"
    with pytest.raises(Conflict, match="no readable run snapshot"):
        await Snapshots(cast(Api, Stored(json.dumps(raw))), Settings()).find(w.observe().job)
