"""Images without a registry: build them from the Dockerfile, and load into every node only what it does not have yet."""

import hashlib
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from finetune_cluster.archive import add_bytes, full_name, index_of, make_image
from finetune_cluster.baseimage import CERTIFICATES, ensure_base_image
from finetune_cluster.buildstore import StoredImage, StoredLayer, buildah, find_image, images_root, tags
from finetune_cluster.console import ClusterError, step
from finetune_cluster.containerd import (
    blobs,
    ctr,
    image_names,
    import_archive,
    import_stream,
    snapshots,
    wait_containerd,
)
from finetune_cluster.instance import Instance
from finetune_cluster.locks import locked
from finetune_cluster.packages import IMAGES, ensure_packages
from finetune_cluster.paths import checkout_root
from finetune_cluster.processes import node_inits

UV_CACHE = "root/.cache/uv"  # the Dockerfile's cache mount
DROP_ABOVE = 64 << 20  # layers this big are dropped from the content store once they are unpacked

__all__ = ["build", "ensure_base_image", "full_name", "has_image", "layers_to_move", "load", "make_image", "tags"]


def build(
    target: str | None,
    tag: str,
    *,
    context: Path | None = None,
    dockerfile: Path | None = None,
    arguments: Mapping[str, str] | None = None,
    show: bool = False,
) -> str:
    """Build one target of the Dockerfile (default: the checkout's) on our base image, and return its tag.

    Unchanged layers come from earlier builds. The host's CA bundle, pip configuration and uv cache serve the build and are not in the image.
    """
    ensure_packages(IMAGES)
    with locked(images_root() / ".lock", "the image store"):
        buildah("rm", "--all")  # of builds that were killed
        base = ensure_base_image()
        _share_uv_cache()
        folder = context or checkout_root()
        command: list[str | Path] = [
            "build",
            "--layers",
            "--isolation=chroot",
            "--network=host",
            "--pull=never",
            "--format=oci",
        ]
        command += [f"--file={dockerfile or folder / 'Dockerfile'}", f"--tag={tag}", f"--build-arg=BASE_IMAGE={base}"]
        command += [f"--build-arg={name}={value}" for name, value in (arguments or {}).items()]
        command += [f"--target={target}"] if target else []
        command += [f"--volume={_certificates()}:{CERTIFICATES}:ro", "--unsetenv=SSL_CERT_FILE", "--unsetenv=PIP_CERT"]
        with step(f"Building image {tag}"):
            buildah(*command, folder, show=show)
    return tag


def has_image(instance: Instance, image: str) -> bool:
    """Whether every node has the image of that name."""
    return all(full_name(image) in image_names(init) for init in node_inits(instance).values())


def load(instance: Instance, images: Iterable[str | Path]) -> None:
    """Put images into the containerd of every node: tags of our store, or docker or OCI archives (paths)."""
    inits = node_inits(instance)
    if not inits:
        raise ClusterError(f"Cluster {instance.name} has no running node. Run `up` first.")
    for image in images:
        for init in inits.values():
            _load(init, image)


def _load(init: int, image: str | Path) -> None:
    wait_containerd(init)
    if isinstance(image, Path) or image.endswith(".tar"):
        with step(f"Importing {image}"):
            import_archive(init, Path(image))
        return
    stored = find_image(image)
    if not stored:
        raise ClusterError(f"No image {image!r} in the store, which has: {', '.join(tags()) or 'none'}.")
    missing = layers_to_move(init, stored)
    size = sum(layer.size for layer in missing)
    with step(f"Loading {image}: {len(missing)} of {len(stored.layers)} layers, {size / 1e6:.0f} MB"):
        import_stream(init, lambda stream: _write_archive(stream, stored, missing))
        big = {layer.digest for layer in stored.layers if layer.size > DROP_ABOVE}
        # Unpacked, a layer is not needed any more: without this the trainer's 6 GB would lie on the disk once more a node.
        for digest in sorted(big & blobs(init)):
            ctr(init, "content", "rm", digest)


def layers_to_move(init: int, image: StoredImage) -> list[StoredLayer]:
    """The layers that the node with this PID 1 has neither as a blob nor unpacked."""
    have, unpacked = blobs(init), snapshots(init)
    return [
        layer
        for layer, chain in zip(image.layers, image.chain, strict=True)
        if layer.digest not in have and chain not in unpacked
    ]


def _write_archive(stream: IO[bytes], image: StoredImage, layers: Sequence[StoredLayer]) -> None:
    with tarfile.open(fileobj=stream, mode="w|", bufsize=1 << 20) as tar:
        add_bytes(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        add_bytes(tar, "index.json", index_of([(image.tag, image.reference)]))
        for blob in (image.manifest, image.config):
            add_bytes(tar, f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob)
        for layer in layers:
            entry = tarfile.TarInfo(f"blobs/sha256/{layer.digest.removeprefix('sha256:')}")
            entry.size = layer.size
            # tarfile would want to read the layer; it is written instead, in the order that tarfile itself uses.
            stream_of = tar.fileobj
            assert stream_of is not None
            stream_of.write(entry.tobuf(tar.format))
            layer.write_to(stream_of)  # type: ignore[arg-type]
            stream_of.write(b"\0" * (-layer.size % tarfile.BLOCKSIZE))


def _share_uv_cache() -> None:
    """Let the Dockerfile's cache mount be the host's uv cache, so that what `uv sync` fetched is not fetched again.

    buildah keeps cache mounts below TMPDIR by their target; a link there leads it to the host's.
    """
    link = images_root() / "tmp" / "buildah-cache" / UV_CACHE
    cache = Path(os.environ.get("UV_CACHE_DIR", "~/.cache/uv")).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(cache)


def _certificates() -> str:
    return os.environ.get("SSL_CERT_FILE") or CERTIFICATES
