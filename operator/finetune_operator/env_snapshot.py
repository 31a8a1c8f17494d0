"""A snapshot that stands in a container's environment: as short as its stage allows, since Linux takes no variable above 128 KiB."""

from __future__ import annotations

import json
from collections.abc import Sequence

from finetune_api.combination import CombinationSnapshot
from finetune_api.snapshot import Snapshot
from finetune_api.spec import CombinationRuntime, DataSource, Runtime


def for_cleanup(snapshot: Snapshot) -> str:
    """Output and workspace are all that it reads; of data one source stays each, since there must be one."""
    spec = snapshot.spec
    held_out = spec.data.held_out.model_copy(update={"sources": _first(spec.data.held_out.sources)})
    data = {"train": _first(spec.data.train), "held_out": held_out, "chat_template": None}
    asked = spec.evaluation.generation
    generation = asked.model_copy(update={"sources": _first(asked.sources)})
    short = {
        "data": spec.data.model_copy(update=data),
        "evaluation": spec.evaluation.model_copy(update={"generation": generation}),
        "runtime": Runtime(),
    }
    return _text(snapshot.model_copy(update={"spec": spec.model_copy(update=short)}))


def for_combine(snapshot: CombinationSnapshot) -> str:
    """How its pod runs is not its own concern."""
    spec = snapshot.spec.model_copy(update={"runtime": CombinationRuntime()})
    return _text(snapshot.model_copy(update={"spec": spec}))


def _first(sources: Sequence[DataSource] | None) -> list[DataSource] | None:
    return [sources[0].model_copy(update={"template": None})] if sources is not None else None


def _text(snapshot: Snapshot | CombinationSnapshot) -> str:
    """Not the canonical form, of which digests are made: in that one a character beyond ASCII takes up to twelve."""
    return json.dumps(snapshot.to_json_dict(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
