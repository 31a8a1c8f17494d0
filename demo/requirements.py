"""Writes images/requirements-*.txt from uv.lock: what each image installs, by version and hash.

A Dockerfile layer that depends on these files alone is rebuilt when a locked package changes, not when pyproject.toml's
tool settings do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from demo.target import ROOT

EXTRAS = ("operator", "prepare", "trainer")


def exported(extra: str) -> str:
    """The locked requirements of one extra."""
    command = ["uv", "export", "--quiet", "--frozen", "--no-dev", "--no-default-groups", "--extra", extra]
    command += ["--no-emit-project", "--no-header", "--no-annotate"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a file differs from what would be written")
    check = parser.parse_args().check
    for extra in EXTRAS:
        path = ROOT / "images" / f"requirements-{extra}.txt"
        if not check:
            path.write_text(exported(extra))
        elif path.read_text() != exported(extra):
            sys.exit(f"{path.relative_to(ROOT)} is stale: run `make generate`")


if __name__ == "__main__":
    main()
