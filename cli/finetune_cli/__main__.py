"""``python -m finetune_cli`` and the console script ``finetune``."""

from __future__ import annotations

import typer

from finetune_cli.inspect import inspect_command
from finetune_cli.plan import plan_command

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Fine-tuning jobs from the command line.")
app.command("plan")(plan_command)
app.command("inspect")(inspect_command)


def main() -> None:
    """Run."""
    app()


if __name__ == "__main__":
    main()
