"""Libraries that peft and transformers import wherever they are installed, and that a run has no use for.

A GPU is held while they are imported: a quarter of the CPU time of all imports, and 86 MiB of memory for good (bitsandbytes 0.50
brings torch's compiler along, datasets 5.2 pandas).
"""

from __future__ import annotations

import sys

from finetune_api.optimizers import WITHOUT_BITSANDBYTES
from finetune_api.snapshot import Snapshot
from finetune_api.spec import MethodType

BITSANDBYTES, DATASETS = "bitsandbytes", "datasets"


def unused_libraries(snapshot: Snapshot) -> list[str]:
    """What this run does not use, whatever the memory plan chooses. A model's own code may import anything."""
    spec = snapshot.spec
    if spec.model.trust_remote_code:
        return []
    plain = (
        spec.method.type in (MethodType.LORA, MethodType.FULL) and spec.training.optimizer.name in WITHOUT_BITSANDBYTES
    )
    return [DATASETS, BITSANDBYTES] if plain else [DATASETS]


def leave_out(libraries: list[str]) -> None:
    """Have them count as not installed in this process: an entry of None in ``sys.modules`` is Python's own way to say so, to an import
    and to ``importlib.util.find_spec``."""
    for name in libraries:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
