"""The Hugging Face Hub through huggingface_hub, with its errors in the words of the failure table.

The endpoint, revision and token are always passed explicitly: nothing is taken from the user's home or the environment by
accident. huggingface_hub 2.4 resumes a broken transfer by itself, but checks only its size: hashes are checked here.
"""

from __future__ import annotations

import hashlib
import shutil
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import hf_request_event_hook
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from finetune_api.failures import Reason
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.s3_transfer import CHUNK_BYTES, OnBytes

PUBLIC_ENDPOINT = "https://huggingface.co"
TIMEOUT_SECONDS = 10.0
SHA256_HEX = 64


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. LFS files are known by SHA-256, others by git's blob id."""

    path: str
    size: int
    sha256: str | None
    blob_id: str | None


class HubRepository:
    """One revision of a model or dataset repository."""

    def __init__(self, repo_id: str, repo_type: str, revision: str | None, credentials: Credentials) -> None:
        self.repo_id = repo_id
        self.repo_type = repo_type
        self._wanted = revision
        self._credentials = credentials
        self.commit = ""
        self.files: list[HubFile] = []

    def resolve(self) -> HubRepository:
        """Find the commit and its files.

        Raises:
            StageError: ModelNotFound or DatasetNotFound, GatedModel, AccessDenied, HubUnavailable, SecretMissing.
        """
        api = self._api()
        with self.translated():
            info: Any = api.repo_info(
                self.repo_id,
                repo_type=self.repo_type,
                revision=self._wanted,
                files_metadata=True,
                timeout=TIMEOUT_SECONDS,
            )
        self.commit = info.sha or ""
        self.files = [
            HubFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id) for s in info.siblings or []
        ]
        return self

    def download(self, file: HubFile, folder: Path, on_bytes: OnBytes | None) -> Path:
        """``folder/file.path``, checked against the Hub's hash; an intact copy from before is kept."""
        path = folder / file.path
        if path.is_file() and _intact(path, file):
            return path
        _, endpoint = self._credentials.hub()
        # Xet fetches from its own servers, past a mirror.
        if (endpoint or constants.ENDPOINT).rstrip("/") != PUBLIC_ENDPOINT:
            constants.HF_HUB_DISABLE_XET = True
        for attempt in (1, 2):
            with self.translated():
                hf_hub_download(
                    self.repo_id,
                    file.path,
                    repo_type=self.repo_type,
                    revision=self.commit,
                    local_dir=folder,
                    token=self._token(),
                    endpoint=endpoint,
                    force_download=attempt > 1,
                    tqdm_class=_progress_class(on_bytes),
                )
            if _intact(path, file):
                return path
            if on_bytes is not None:
                on_bytes(-path.stat().st_size)
        path.unlink()
        raise StageError(
            Reason.HUB_UNAVAILABLE, f"{file.path} of {self} arrived twice with another hash than the Hub names"
        )

    def safetensors_header(self, path: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names, dtypes and shapes of a safetensors file, by ranged reads."""
        with self.translated():
            meta = self._api().parse_safetensors_file_metadata(
                self.repo_id, path, repo_type=self.repo_type, revision=self.commit, timeout=TIMEOUT_SECONDS
            )
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in meta.tensors.items()}

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the Hub's errors into StageError, and a missing file into NotFound."""
        try:
            yield
        except (
            HfHubHTTPError,
            EntryNotFoundError,
            FileMetadataError,
            HFValidationError,
            httpx2.HTTPError,
            OSError,
        ) as error:
            raise self._translate(error) from error

    def __str__(self) -> str:
        return f"hf://{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"

    def _api(self) -> HfApi:
        trust(self._credentials.values().get("AWS_CA_BUNDLE"))
        return HfApi(endpoint=self._credentials.hub()[1], token=self._token())

    def _token(self) -> str | bool:
        return self._credentials.hub()[0] or False

    def _translate(self, error: Exception) -> Exception:
        missing = Reason.MODEL_NOT_FOUND if self.repo_type == "model" else Reason.DATASET_NOT_FOUND
        token = "the token in the Secret" if self._token() else "a request without token"
        if isinstance(error, GatedRepoError):
            reason = Reason.GATED_MODEL if self.repo_type == "model" else Reason.ACCESS_DENIED
            return StageError(reason, f"{self} is gated, and {token} may not read it")
        if isinstance(error, RepositoryNotFoundError):
            return StageError(missing, f"{self} does not exist, or is private and {token} may not read it")
        if isinstance(error, RevisionNotFoundError):
            return StageError(missing, f"{self} has no revision {self._wanted!r}")
        if isinstance(error, LocalEntryNotFoundError):
            return self._unavailable(error.__cause__ or error)
        if isinstance(error, EntryNotFoundError):
            return NotFound(str(self))
        if isinstance(error, HFValidationError):
            return StageError(Reason.INVALID_CONFIG, f"{self}: {error}")
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            if status in (401, 403):
                return StageError(Reason.ACCESS_DENIED, f"{self}: {token} was refused ({status} {_first_line(error)})")
            if status in (408, 429) or status >= 500:
                return self._unavailable(error)
            return StageError(missing, f"{self}: {_first_line(error)}")
        if isinstance(error, OSError) and error.errno is not None:
            return error  # the local disk
        return self._unavailable(error)

    def _unavailable(self, error: BaseException) -> StageError:
        endpoint = self._credentials.hub()[1] or constants.ENDPOINT
        return StageError(Reason.HUB_UNAVAILABLE, f"cannot read {self} from {endpoint}: {_first_line(error)}")


_trusted: set[str] = set()


def trust(ca_bundle: str | None) -> None:
    """Make huggingface_hub trust a private CA too (PEM text or a path). It has one client for all repositories."""
    if not ca_bundle or ca_bundle in _trusted:
        return
    _trusted.add(ca_bundle)
    context = ssl.create_default_context()
    for known in _trusted:
        context.load_verify_locations(**{"cadata" if "BEGIN CERTIFICATE" in known else "cafile": known})
    hooks = {"request": [hf_request_event_hook]}
    set_client_factory(lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None, verify=context))


def remove_download_notes(folder: Path) -> None:
    """huggingface_hub's notes on a finished download: no part of the model."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _intact(path: Path, file: HubFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    known = file.sha256 or file.blob_id
    if known is None:
        return True
    digest: Any
    if file.sha256 is not None or len(known) == SHA256_HEX:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(usedforsecurity=False)  # git's name of a blob
    if file.sha256 is None:
        digest.update(f"blob {file.size}\0".encode())
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
    return bool(digest.hexdigest() == known)


def _progress_class(on_bytes: Callable[[int], None] | None) -> type[hub_tqdm]:
    """huggingface_hub tells its progress to a tqdm class; this one draws nothing."""

    class Progress(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if on_bytes is not None and n:
                on_bytes(int(n))
            return None

    return Progress


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
