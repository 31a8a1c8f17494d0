"""Files over HTTPS: streamed, resumed where the server can, never mixed from two versions."""

from __future__ import annotations

import json
import logging
import ssl
import time
from pathlib import Path

import httpx

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.private import without_credentials
from finetune_trainer.s3_transfer import IDLE_ATTEMPTS, OnBytes

log = logging.getLogger(__name__)

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
PASSING = {408, 425, 429}


def download_url(url: str, path: Path, *, ca_bundle: Path | None = None, on_bytes: OnBytes | None = None) -> None:
    """Fetch ``url`` to ``path``. A broken transfer is continued if the server names a strong ETag and serves ranges.

    Raises:
        StageError: DatasetNotFound (404, 410), AccessDenied (401, 403), HubUnavailable (no connection, 5xx) .
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = without_credentials(url)  # the query of a signed address is a key
    part, note = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    if not _note_fits(note, url):
        part.unlink(missing_ok=True)
    if part.exists() and on_bytes is not None:
        on_bytes(part.stat().st_size)
    idle = 0
    verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=str(ca_bundle)) if ca_bundle else True
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True, verify=verify) as client:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                if _fetch(client, url, part, note, on_bytes):
                    break
                cause = "the server closed the connection"
            except httpx.TransportError as error:
                cause = f"{type(error).__name__}: {error}"
            except httpx.InvalidURL as error:
                raise StageError(Reason.INVALID_CONFIG, f"{shown}: {error}") from error
            now = part.stat().st_size if part.exists() else 0
            idle = idle + 1 if now <= before else 0
            if idle >= IDLE_ATTEMPTS:
                _told(on_bytes, -now)  # counted again by whoever continues
                raise StageError(Reason.HUB_UNAVAILABLE, f"cannot read {shown}: {cause}")
            log.info("reading %s stopped at %s bytes (%s): trying again", shown, now, cause)
            time.sleep(0.2 * 2**idle)
    part.replace(path)
    note.unlink(missing_ok=True)


def _fetch(client: httpx.Client, url: str, part: Path, note: Path, on_bytes: OnBytes | None) -> bool:
    """One request; True if the file is whole now."""
    start = part.stat().st_size if part.exists() else 0
    # Offsets count the bytes on the wire, so nothing may be compressed.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": json.loads(note.read_text())["etag"]}
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416:
            part.unlink()
            _told(on_bytes, -start)
            return False
        _check(response, url)
        resumed = response.status_code == 206
        if not resumed and start:
            _told(on_bytes, -start)
            start = 0
        etag = response.headers.get("ETag")
        if etag and not etag.startswith("W/"):
            note.write_text(json.dumps({"url": url, "etag": etag}))
        else:
            note.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        expected = start + int(length) if length is not None else None
        size = start
        try:
            with part.open("ab" if resumed else "wb") as file:
                # Chunks as they arrive: with a chunk size httpx loses what it had gathered when the connection breaks.
                for chunk in response.iter_raw():
                    file.write(chunk)
                    size += len(chunk)
                    _told(on_bytes, len(chunk))
        except httpx.TransportError:
            if not note.exists():
                part.unlink()
                _told(on_bytes, -size)
            raise
    return expected is None or size == expected


def _check(response: httpx.Response, url: str) -> None:
    status = response.status_code
    if status < 400:
        return
    text = f"{without_credentials(url)} answered {status} {response.reason_phrase}"
    if status in (401, 403):
        raise StageError(Reason.ACCESS_DENIED, text)
    if status in PASSING or status >= 500:
        raise StageError(Reason.HUB_UNAVAILABLE, text)
    raise StageError(Reason.DATASET_NOT_FOUND, text)


def _note_fits(note: Path, url: str) -> bool:
    try:
        return bool(json.loads(note.read_text())["url"] == url)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _told(on_bytes: OnBytes | None, count: int) -> None:
    if on_bytes is not None and count:
        on_bytes(count)
