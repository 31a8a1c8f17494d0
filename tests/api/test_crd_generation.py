"""The CRD that is generated from the models."""

from pathlib import Path

import pytest
import yaml

from finetune_api.crd import KINDS, Kind, custom_resource_definition, to_yaml
from finetune_api.spec import IMMUTABLE_FIELDS, FineTuneJobSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("folder", ["crds", "charts/finetune-operator/files"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_committed_crds_are_what_the_models_generate(kind: Kind, folder: str) -> None:
    path = ROOT / folder / f"{kind.name}.yaml"
    assert path.read_text() == to_yaml(custom_resource_definition(kind)), f"{path} is stale: run `make generate`"


def test_no_other_crds_are_committed_and_the_chart_has_them_all() -> None:
    names = {f"{kind.name}.yaml" for kind in KINDS}
    assert {p.name for p in (ROOT / "crds").iterdir()} == names
    template = (ROOT / "charts/finetune-operator/templates/crds.yaml").read_text()
    assert all(f'"files/{name}"' in template for name in names)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_it_fits_client_side_apply(kind: Kind) -> None:
    """kubectl apply stores the object in an annotation of at most 256 KiB."""
    assert len(to_yaml(custom_resource_definition(kind))) < 200_000


def test_every_spec_field_is_either_immutable_or_known_to_change() -> None:
    fields = {f.alias or name for name, f in FineTuneJobSpec.model_fields.items()}
    mutable = {"suspend", "activeDeadlineSeconds", "pendingTimeoutSeconds", "ttlSecondsAfterFinished"}
    assert fields == set(IMMUTABLE_FIELDS) | mutable


def test_static_defaults_of_the_crd_are_those_of_the_models() -> None:
    """Applying the CRD's defaults to a minimal job gives what pydantic gives."""
    crd = yaml.safe_load(to_yaml(custom_resource_definition()))
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    minimal = {
        "model": {"uri": "hf://a/b"},
        "data": {"train": [{"uri": "s3://bucket/x.jsonl"}]},
        "output": {"uri": "s3://bucket"},
    }
    assert _defaulted(schema, minimal) == FineTuneJobSpec.model_validate(minimal).to_json_dict()


def _defaulted(schema: dict, value: object) -> object:
    if schema.get("type") == "array" and isinstance(value, list):
        return [_defaulted(schema["items"], item) for item in value]
    if schema.get("type") != "object" or not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, child in schema.get("properties", {}).items():
        if name not in filled and "default" in child:
            filled[name] = child["default"]
        if name in filled:
            filled[name] = _defaulted(child, filled[name])
    return filled
