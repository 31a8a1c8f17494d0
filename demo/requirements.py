"""Writes images/requirements-*.txt from uv.lock: what each image installs, by version and hash.

A Dockerfile layer that depends on these files alone is rebuilt when a locked package changes, not when pyproject.toml's
tool settings do.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

from demo.target import ROOT

EXTRAS = ("operator", "prepare", "trainer")


def exported(extra: str, *more: str) -> str:
    """The locked requirements of one extra."""
    command = ["uv", "export", "--quiet", "--frozen", "--no-dev", "--no-default-groups", "--extra", extra]
    command += ["--no-emit-project", "--no-header", "--no-annotate", *more]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def of_tasks() -> str:
    """What lm-eval needs beyond the trainer's own, which it is installed beside, in another folder."""
    trainer = set(requirements(exported("trainer")))
    return "".join(r for r in requirements(exported("trainer", "--group", "tasks")) if r not in trainer)


def requirements(text: str) -> list[str]:
    """Each with the lines of its hashes."""
    return re.findall(r"^\S.*\n(?:[ \t].*\n)*", text, re.MULTILINE)


def main() -> None:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a file differs from what would be written")
    check = parser.parse_args().check
    wanted = {extra: exported(extra) for extra in EXTRAS} | {"tasks": of_tasks()}
    for name, text in wanted.items():
        path = ROOT / "images" / f"requirements-{name}.txt"
        if not check:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} is stale: run `make generate`")


if __name__ == "__main__":
    main()
