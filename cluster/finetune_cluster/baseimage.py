"""A Debian base image with Python 3.11, made from the Debian archive: there may be no registry to pull one from."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from finetune_cluster.buildstore import ALONE, buildah, find_image, images_root
from finetune_cluster.console import run, step

SUITE = "bookworm"
PACKAGES = ("python3", "python3-venv", "ca-certificates")
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# Not needed in a container, and a third of the size.
CLUTTER = (
    "var/cache/apt/*",
    "var/lib/apt/lists/*",
    "var/log/*",
    "usr/share/doc/*",
    "usr/share/man/*",
    "usr/share/locale/*",
    "usr/share/info/*",
    "usr/share/zoneinfo/right",
)
VERSION = 1  # count up when this file makes another image of the same packages


def ensure_base_image() -> str:
    """Tag of the base image in our store; made on the first call (1 min)."""
    key = hashlib.sha256(repr((SUITE, PACKAGES, CLUTTER, VERSION)).encode()).hexdigest()[:12]
    tag = f"localhost/finetune-base:{key}"
    if find_image(tag):
        return tag
    images_root().mkdir(parents=True, exist_ok=True)
    for stale in images_root().glob("debootstrap-*"):  # of a killed build: the caller holds the store's lock
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(dir=images_root(), prefix="debootstrap-") as name:
        folder = Path(name)
        with step(f"Making the base image of Debian {SUITE} with {', '.join(PACKAGES)}"):
            run([*ALONE, "debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, folder / "root"])
            for pattern in CLUTTER:
                for path in (folder / "root").glob(pattern):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            container = buildah("from", "scratch").strip()
            try:
                buildah("add", "--quiet", container, folder / "root", "/")
                # The build needs the host's certificates where registries sit behind a private authority: they are mounted over this file.
                variables = [f"{name}={CERTIFICATES}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
                buildah("config", *(f"--env={variable}" for variable in variables), "--cmd", "/bin/sh", container)
                buildah("commit", "--quiet", container, tag)
            finally:
                buildah("rm", container)
    return tag
