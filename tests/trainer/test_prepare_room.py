"""The base model's room on the training pod's disk, and in publish's memory."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.planner import describe, parse_config
from finetune_trainer.prepare import model
from finetune_trainer.prepare.room import disk_warnings, merge_check_weights, merge_warnings
from tests.planner.simulator.golden import read_config
from tests.support.prepare_bench import ROWS, Bench
from tests.support.prepared import deep_merge, job_spec, snapshot_of

GIB = 1 << 30
NONE = "the base model takes 131.4 GiB of the training pod's disk, which asks for none: set compute.ephemeralStorage, "


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({}, 14 * GIB, None),
        ({}, int(131.4 * GIB), NONE),
        ({"compute": {"ephemeralStorage": "300Gi"}}, int(131.4 * GIB), None),
        ({"compute": {"ephemeralStorage": "10Gi"}}, 14 * GIB, "which asks for 10Gi: raise compute.ephemeralStorage, "),
        ({"model": {"cache": {"claimName": "models"}}}, int(131.4 * GIB), None),
        ({"model": {"uri": "pvc://models/llama", "secretRef": None, "endpointURL": None}}, int(131.4 * GIB), None),
    ],
    ids=["small", "none asked", "enough", "too little", "cache", "volume"],
)
def test_a_large_base_asks_for_disk(changes: dict[str, Any], size: int, said: str | None) -> None:
    found = disk_warnings(snapshot_of(deep_merge(job_spec(None, "bucket"), changes), "u" * 32).spec, size)
    if said is None:
        assert found == []
    else:
        [warning] = found
        assert said in warning


def test_prepare_counts_the_models_files(bench: Bench) -> None:
    bench.put(ROWS)
    size = sum(o["Size"] for o in bench.s3.client.list_objects_v2(Bucket=bench.bucket, Prefix="model/")["Contents"])
    enough, less = ({"ephemeralStorage": str(size - n)} for n in (0, 1))
    told = "of the training pod's disk"
    assert not any(told in warning for warning in bench.run(compute=enough).warnings)
    assert any(told in warning for warning in bench.run(compute=less).warnings)


@pytest.mark.parametrize(
    ("base", "merged", "gib", "said"),
    [
        ("llama-2-70b", {"enabled": True}, 8, False),
        ("llama-2-70b", {"enabled": True}, 4, True),
        ("llama-2-70b", {"enabled": False}, 4, False),
        ("llama-2-70b", {"enabled": True}, None, False),
        ("mixtral-8x7b", {"enabled": True}, 8, True),
        ("mixtral-8x7b", {"enabled": True}, 16, False),
    ],
)
def test_a_layer_that_publish_cannot_hold_is_told(
    base: str, merged: dict[str, Any], gib: int | None, said: bool
) -> None:
    shapes = describe(parse_config(read_config(base)))
    spec = snapshot_of(job_spec(None, "bucket", output={"merged": merged}), "u" * 32).spec
    found = merge_warnings(spec, shapes, gib * GIB if gib else None)
    assert bool(found) == said
    assert all(warning.startswith("output.merged: checking the merged model takes up to ") for warning in found)


def test_a_layer_is_counted_with_what_is_read_last_whatever_its_family_calls_it() -> None:
    """All of its experts, or its largest tensor."""
    experts = {f"model.layers.3.mlp.experts.{n}.up_proj.weight": (10, 20) for n in range(8)}
    other = {"model.embed_tokens.weight": (10**6, 10), "model.layers.3.mlp.gate.weight": (10, 8)}
    assert merge_check_weights({**other, **experts}) == 2 * 8 * 10 * 20 + 80
    named = {"h.0.mlp.c_fc.weight": (10, 20), "h.1.mlp.c_fc.weight": (10, 30), "h.1.attn.c_attn.weight": (10, 5)}
    assert merge_check_weights(named) == 2 * 10 * 30 + 50


def test_prepare_looks_at_its_own_limit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put(ROWS)
    monkeypatch.setattr(model, "memory_limit", lambda: GIB)
    told = "checking the merged model takes up to 1.0 GiB of memory (in float32, as on CPUs without bfloat16), and CPU stages have 1.0 GiB"
    assert any(told in warning for warning in bench.run(output={"merged": {"enabled": True}}).warnings)
