"""What a rank sends to the others while something is saved, and what it writes into the bucket: told in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from botocore.endpoint import Endpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from finetune_trainer.train import run as stage
from finetune_trainer.train.fit import Checkpointing
from finetune_trainer.train.ranks import Ranks

READING = ("Get", "Head", "List")


@dataclass
class Observed:
    """Of one rank."""

    path: Path
    sent: list[int] = field(default_factory=list)
    """Bytes of each collective's tensors, in the order in which they were begun."""
    saved: int = 0
    """How often something was saved, or could have been."""
    written: list[str] = field(default_factory=list)
    """Keys, once for each request that may change something."""

    def tell(self) -> None:
        """To whoever reads the file later; the process may be killed at any time."""
        told = {"sent": self.sent, "saved": self.saved, "written": self.written}
        self.path.write_text(json.dumps(told))


class Collectives(TorchDispatchMode):
    """Counts bytes of tensors that go to, or come from, other ranks."""

    def __init__(self, observed: Observed) -> None:
        super().__init__()
        self._observed = observed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; c10d's are the collectives."""
        out = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace:
            tensors = {id(x): x for x in tree_iter((args, kwargs, out)) if isinstance(x, torch.Tensor)}
            self._observed.sent.append(sum(x.nbytes for x in tensors.values()))
        return out


def observe(path: Path) -> None:
    """From now on, in this process. What is saved while training goes on is copied after a step's log; the adapter is stored in the turn
    of the first rank that all wait for."""
    observed = Observed(path)

    def while_saving(original: Callable[..., Any], saves: Callable[..., bool]) -> Callable[..., Any]:
        @wraps(original)
        def called(*args: Any, **kwargs: Any) -> Any:
            counted = saves(*args)
            window: AbstractContextManager[Any] = Collectives(observed) if counted else nullcontext()
            with window:
                result = original(*args, **kwargs)
            observed.saved += counted
            observed.tell()
            return result

        return called

    def make_request(self: Endpoint, operation: Any, request: Any) -> Any:
        if not operation.name.startswith(READING):
            observed.written.append(f"{operation.name} {request['url_path']}")
            observed.tell()
        return requested(self, operation, request)

    requested = Endpoint.make_request
    Endpoint.make_request = make_request  # type: ignore[method-assign]
    Checkpointing.on_log = while_saving(Checkpointing.on_log, lambda *_: True)  # type: ignore[method-assign]
    Ranks.share = while_saving(  # type: ignore[method-assign]
        Ranks.share, lambda _, make: getattr(make, "func", None) is stage.store_trained
    )
