"""Reading a FineTuneJob from a YAML file as the apiserver would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune_api import API_VERSION, KIND
from finetune_api.spec import FineTuneJobSpec


class BadInput(Exception):
    """A file or an option that cannot be used; the message says what was found and expected."""


def read_job(path: Path) -> tuple[str, FineTuneJobSpec]:
    """Name and spec of the one FineTuneJob in a file; other documents are passed over.

    YAML 1.2, as kubectl reads numbers: PyYAML takes ``1e-4`` for a string.

    Raises:
        BadInput: not readable, no FineTuneJob or several, or a spec that the apiserver would refuse.
    """
    try:
        documents = list(YAML(typ="safe", pure=True).load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    except YAMLError as error:
        raise BadInput(f"{path} is not YAML: {error}") from error
    jobs = [d for d in documents if isinstance(d, dict) and d.get("kind") == KIND]
    if len(jobs) != 1:
        raise BadInput(f"{path} has {len(jobs)} documents of kind {KIND}; expected one")
    job = jobs[0]
    if job.get("apiVersion") != API_VERSION:
        raise BadInput(f"{path}: apiVersion is {job.get('apiVersion')!r}; expected {API_VERSION}")
    try:
        # Strictly, from JSON: a quoted number is no number to the apiserver, and is one to pydantic otherwise.
        spec = FineTuneJobSpec.model_validate_json(json.dumps(job.get("spec", {}), default=str), strict=True)
    except ValidationError as error:
        raise BadInput(f"{path}: " + "; ".join(problems(error))) from error
    metadata = job.get("metadata")
    return str(metadata.get("name", path.stem) if isinstance(metadata, dict) else path.stem), spec


def problems(error: ValidationError) -> Iterator[str]:
    """One line each, by the field's path in the YAML."""
    for problem in error.errors():
        found: Any = problem.get("input")
        shown = f" (found {found!r})" if isinstance(found, str | int | float | bool) else ""
        yield ".".join(["spec", *map(str, problem["loc"])]) + f": {problem['msg']}{shown}"
