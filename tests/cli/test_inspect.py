"""``finetune inspect`` shows what prepare makes of the data, and fails as prepare would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from finetune_cli.__main__ import app
from tests.support.prepare_bench import ROWS, lines, row
from tests.support.tiny_model import build_tiny_model

USABLE, BAD_INPUT, UNUSABLE = 0, 2, 3


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    build_tiny_model(folder / "models" / "tiny")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text(lines(ROWS))
    (folder / "data" / "bad.jsonl").write_text(lines([*ROWS, {"messages": []}]))
    return folder


def inspect(
    tmp_path: Path, volumes: Path, *options: str, data: str = "train", spec_data: Any = None, **spec: Any
) -> Result:
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "support-tone"},
        "spec": {
            "model": {"uri": "pvc://models/tiny"},
            "data": spec_data
            or {"train": [{"uri": f"pvc://data/{data}.jsonl", "secretRef": {"name": "nobody-reads-it"}}]},
            "training": {"useCpu": True},
            "output": {"uri": "s3://no-such-bucket/out", "secretRef": {"name": "nobody-reads-it"}},
            **spec,
        },
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return CliRunner().invoke(app, ["inspect", str(path), "--volumes", str(volumes), *options])


def test_rows_are_shown_token_by_token_with_what_is_learned(tmp_path: Path, volumes: Path) -> None:
    """Nothing is asked of the output's bucket, which does not exist."""
    result = inspect(tmp_path, volumes, "--rows", "2", "--json")
    assert result.exit_code == USABLE, result.output
    found = json.loads(result.stdout)
    assert [r["source"].partition(":")[0] for r in found["rows"]] == ["train.jsonl"] * 2
    for shown in found["rows"]:
        number = int(shown["source"].partition(":")[2]) - 1
        learned = "".join(t for t, is_learned in zip(shown["tokens"], shown["learned"], strict=True) if is_learned)
        assert learned == f"It is {2 * number}.<|im_end|>"
    assert found["data"]["trainRows"] + found["data"]["heldOutRows"] == len(ROWS)
    assert found["totalSteps"] == -(-3 * found["data"]["trainRows"] // 16)


def test_rows_that_a_template_writes_are_shown_as_it_writes_them(tmp_path: Path, volumes: Path) -> None:
    rows = [{"number": i, "double": 2 * i} for i in range(40)]
    (volumes / "data" / "numbers.jsonl").write_text(lines(rows))
    template = {"system": "Count.", "user": "Twice {{ number }}?", "assistant": "{{ double }}"}
    data = {"train": [{"uri": "pvc://data/numbers.jsonl", "template": template}]}
    found = json.loads(inspect(tmp_path, volumes, "--rows", "1", "--json", spec_data=data).stdout)
    [shown] = found["rows"]
    number = int(shown["source"].partition(":")[2]) - 1
    assert (
        "".join(shown["tokens"])
        .strip()
        .endswith(
            f"system\nCount.<|im_end|>\n<|im_start|>user\nTwice {number}?<|im_end|>\n<|im_start|>assistant\n{2 * number}<|im_end|>"
        )
    )
    pairs = zip(shown["tokens"], shown["learned"], strict=True)
    assert "".join(token for token, learned in pairs if learned) == f"{2 * number}<|im_end|>"


def test_people_get_text_counts_and_warnings(tmp_path: Path, volumes: Path) -> None:
    result = inspect(tmp_path, volumes, "--rows", "1")
    assert result.exit_code == USABLE, result.output
    assert "<|im_start|>user\nWhat is " in result.stdout
    assert "support-tone: 36 training rows (" in result.stdout
    assert "warning: only 40 usable rows" in result.stdout


def test_what_would_fail_the_job_fails_here_with_the_same_reason(tmp_path: Path, volumes: Path) -> None:
    result = inspect(tmp_path, volumes, data="bad")
    assert result.exit_code == UNUSABLE
    assert "bad.jsonl:41" in result.stderr
    missing = inspect(tmp_path, volumes, data="none")
    assert missing.exit_code == UNUSABLE
    assert "pvc://data/none.jsonl" in missing.stderr


def test_what_a_pod_would_wait_for_is_told_at_once(tmp_path: Path, volumes: Path) -> None:
    nowhere = {"uri": "hf://org/tiny", "endpointURL": "http://127.0.0.1:9"}
    result = inspect(tmp_path, volumes, model=nowhere)
    assert result.exit_code == UNUSABLE
    assert result.stderr.startswith("HubUnavailable: ")


def test_no_other_command_needs_the_libraries_of_a_stage() -> None:
    code = "import sys, finetune_cli.__main__; print([m for m in ('transformers', 'boto3', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_that_is_no_job_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("kind: ConfigMap\n")
    assert CliRunner().invoke(app, ["inspect", str(path)]).exit_code == BAD_INPUT


def test_a_row_of_another_shape_is_named(tmp_path: Path, volumes: Path) -> None:
    (volumes / "data" / "odd.jsonl").write_text(lines([row("a", "b"), {"text": 1}]))
    result = inspect(tmp_path, volumes, data="odd")
    assert result.exit_code == UNUSABLE
    assert "odd.jsonl:2" in result.stderr


def test_trackers_are_not_asked_and_gpus_of_nodes_not_known(tmp_path: Path, volumes: Path) -> None:
    trackers = [{"type": "WeightsAndBiases", "secretRef": {"name": "wandb"}}]
    result = inspect(tmp_path, volumes, trackers=trackers, method={"type": "Auto"}, training={"length": {"steps": 5}})
    assert result.exit_code == USABLE, result.output
    assert "The memory is not planned" in result.stdout
