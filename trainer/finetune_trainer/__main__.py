"""``python -m finetune_trainer``."""

import sys

from finetune_trainer.entrypoint import main

sys.exit(main())
