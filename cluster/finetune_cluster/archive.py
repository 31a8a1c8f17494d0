"""Images made of a few files, without a builder: one layer, written as an OCI archive that containerd imports."""

import hashlib
import io
import json
import os
import platform
import tarfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTENT_TAG_LENGTH = 12
LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def content_tag(*files: Path) -> str:
    """A tag that changes with the files' content, so that an image never is stale and IfNotPresent does."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:CONTENT_TAG_LENGTH]


def make_image(
    archive: Path,
    tag: str,
    files: Mapping[str, Path],
    entrypoint: Sequence[str],
    *,
    user: str = "65532",
    env: Mapping[str, str] | None = None,
    folders: Mapping[str, int] | None = None,
) -> Path:
    """Write an OCI archive of one uncompressed layer.

    ``files`` maps absolute paths in the image to files here (made executable); ``folders`` are made with their modes (default: ``/tmp``,
    world-writable). The result depends on the input only.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    own = f"{os.getpid()}-{threading.get_ident()}"  # others may write the same archive now
    layer_file = archive.with_suffix(f".{own}.layer")
    with tarfile.open(layer_file, "w") as layer:
        wanted = {"/tmp": 0o1777, **(folders or {})}
        parents = {str(parent) for path in (*files, *wanted) for parent in Path(path).parents} - {"/"}
        for folder in sorted(parents | set(wanted)):
            layer.addfile(_entry(folder, wanted.get(folder, 0o755), directory=True))
        for path, source in sorted(files.items()):
            entry = _entry(path, 0o755)
            entry.size = source.stat().st_size
            with source.open("rb") as stream:
                layer.addfile(entry, stream)
    digest, size = _digest(layer_file), layer_file.stat().st_size
    config = json.dumps(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
            "os": "linux",
            "config": {
                "Entrypoint": list(entrypoint),
                "User": user,
                "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/", *(f"{k}={v}" for k, v in (env or {}).items())],
            },
            "rootfs": {"type": "layers", "diff_ids": [digest]},
        }
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, config),
            "layers": [{"mediaType": LAYER, "digest": digest, "size": size}],
        }
    ).encode()
    temporary = archive.with_suffix(f".{own}.partial")
    with tarfile.open(temporary, "w") as tar:
        add_bytes(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        add_bytes(tar, "index.json", index_of([(tag, descriptor(MANIFEST, manifest))]))
        for blob in (config, manifest):
            add_bytes(tar, f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob)
        entry = _entry(f"blobs/sha256/{digest.removeprefix('sha256:')}", 0o644)
        entry.size = size
        with layer_file.open("rb") as stream:
            tar.addfile(entry, stream)
    layer_file.unlink()
    temporary.replace(archive)
    return archive


def index_of(manifests: Sequence[tuple[str, dict[str, object]]]) -> bytes:
    """index.json of an OCI layout; containerd takes an image's full name from its own annotation."""
    named = [
        {
            **manifest,
            "annotations": {
                "io.containerd.image.name": full_name(tag),
                "org.opencontainers.image.ref.name": tag.rpartition(":")[2],
            },
        }
        for tag, manifest in manifests
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": named}).encode()


def full_name(tag: str) -> str:
    """The name that Kubernetes looks an image up by: with registry and tag."""
    first, slash, _ = tag.partition("/")
    name = tag
    if not slash:
        name = f"docker.io/library/{tag}"
    elif "." not in first and ":" not in first and first != "localhost":
        name = f"docker.io/{tag}"
    return name if ":" in name.rpartition("/")[2] or "@" in name else f"{name}:latest"


def descriptor(media_type: str, content: bytes) -> dict[str, object]:
    """How one blob points at another."""
    return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}


def add_bytes(tar: tarfile.TarFile, path: str, content: bytes) -> None:
    """Add a file to a tar."""
    entry = _entry(path, 0o644)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _entry(path: str, mode: int, *, directory: bool = False) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path.lstrip("/"))
    entry.mode, entry.type = mode, tarfile.DIRTYPE if directory else tarfile.REGTYPE
    return entry


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
