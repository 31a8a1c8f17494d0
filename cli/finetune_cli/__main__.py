"""``python -m finetune_cli`` and the console script ``finetune``."""

from __future__ import annotations

import typer

from finetune_cli.plan import plan_command

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Fine-tuning jobs from the command line.")
app.command("plan")(plan_command)


@app.callback()
def callback() -> None:
    """Keeps ``plan`` a command of its own while it is the only one."""


def main() -> None:
    """Run."""
    app()


if __name__ == "__main__":
    main()
