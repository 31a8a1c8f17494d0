"""Data sources as local files, in a fixed order."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from finetune_api.failures import Reason
from finetune_api.spec import DataSource
from finetune_api.uris import HttpsLocation, HubLocation, PvcLocation, S3Location, parse_uri
from finetune_trainer.context import StageContext
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.s3 import connect
from finetune_trainer.s3_transfer import OnBytes
from finetune_trainer.sources.hub import HubFile, HubRepository, remove_download_notes
from finetune_trainer.sources.pvc import pvc_path
from finetune_trainer.sources.web import download_url
from finetune_trainer.text import readable

DATA_FILE = re.compile(r".+\.(jsonl|ndjson|json|csv|parquet)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
# A dataset repository's own notes, which end in .json too.
NO_DATA = re.compile(r"(^|/)(dataset_infos?\.json|\.[^/]*|state\.json|README[^/]*)$", re.IGNORECASE)


@dataclass(frozen=True)
class DataFile:
    """A local data file, and the name by which messages call it (the last part of its path)."""

    path: Path
    name: str


def fetch_data(
    ctx: StageContext, source: DataSource, slot: str, folder: Path, on_bytes: OnBytes | None = None
) -> list[DataFile]:
    """Bring one source's files into ``folder`` (a volume's files are used where they lie), sorted by their paths.

    Raises:
        StageError: DatasetNotFound, BucketNotFound, AccessDenied for good; StorageUnavailable, HubUnavailable, SecretMissing.
    """
    credentials = ctx.credentials(slot, source)
    location = parse_uri(source.uri)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(location, S3Location):
        return _from_s3(source.uri, location, credentials, folder, on_bytes)
    if isinstance(location, HubLocation):
        return _from_hub(source, location, credentials, folder, on_bytes)
    if isinstance(location, HttpsLocation):
        return _from_web(location, credentials, folder, on_bytes)
    return _from_volume(source.uri, location, ctx.pvc_dir)


def _from_s3(
    uri: str, location: S3Location, credentials: Credentials, folder: Path, on_bytes: OnBytes | None
) -> list[DataFile]:
    store = connect(location, credentials, folder)
    if not uri.endswith("/"):
        name = location.key.rsplit("/", 1)[-1]
        try:
            return [_once(folder / name, name, lambda path: store.download_file("", path, on_bytes))]
        except NotFound:
            # Without the closing slash a folder was meant perhaps.
            pass
    keys = _choose([info.key for info in store.list()], uri)
    return [_once(folder / key, key, partial(store.download_file, key, on_bytes=on_bytes)) for key in keys]


def _from_hub(
    source: DataSource, location: HubLocation, credentials: Credentials, folder: Path, on_bytes: OnBytes | None
) -> list[DataFile]:
    repository = HubRepository(location.repo_id, "dataset", source.revision, credentials).resolve()
    by_path: dict[str, HubFile] = {f.path: f for f in repository.files}
    if location.path in by_path:
        paths = [location.path]
    else:
        prefix = f"{location.path}/" if location.path else ""
        paths = _choose([p for p in by_path if p.startswith(prefix)], source.uri)
    files = [DataFile(repository.download(by_path[p], folder, on_bytes), p) for p in paths]
    remove_download_notes(folder)
    return files


def _from_web(
    location: HttpsLocation, credentials: Credentials, folder: Path, on_bytes: OnBytes | None
) -> list[DataFile]:
    name = unquote(urlsplit(location.url).path).rstrip("/").rsplit("/", 1)[-1] or "data"
    ca_bundle = credentials.ca_bundle(folder)
    return [
        _once(
            folder / name, name, lambda path: download_url(location.url, path, ca_bundle=ca_bundle, on_bytes=on_bytes)
        )
    ]


def _from_volume(uri: str, location: PvcLocation, pvc_dir: Path) -> list[DataFile]:
    path = pvc_path(pvc_dir, location, Reason.DATASET_NOT_FOUND)
    if path.is_file():
        return [DataFile(path, readable(path.name))]
    names = _choose([p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()], uri)
    return [DataFile(path / name, readable(name)) for name in names]


def _choose(names: list[str], uri: str) -> list[str]:
    """The data files among ``names``, sorted.

    Raises:
        StageError: DatasetNotFound, if there is none.
    """
    chosen = sorted(n for n in names if DATA_FILE.match(n) and not NO_DATA.search(n) and ".." not in n.split("/"))
    if chosen:
        return chosen
    if not names:
        raise StageError(Reason.DATASET_NOT_FOUND, f"there is nothing at {uri}")
    found = ", ".join(sorted(names)[:5])
    raise StageError(
        Reason.DATASET_NOT_FOUND,
        f"no .jsonl, .json, .csv or .parquet file (also .gz, .bz2, .xz, .zst) at {uri}; it has {found}",
    )


def _once(path: Path, name: str, fetch: Callable[[Path], object]) -> DataFile:
    """A finished file is renamed last, so one that exists is whole: a repeated wait does not fetch it again."""
    if not path.is_file():
        fetch(path)
    return DataFile(path, name)
