"""The operator, killed by SIGKILL right after the Nth write that the API server accepted, before it can act on the answer."""

from __future__ import annotations

import os
import signal

from finetune_operator import __main__ as operator
from finetune_operator.client import Api

COUNT = int(os.environ["CRASH_AFTER_WRITES"])
_original = Api.__init__


def _armed(self: Api, *arguments: object, **options: object) -> None:
    _original(self, *arguments, **options)  # type: ignore[arg-type]
    left = COUNT

    async def count(method: str, path: str) -> None:
        nonlocal left
        if "tokenreviews" in path or "leases" in path:
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    self.after_write = count


Api.__init__ = _armed  # type: ignore[method-assign]
operator.main()
