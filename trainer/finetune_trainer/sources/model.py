"""The base model: where it lives, which files of it are needed, and its shapes without its weights."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from finetune_api import names
from finetune_api.failures import Reason
from finetune_api.spec import InitialAdapter, Model, WeightedAdapter
from finetune_api.uris import HubLocation, PvcLocation, S3Location, parse_uri
from finetune_trainer.context import PodContext, StageContext
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.s3 import S3Store, connect
from finetune_trainer.s3_transfer import OnBytes
from finetune_trainer.sources.hub import HubFile, HubRepository, remove_download_notes
from finetune_trainer.sources.pvc import pvc_path
from finetune_trainer.weight_files import INDEX, SINGLE

CONFIG_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
CODE_PATTERNS = ("*.py",)
FIRST_READ_BYTES = 128 << 10
MAX_HEADER_BYTES = 100_000_000
SAMPLES, SAMPLE_BYTES = 256, 4096
"""Of a file in a volume: a megabyte, spread evenly. Other weights differ everywhere."""

Shape = tuple[int, ...]
TensorHeaders = dict[str, tuple[str, Shape]]


@dataclass(frozen=True)
class ModelFile:
    """A needed file of the model folder; ``sha256`` where the source knows it without reading the file."""

    path: str
    size: int
    sha256: str | None = None


class ModelSource(ABC):
    """A base model. Only top-level files that training needs exist for it: no pickles, no other formats."""

    def __init__(self, uri: str, trust_remote_code: bool) -> None:
        self.uri = uri
        self.commit: str | None = None
        self._patterns = CONFIG_PATTERNS + (CODE_PATTERNS if trust_remote_code else ())
        self._weights: list[str] | None = None

    def list_files(self, *, weights: bool = True) -> list[ModelFile]:
        """The files that :meth:`fetch` would bring, in order of their names."""
        weight_files = set(self.weight_files())
        found = [f for f in self._all_files() if self._is_config(f.path) or (weights and f.path in weight_files)]
        return sorted(found, key=lambda f: f.path)

    def file_names(self) -> list[str]:
        """All files at the top of the folder, needed or not."""
        return sorted(f.path for f in self._all_files())

    def fetch(self, dest: Path, *, weights: bool, on_bytes: OnBytes | None = None) -> Path:
        """The local model folder: ``dest``, or where the model lies already (pvc://).

        Raises:
            StageError: what the source raises (see :func:`resolve_model`).
        """
        dest.mkdir(parents=True, exist_ok=True)
        for file in self.list_files(weights=weights):
            self._fetch_file(file.path, dest, on_bytes)
        return dest

    def fetch_files(self, files: list[str], dest: Path) -> Path:
        """The local folder that has these: ``dest``, or where they lie already (pvc://).

        Raises:
            StageError: ModelNotFound, if one is missing.
        """
        missing = set(files) - {f.path for f in self._all_files()}
        if missing:
            raise StageError(Reason.MODEL_NOT_FOUND, f"{self.uri} has no {' and no '.join(sorted(missing))}")
        dest.mkdir(parents=True, exist_ok=True)
        for file in files:
            self._fetch_file(file, dest, None)
        return dest

    def weight_files(self) -> list[str]:
        """Names of the safetensors files, chosen as transformers chooses them.

        Raises:
            StageError: UnsupportedModel without safetensors weights.
        """
        if self._weights is None:
            self._weights = self._find_weights({f.path for f in self._all_files()})
        return self._weights

    def safetensors_headers(self) -> TensorHeaders:
        """dtype and shape of every tensor, read from the files' headers only."""
        headers: TensorHeaders = {}
        for path in self.weight_files():
            try:
                headers |= self._header(path)
            except NotFound:
                raise StageError(Reason.UNSUPPORTED_MODEL, f"{self.uri} lacks {path}, which its index names") from None
        return headers

    def _find_weights(self, present: set[str]) -> list[str]:
        if SINGLE in present:
            return [SINGLE]
        if INDEX in present:
            try:
                weight_map = json.loads(self._read(INDEX, 0, MAX_HEADER_BYTES))["weight_map"]
                return sorted(set(weight_map.values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise StageError(
                    Reason.UNSUPPORTED_MODEL, f"{self.uri}: {INDEX} is not a safetensors index ({error})"
                ) from error
        others = sorted(p for p in present if p.endswith((".bin", ".pth", ".pt", ".gguf", ".safetensors")))
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"{self.uri} has no {SINGLE} or {INDEX}; it has {', '.join(others[:5]) or 'no weights at all'}",
        )

    def _header(self, path: str) -> TensorHeaders:
        start = self._read(path, 0, FIRST_READ_BYTES)
        if len(start) < 8:
            raise StageError(
                Reason.UNSUPPORTED_MODEL, f"{self.uri}: {path} is not a safetensors file (only {len(start)} bytes)"
            )
        (length,) = struct.unpack("<Q", start[:8])
        if length > MAX_HEADER_BYTES:
            raise StageError(
                Reason.UNSUPPORTED_MODEL, f"{self.uri}: {path} is not a safetensors file (header of {length} bytes)"
            )
        text = start[8 : 8 + length] if length + 8 <= len(start) else self._read(path, 8, length)
        try:
            entries = json.loads(text)
            return {n: (e["dtype"], tuple(e["shape"])) for n, e in entries.items() if n != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StageError(
                Reason.UNSUPPORTED_MODEL, f"{self.uri}: {path} has a broken safetensors header ({error})"
            ) from error

    def _is_config(self, path: str) -> bool:
        return path == INDEX or ("/" not in path and any(fnmatch.fnmatchcase(path, p) for p in self._patterns))

    def version(self, path: str) -> str | None:  # noqa: ARG002
        """What differs if a file was changed, where the source tells it without the file being read (see SourceFile)."""
        return None

    @abstractmethod
    def _all_files(self) -> list[ModelFile]: ...

    @abstractmethod
    def _fetch_file(self, path: str, dest: Path, on_bytes: OnBytes | None) -> None: ...

    @abstractmethod
    def _read(self, path: str, start: int, length: int) -> bytes: ...


class HubModel(ModelSource):
    """hf://organisation/name at one commit."""

    def __init__(self, uri: str, trust_remote_code: bool, repository: HubRepository, scratch: Path) -> None:
        super().__init__(uri, trust_remote_code)
        self._repository = repository
        self._scratch = scratch
        self.commit = repository.commit
        self._files: dict[str, HubFile] = {f.path: f for f in repository.files}

    def fetch(self, dest: Path, *, weights: bool, on_bytes: OnBytes | None = None) -> Path:
        super().fetch(dest, weights=weights, on_bytes=on_bytes)
        remove_download_notes(dest)
        return dest

    def _all_files(self) -> list[ModelFile]:
        return [ModelFile(f.path, f.size, f.sha256) for f in self._files.values()]

    def _fetch_file(self, path: str, dest: Path, on_bytes: OnBytes | None) -> None:
        self._repository.download(self._files[path], dest, on_bytes)

    def _read(self, path: str, start: int, length: int) -> bytes:
        # Only the index is read this way: huggingface_hub has its own reader of headers.
        local = self._repository.download(self._files[path], self._scratch / "model-index", None)
        return local.read_bytes()[start : start + length]

    def _header(self, path: str) -> TensorHeaders:
        if path not in self._files:
            raise NotFound(path)
        return self._repository.safetensors_header(path)


class S3Model(ModelSource):
    """s3://bucket/prefix of a model folder."""

    def __init__(self, uri: str, trust_remote_code: bool, store: S3Store) -> None:
        super().__init__(uri, trust_remote_code)
        self._store = store
        found = [i for i in store.list() if "/" not in i.key]
        self._files = [ModelFile(i.key, i.size) for i in found]
        self._etags = {i.key: i.etag for i in found}
        if not self._files:
            raise StageError(Reason.MODEL_NOT_FOUND, f"there is nothing below {uri}/")

    def version(self, path: str) -> str | None:
        return self._etags.get(path)

    def _all_files(self) -> list[ModelFile]:
        return self._files

    def _fetch_file(self, path: str, dest: Path, on_bytes: OnBytes | None) -> None:
        if not (dest / path).is_file():
            self._store.download_file(path, dest / path, on_bytes)
        elif on_bytes is not None:
            on_bytes((dest / path).stat().st_size)  # from an earlier try

    def _read(self, path: str, start: int, length: int) -> bytes:
        return self._store.read_range(path, start, length)


class FolderModel(ModelSource):
    """pvc://claim/path: used where it lies."""

    def __init__(self, uri: str, trust_remote_code: bool, folder: Path) -> None:
        super().__init__(uri, trust_remote_code)
        self._folder = folder
        if not folder.is_dir():
            raise StageError(Reason.MODEL_NOT_FOUND, f"{uri} is not a folder in the volume")

    def fetch(self, dest: Path, *, weights: bool, on_bytes: OnBytes | None = None) -> Path:  # noqa: ARG002
        if weights:
            self.weight_files()
        return self._folder

    def fetch_files(self, files: list[str], dest: Path) -> Path:  # noqa: ARG002
        missing = [name for name in files if not (self._folder / name).is_file()]
        if missing:
            raise StageError(Reason.MODEL_NOT_FOUND, f"{self.uri} has no {' and no '.join(missing)}")
        return self._folder

    def version(self, path: str) -> str | None:
        size = (self._folder / path).stat().st_size
        digest = hashlib.sha256()
        for sample in range(SAMPLES):
            digest.update(self._read(path, sample * size // SAMPLES, SAMPLE_BYTES))
        return digest.hexdigest()

    def _all_files(self) -> list[ModelFile]:
        return [ModelFile(p.name, p.stat().st_size) for p in sorted(self._folder.iterdir()) if p.is_file()]

    def _fetch_file(self, path: str, dest: Path, on_bytes: OnBytes | None) -> None:  # noqa: ARG002
        raise AssertionError("a volume's files are used where they lie")

    def _read(self, path: str, start: int, length: int) -> bytes:
        try:
            with (self._folder / path).open("rb") as file:
                file.seek(start)
                return file.read(length)
        except FileNotFoundError:
            raise NotFound(path) from None


def resolve_model(ctx: StageContext, commit: str | None = None) -> ModelSource:
    """Find the base model. Later stages pass the ``commit`` that prepare resolved, so that a moved branch changes nothing.

    Raises:
        StageError: as :func:`resolve_source`.
    """
    spec = ctx.snapshot.spec.model
    return resolve_source(ctx, names.MODEL_SLOT, spec, commit or spec.revision, spec.trust_remote_code)


def resolve_source(
    ctx: PodContext,
    slot: str,
    source: Model | InitialAdapter | WeightedAdapter,
    revision: str | None,
    trust_remote_code: bool = False,
) -> ModelSource:
    """A folder with a model, or an adapter of one.

    Raises:
        StageError: ModelNotFound, GatedModel, AccessDenied, BucketNotFound, UnsupportedModel for good; HubUnavailable,
            StorageUnavailable, SecretMissing while they last.
    """
    credentials = ctx.credentials(slot, source)
    location = parse_uri(source.uri)
    if isinstance(location, HubLocation):
        repository = HubRepository(location.repo_id, "model", revision, credentials).resolve()
        return HubModel(source.uri, trust_remote_code, repository, ctx.work_dir / "scratch")
    if isinstance(location, S3Location):
        return S3Model(source.uri, trust_remote_code, connect(location, credentials, ctx.work_dir / "scratch"))
    assert isinstance(location, PvcLocation)  # the spec's pattern allows nothing else
    return FolderModel(source.uri, trust_remote_code, pvc_path(ctx.pvc_dir, location, Reason.MODEL_NOT_FOUND))
