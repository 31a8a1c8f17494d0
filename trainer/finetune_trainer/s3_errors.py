"""What botocore raises, in the words of the failure table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import urllib3.exceptions
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from finetune_api.failures import Reason
from finetune_trainer.errors import NotFound, StageError

REFUSED = {
    "AccessDenied",
    "AllAccessDisabled",
    "AccountProblem",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "Forbidden",
    "Unauthorized",
    "401",
    "403",
}
ROTATED = {"InvalidAccessKeyId", "SignatureDoesNotMatch"}
"""What a store says of credentials that it has forgotten. With the same words it refuses wrong ones, see WORKED_BEFORE."""
WORKED_BEFORE = "FinetuneWorkedBefore"
"""Entry of an error's details: requests with this Secret's values were accepted earlier in this process."""
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
ROTATION_SECONDS = 300.0
"""How long new credentials are waited for: whoever rotates a Secret may be late, and the kubelet takes up to about two minutes to
bring a changed Secret into a pod."""
FULL = {
    "QuotaExceeded",  # Ceph: with 403
    "InsufficientStorage",
    "InsufficientCapacity",
    "StorageFull",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",  # MinIO: with 400
    "507",
}
PASSING = {
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "IncompleteBody",
    "OperationAborted",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
    "RequestTimeTooSkewed",
    "Throttling",
    "ThrottlingException",
    "BadDigest",
    "429",
}
TRANSPORT_ERRORS = (ConnectionError, HTTPClientError, IncompleteReadError, urllib3.exceptions.HTTPError, OSError)
BOTOCORE_ERRORS = (ClientError, BotoCoreError, ResponseParserError, urllib3.exceptions.HTTPError)
"""Everything that a client's method raises."""


NEEDED: dict[str, tuple[set[str], ...]] = {
    "HeadObject": ({"ETag"}, {"ContentLength"}),
    "GetObject": ({"ETag"},),
    "PutObject": ({"ETag"},),
    "CreateMultipartUpload": ({"UploadId"},),
    "UploadPart": ({"ETag"},),
    "CompleteMultipartUpload": ({"ETag"},),
    "ListObjectsV2": ({"Name", "KeyCount", "Contents", "IsTruncated"},),
    "ListParts": ({"Bucket", "Key", "UploadId", "Parts"},),
    "ListMultipartUploads": ({"Bucket", "Uploads", "IsTruncated"},),
}
"""One of each set is in every whole answer of success."""


class TornAnswer(BotoCoreError):
    """A success of which the rest is missing.

    Where a connection ends within the head of an answer, http.client (Python 3.11) takes what came for all of it, and, without a
    Content-Length, an empty body for the whole: a listing of nothing, an upload without an id.
    """

    fmt = "the answer to {operation} broke off"


def must_be_whole(operation: str, status: int, parsed: dict[str, Any]) -> None:
    """Raises TornAnswer."""
    if status < 300 and not all(any_of & parsed.keys() for any_of in NEEDED.get(operation, ())):
        raise TornAnswer(operation=operation)


@contextmanager
def translated(uri: str, but: type[Exception] | None = None) -> Iterator[None]:
    """Turn botocore's errors about ``uri`` into StageError and NotFound, except those that are ``but``.

    Raises:
        StageError: BucketNotFound, AccessDenied, StorageUnavailable, StorageFull.
        NotFound: the object does not exist.
    """
    try:
        yield
    except BOTOCORE_ERRORS as error:
        if but is not None and isinstance(error, but):
            raise
        raise translate(error, uri) from error


def error_code(error: ClientError) -> str:
    """The code of a store's answer, as ``NoSuchUpload``; the HTTP status where it names none."""
    return str(error.response.get("Error", {}).get("Code", ""))


def http_status(error: ClientError) -> int:
    """The status of a store's answer; 0 where botocore made the error up."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def translate(error: Exception, uri: str) -> Exception:
    """The exception to raise instead of ``error``."""
    if isinstance(error, ClientError):
        details = error.response.get("Error", {})
        code = str(details.get("Code", ""))
        status = http_status(error)
        text = f"{code} ({details.get('Message') or 'no message'})"
        if code == "NoSuchBucket":
            bucket = uri.removeprefix("s3://").split("/", 1)[0]
            return StageError(Reason.BUCKET_NOT_FOUND, f"bucket {bucket} of {uri} does not exist")
        if code == "NoSuchKey" or (status == 404 and error.operation_name == "HeadObject"):
            return NotFound(uri)
        if status == 404:
            # A web server or proxy: taking its 404 for a missing object would turn a wrong endpoint into a missing model.
            return StageError(
                Reason.STORAGE_UNAVAILABLE,
                f"{uri}: the endpoint answered 404 without an S3 error; is it an S3-compatible store?",
            )
        if code in EXPIRED or (status == 400 and error.operation_name == "HeadObject"):
            # To HEAD, which has no body, AWS answers a bare 400 where any other request is told ExpiredToken.
            return StageError(
                Reason.ACCESS_DENIED,
                f"the store refused {error.operation_name} on {uri}, as for an expired session token: {text}; new values in the "
                f"Secret (or of the pod's identity) are picked up, for {ROTATION_SECONDS / 60:.0f} minutes",
                patience_seconds=ROTATION_SECONDS,
            )
        if code in FULL or status == 507:
            return StageError(Reason.STORAGE_FULL, f"the store of {uri} takes no more data: {text}")
        if code in ROTATED and details.get(WORKED_BEFORE):
            return StageError(
                Reason.ACCESS_DENIED,
                f"the store refused {error.operation_name} on {uri}: {text}; this Secret's values were accepted before, so they "
                f"are taken for rotated: new ones in the Secret are picked up, for {ROTATION_SECONDS / 60:.0f} minutes",
                patience_seconds=ROTATION_SECONDS,
            )
        if code in REFUSED or (status in (401, 403) and code not in PASSING):
            hint = ""
            if code in ("AccessDenied", "403") and error.operation_name in ("GetObject", "HeadObject"):
                # AWS answers so for an object that does not exist, unless the credentials may list the bucket.
                hint = "; reading needs s3:GetObject and s3:ListBucket"
            return StageError(Reason.ACCESS_DENIED, f"the store refused {error.operation_name} on {uri}: {text}{hint}")
        if code == "NotImplemented" or status == 501:
            return StageError(
                Reason.INVALID_CONFIG, f"the store of {uri} does not implement {error.operation_name}: {text}"
            )
        if code in PASSING or status >= 500 or status in (408, 425, 429):
            return StageError(Reason.STORAGE_UNAVAILABLE, f"the store cannot serve {uri} now: {text}")
        return StageError(Reason.UNKNOWN, f"{error.operation_name} on {uri} failed: {text}")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StageError(
            Reason.ACCESS_DENIED,
            f"no credentials for {uri}: the source has no secretRef, and the pod has no identity of its own ({error})",
        )
    if isinstance(error, SSLError):
        return StageError(Reason.STORAGE_UNAVAILABLE, f"TLS to the store of {uri} failed: {error}")
    if isinstance(error, ResponseParserError):
        # A plain Exception of botocore's. Where a proxy asks for a login, it answers 200 with a page.
        return StageError(
            Reason.STORAGE_UNAVAILABLE,
            f"what answered for {uri} is no S3-compatible store; is a proxy in between? {error}",
        )
    if isinstance(error, (TornAnswer, *TRANSPORT_ERRORS)):
        return StageError(Reason.STORAGE_UNAVAILABLE, f"cannot reach the store of {uri}: {error}")
    return StageError(Reason.INVALID_CONFIG, f"{uri}: {error}")
