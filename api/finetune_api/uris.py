"""URIs of models, data and outputs: the one place that knows their schemes and shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass

MODEL_URI_PATTERN = (
    r"^(hf://[A-Za-z0-9][\w.-]*/[\w.-]+"
    r"|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#\s]*)?"
    r"|pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?(/[^?#\s]*)?)$"
)
DATA_URI_PATTERN = (
    r"^(hf://(datasets/)?[A-Za-z0-9][\w.-]*/[\w.-]+(/[^?#\s]*)?"
    r"|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^?#\s]+"
    r"|https://[^\s/]+/[^\s]*"
    r"|pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[^?#\s]+)$"
)
OUTPUT_URI_PATTERN = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#\s]*)?$"


@dataclass(frozen=True)
class S3Location:
    """A bucket and a key or key prefix (no leading or trailing slash; may be empty)."""

    bucket: str
    key: str

    def join(self, *parts: str) -> S3Location:
        """The location of ``parts`` below this prefix."""
        return S3Location(self.bucket, "/".join(p.strip("/") for p in (self.key, *parts) if p.strip("/")))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}" if self.key else f"s3://{self.bucket}"


@dataclass(frozen=True)
class HubLocation:
    """A Hugging Face Hub repository, and for data an optional path inside it."""

    repo_id: str
    path: str


@dataclass(frozen=True)
class PvcLocation:
    """A PersistentVolumeClaim in the job's namespace and a path inside it."""

    claim: str
    path: str


@dataclass(frozen=True)
class HttpsLocation:
    """A plain HTTPS address."""

    url: str


Location = S3Location | HubLocation | PvcLocation | HttpsLocation


def parse_uri(uri: str) -> Location:
    """Split a URI into its parts.

    Raises:
        ValueError: the scheme is none of hf, s3, pvc, https, or the shape does not fit the scheme.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or not rest:
        raise ValueError(f"{uri!r} is not a URI; expected hf://, s3://, pvc:// or https://")
    if scheme == "https":
        return HttpsLocation(uri)
    if scheme == "s3":
        bucket, _, key = rest.partition("/")
        return S3Location(bucket, key.strip("/"))
    if scheme == "pvc":
        claim, _, path = rest.partition("/")
        return PvcLocation(claim, path.strip("/"))
    if scheme == "hf":
        parts = rest.removeprefix("datasets/").strip("/").split("/")
        if len(parts) < 2:
            raise ValueError(f"{uri!r} names no repository; expected hf://<organisation>/<name>")
        return HubLocation("/".join(parts[:2]), "/".join(parts[2:]))
    raise ValueError(f"{uri!r} has scheme {scheme!r}; expected hf, s3, pvc or https")


def display_name(uri: str) -> str:
    """The last path segment of a URI, for the MODEL printer column (``hf://org/Llama-3`` → ``Llama-3``)."""
    segments = [s for s in re.split(r"[/]+", uri.partition("://")[2]) if s]
    return segments[-1] if segments else uri
