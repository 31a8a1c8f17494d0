"""Entry point of ``python -m finetune_cluster``."""

from finetune_cluster.cli import main

main()
