"""What every benchmark has: ``--json``, and the file that its figures are written to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A benchmark's arguments, to which it adds its own.

    Args:
        doc: its module's docstring, which ``--help`` prints.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser


def write(path: Path | None, figures: Mapping[str, object]) -> None:
    """The figures as JSON, if they are asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
