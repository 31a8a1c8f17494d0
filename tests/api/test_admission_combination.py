"""What the real API server accepts and refuses of an AdapterCombination, and that the model says the same in the same words."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from finetune_api.spec import AdapterCombinationSpec
from tests.api.test_admission import merged
from tests.support.apiserver import ApiServer

MINIMAL: dict[str, Any] = {
    "adapters": [{"uri": "s3://acme/tone"}, {"uri": "hf://acme/facts"}],
    "output": {"uri": "s3://acme/support"},
}
FIRST = MINIMAL["adapters"][0]

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("the smallest", {}),
    ("an SVD of a rank", {"type": "SVD", "rank": 8}),
    ("TIES by frequency", {"type": "TIES", "density": 0.2, "majoritySign": "Frequency"}),
    ("DARE with a seed", {"type": "DARETIES", "density": 0.2, "majoritySign": "Total", "seed": 7}),
    ("pruning", {"type": "MagnitudePrune", "density": 0.5}),
    ("a negative weight", {"adapters": [FIRST, {"uri": "pvc://models/x", "weight": -0.5}]}),
    ("a revision", {"adapters": [FIRST, {"uri": "hf://acme/facts", "revision": "v2", "secretRef": {"name": "hf"}}]}),
    ("sixteen adapters", {"adapters": [FIRST] * 16}),
]
DENSITY = "density, the share of values that is kept, is set for TIES, DARELinear, DARETIES and MagnitudePrune"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("TIES without density", {"type": "TIES"}, DENSITY),
    ("a density that nothing uses", {"density": 0.5}, DENSITY),
    ("a sign that nobody elects", {"type": "Linear", "majoritySign": "Total"}, "majoritySign applies to TIES and DARETIES only"),
    ("a rank that follows from others", {"type": "Cat", "rank": 8}, "rank applies to SVD only"),
    ("a seed for nothing", {"type": "TIES", "density": 0.5, "seed": 1}, "seed applies to DARELinear and DARETIES only"),
    ("a weight of nothing", {"adapters": [FIRST, {**FIRST, "weight": 0}]}, "weight must not be 0: leave the adapter out"),
    ("a revision in a bucket", {"adapters": [FIRST, {**FIRST, "revision": "v2"}]}, "revision applies to hf:// adapters only"),
]  # fmt: skip
BY_SCHEMA: list[tuple[str, dict[str, Any], str]] = [
    ("one adapter", {"adapters": [FIRST]}, "should have at least 2 items"),
    ("seventeen", {"adapters": [FIRST] * 17}, "must have at most 16 items"),
    ("a type that peft does not have", {"type": "Average"}, "Unsupported value"),
    ("a density that prunes nothing", {"type": "TIES", "density": 1}, "should be less than 1"),
    ("a result on the Hub", {"output": {"uri": "hf://acme/support"}}, "spec.output.uri"),
    ("an unknown field", {"densty": 0.5}, 'unknown field "spec.densty"'),
]


def manifest(name: str, spec: dict[str, Any]) -> str:
    """The manifest as YAML."""
    kind = {"apiVersion": "finetune.dev/v1alpha1", "kind": "AdapterCombination"}
    return yaml.safe_dump({**kind, "metadata": {"name": name}, "spec": spec})


@pytest.mark.light
@pytest.mark.parametrize(("case", "patch"), ACCEPTED, ids=[c[0] for c in ACCEPTED])
def test_accepts(apiserver: ApiServer, case: str, patch: dict[str, Any]) -> None:
    spec = merged(MINIMAL, patch)
    result = apiserver.kubectl("apply", "--dry-run=server", "-f", "-", stdin=manifest("a", spec))
    assert result.returncode == 0, result.stderr
    assert AdapterCombinationSpec.model_validate(spec)


@pytest.mark.light
@pytest.mark.parametrize(("case", "patch", "words"), REFUSED + BY_SCHEMA, ids=[c[0] for c in REFUSED + BY_SCHEMA])
def test_refuses(apiserver: ApiServer, case: str, patch: dict[str, Any], words: str) -> None:
    result = apiserver.kubectl("apply", "--dry-run=server", "-f", "-", stdin=manifest("a", merged(MINIMAL, patch)))
    assert result.returncode != 0
    assert words in result.stderr


@pytest.mark.parametrize(("case", "patch", "words"), REFUSED, ids=[c[0] for c in REFUSED])
def test_the_model_refuses_in_the_same_words(case: str, patch: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AdapterCombinationSpec.model_validate(merged(MINIMAL, patch))
    assert words in str(caught.value)


@pytest.mark.light
def test_nothing_of_it_changes_and_it_is_listed(apiserver: ApiServer) -> None:
    apiserver.kubectl("apply", "-f", "-", stdin=manifest("standing", MINIMAL)).check_returncode()
    for patch in ({"ttlSecondsAfterFinished": 60}, {"type": "Linear"}, {"runtime": {"image": "own:1"}}):
        result = apiserver.kubectl("apply", "-f", "-", stdin=manifest("standing", merged(MINIMAL, patch)))
        assert "spec is immutable: create a new AdapterCombination instead" in result.stderr
    listed = apiserver.kubectl("get", "ftac", "standing").stdout
    for column in ("NAME", "PHASE", "TYPE", "RANK", "ERROR", "AGE"):
        assert column in listed
    too_long = apiserver.kubectl("apply", "--dry-run=server", "-f", "-", stdin=manifest("a" * 41, MINIMAL))
    assert "at most 40 characters" in too_long.stderr
