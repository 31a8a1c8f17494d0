"""Requests that only read and have small answers: each ends in time, and a refusal says why."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, TypeVar, cast

from botocore.exceptions import ClientError
from urllib3.response import HTTPResponse

from finetune_api.failures import Reason
from finetune_trainer import s3_transfer
from finetune_trainer.errors import StageError
from finetune_trainer.s3_errors import TornAnswer, http_status, translated
from finetune_trainer.s3_transfer import CHUNK_BYTES, Pace, TooSlow

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

T = TypeVar("T")


def in_time(uri: str, ask: Callable[[], T]) -> T:
    """What ``ask`` returns, if it does so within STALL_SECONDS.

    botocore reads answers with a timeout that begins anew at each byte: a listing that comes at a byte in ten seconds takes days.
    Only for requests that change nothing: one that is given up goes on in its thread until its connection ends, and a write that
    did so could land after a later one.

    Raises:
        StageError: StorageUnavailable; and what ``ask`` raises.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
            answer.set_exception(error)

    # No pool: its threads would be waited for when the process ends.
    threading.Thread(target=work, name="s3-read", daemon=True).start()
    if not wait([answer], s3_transfer.STALL_SECONDS).done:
        raise StageError(
            Reason.STORAGE_UNAVAILABLE,
            f"the store of {uri} gave no whole answer within {s3_transfer.STALL_SECONDS:.0f} seconds",
        )
    return answer.result()


def read_object(client: S3Client, bucket: str, key: str, **arguments: Any) -> bytes:
    """All bytes of the answer to GetObject.

    Raises:
        StageError: what stores raise; StorageUnavailable for bytes that hardly come.
        NotFound: no such object.
    """
    uri = f"s3://{bucket}/{key}"
    chunks: list[bytes] = []
    with translated(uri):
        answer = in_time(uri, lambda: client.get_object(Bucket=bucket, Key=key, **arguments))
        pace = Pace()
        # Entered, botocore's body is urllib3's response, whose ``read1`` gives what has come (see s3_download).
        with cast(HTTPResponse, answer["Body"].__enter__()) as body:
            try:
                while chunk := body.read1(CHUNK_BYTES):
                    chunks.append(chunk)
                    pace.moved(len(chunk))
            except TooSlow as slow:
                raise StageError(Reason.STORAGE_UNAVAILABLE, f"reading {uri} all but stands still: {slow}") from slow
        data = b"".join(chunks)
        if len(data) != answer.get("ContentLength"):  # without it the connection's end would be taken for the object's
            raise TornAnswer(operation="GetObject")
    return data


def head_object(client: S3Client, bucket: str, key: str, **arguments: Any) -> HeadObjectOutputTypeDef:
    """HeadObject. Its answers have no body, so a refusal is a bare 403, be the credentials rotated or the object forbidden: a GET
    of one byte is told which.

    Raises:
        StageError: StorageUnavailable, for an answer that does not come in time.
        ClientError: the GET's refusal, or what else botocore raises.
    """
    uri = f"s3://{bucket}/{key}"
    try:
        return in_time(uri, lambda: client.head_object(Bucket=bucket, Key=key, **arguments))
    except ClientError as refused:
        if http_status(refused) != 403:
            raise
    try:
        in_time(uri, lambda: client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0"))["Body"].close()
    except ClientError as error:
        if http_status(error) != 416:  # an empty object has no first byte
            raise
    # The GET was allowed: the credentials were changed in between.
    return in_time(uri, lambda: client.head_object(Bucket=bucket, Key=key, **arguments))
