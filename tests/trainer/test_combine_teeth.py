"""What a combination is verified by has teeth: other modules or other bytes than were written fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.results import ADAPTER_DIR, FileRecord
from finetune_trainer.combine import measure as measuring
from finetune_trainer.combine.run import must_be_stored
from finetune_trainer.errors import StageError

KEY = f"{ADAPTER_DIR}/adapter_model.safetensors"


@pytest.mark.parametrize("change", [{"size": 4}, {"sha256": "2" * 64}])
def test_other_weights_on_disk_than_were_written_are_not_stored(change: dict[str, Any]) -> None:
    written = FileRecord(path=KEY, size=3, sha256="1" * 64)
    must_be_stored(written, [written])
    with pytest.raises(StageError, match="was written with SHA-256 1111") as caught:
        must_be_stored(written, [written.model_copy(update=change)])
    assert caught.value.reason is Reason.VERIFICATION_FAILED


@pytest.mark.parametrize("modules", [["a"], ["a", "b", "c"], ["a", "c"]])
def test_an_adapter_of_other_modules_is_no_result(monkeypatch: pytest.MonkeyPatch, modules: list[str]) -> None:
    monkeypatch.setattr(measuring, "modules_of", lambda _: {"a": (2, 2, 1), "b": (2, 2, 1)})
    found: Any = SimpleNamespace(modules=dict.fromkeys(modules, 1.0))
    spec: Any = None
    with pytest.raises(StageError, match=f"has {len(modules)} modules; 2 were written") as caught:
        measuring.measure(spec, found, [], 1, {})
    assert caught.value.reason is Reason.VERIFICATION_FAILED
