"""buildah's store of built images: a root of its own below the cache, read directly so that a layer needs no second copy on its way."""

import base64
import gzip
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune_cluster.archive import MANIFEST, descriptor
from finetune_cluster.console import ClusterError, run
from finetune_cluster.locks import locked
from finetune_cluster.paths import cache_root

CHUNK = 1 << 20
# In namespaces of its own: the mounts that buildah leaves behind, and what a killed build still runs, end with it.
ALONE = ("unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "nice", "-n", "10")


def images_root() -> Path:
    """Folder of built images and archives."""
    return cache_root() / "images"


def buildah(*arguments: str | Path, show: bool = False) -> str:
    """Run buildah on our store."""
    root = images_root()
    temporary = root / "tmp"  # not /tmp, which may be small or in memory; buildah's cache mounts lie here, too
    temporary.mkdir(parents=True, exist_ok=True)
    where: list[str | Path] = ["--root", root / "store", "--runroot", root / "run", "--storage-driver", "overlay"]
    env = {"TMPDIR": str(temporary), "BUILDAH_ISOLATION": "chroot", "BUILDAH_FORMAT": "oci"}
    return run([*ALONE, "buildah", *where, *arguments], env=env, show=show)


@dataclass(frozen=True)
class StoredLayer:
    """An uncompressed layer in the store."""

    digest: str
    size: int
    identity: str

    def write_to(self, stream: IO[bytes]) -> None:
        """Write the layer's tar exactly as it was hashed: the headers kept by tar-split, the contents from the unpacked files."""
        store = images_root() / "store"
        content = store / "overlay" / self.identity / "diff"
        with gzip.open(store / "overlay-layers" / f"{self.identity}.tar-split.gz") as lines:
            for line in lines:
                entry = json.loads(line)
                if entry["type"] == 2:  # raw bytes
                    stream.write(base64.b64decode(entry.get("payload", "")))
                elif entry.get("size"):
                    name = (
                        base64.b64decode(entry["name_raw"]).decode(errors="surrogateescape")
                        if "name_raw" in entry
                        else entry["name"]
                    )
                    with (content / name.lstrip("/")).open("rb") as file:
                        while block := file.read(CHUNK):
                            stream.write(block)


@dataclass(frozen=True)
class StoredImage:
    """An image in the store."""

    tag: str
    manifest: bytes
    config: bytes
    layers: tuple[StoredLayer, ...]

    @property
    def chain(self) -> list[str]:
        """Names of the unpacked layers, as the OCI image specification derives them and containerd uses them."""
        chain: list[str] = []
        for diff in json.loads(self.config)["rootfs"]["diff_ids"]:
            chain.append(diff if not chain else f"sha256:{hashlib.sha256(f'{chain[-1]} {diff}'.encode()).hexdigest()}")
        return chain

    @property
    def reference(self) -> dict[str, object]:
        """How an index points at it."""
        return descriptor(json.loads(self.manifest).get("mediaType", MANIFEST), self.manifest)


def find_image(tag: str) -> StoredImage | None:
    """The image of that tag, or None."""
    for image in _json("overlay-images/images.json"):
        if any(name in (tag, f"localhost/{tag}") for name in image.get("names") or []):
            return _read_image(tag, image)
    return None


def delete_store() -> None:
    """Delete all images."""
    with locked(images_root() / ".lock", "the image store"):
        for name in ("store", "run", "tmp"):
            shutil.rmtree(images_root() / name, ignore_errors=True)


def tags() -> list[str]:
    """All tags."""
    return sorted(name for image in _json("overlay-images/images.json") for name in image.get("names") or [])


def _read_image(tag: str, image: Mapping[str, Any]) -> StoredImage:
    folder = images_root() / "store" / "overlay-images" / image["id"]
    manifest = (folder / "manifest").read_bytes()
    parsed = json.loads(manifest)
    config = (folder / f"={base64.b64encode(parsed['config']['digest'].encode()).decode()}").read_bytes()
    layers = {layer["diff-digest"]: layer for layer in _json("overlay-layers/layers.json") if "diff-digest" in layer}
    wanted = [entry["digest"] for entry in parsed["layers"]]
    missing = [digest for digest in wanted if digest not in layers]
    if missing:
        raise ClusterError(
            f"Image {tag} has compressed layers ({missing[0]}); only images built by us can be loaded without a copy."
        )
    found = tuple(StoredLayer(digest, layers[digest]["diff-size"], layers[digest]["id"]) for digest in wanted)
    return StoredImage(tag, manifest, config, found)


def _json(path: str) -> list[dict[str, Any]]:
    file = images_root() / "store" / path
    if not file.exists():
        return []
    result: list[dict[str, Any]] = json.loads(file.read_text())
    return result
