"""``python -m finetune_trainer.tasks COMMAND FOLDER``: :mod:`~finetune_trainer.tasks.harness`, without transformers' pipelines.

The evaluate library, which lm-eval's metrics import, does without them where they are not there, and else imports all of torch with them.
"""

import sys
from pathlib import Path

sys.modules["transformers.pipelines"] = None  # type: ignore[assignment] # whoever imports it gets a ModuleNotFoundError

from finetune_trainer.tasks.harness import main  # noqa: E402
from finetune_trainer.tasks.protocol import Command  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(Command(sys.argv[1]), Path(sys.argv[2])))
