"""Whole reads from S3 through s3fs: one version of an object, every byte that was promised, or an error.

s3fs reads an object of some size in concurrent ranges: where another version came between them, or fewer bytes than
were asked for, it returns a mixture, or zeros.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from infscan.storage.error_mapping import ChangedError, CutOffError, is_other_version
from infscan.storage.retry import RetryPolicy
from infscan.storage.tempnames import ABANDONED_S

PART_BYTES = 64 << 20
_PARTS_AT_A_TIME = 8


async def get(fs: Any, uri: str, retry: RetryPolicy) -> bytes:
    """An object's bytes: one request, or for a large one as many ranges of one version as it takes."""
    answer = await _ask(fs, uri, retry)
    size, etag = int(answer["ContentLength"]), answer.get("ETag")
    if size <= PART_BYTES or not etag:
        return await _body(answer, size, retry)
    answer["Body"].close()
    turn = asyncio.Semaphore(_PARTS_AT_A_TIME)

    async def part(start: int) -> bytes:
        async with turn:
            return await get_range(fs, uri, start, min(start + PART_BYTES, size), etag, retry)

    return b"".join(await _all(part(start) for start in range(0, size, PART_BYTES)))


async def get_range(fs: Any, uri: str, start: int, stop: int, etag: str | None, retry: RetryPolicy) -> bytes:
    """Bytes [start, stop) of the version with this ETag (null: of any).

    Raises ChangedError where that version is not there any more, CutOffError where fewer bytes came.
    """
    condition = {"IfMatch": etag} if etag else {}
    try:
        answer = await _ask(fs, uri, retry, Range=f"bytes={start}-{stop - 1}", **condition)
    except OSError as error:
        if is_other_version(error):
            raise ChangedError from error
        raise
    return await _body(answer, stop - start, retry)


async def _ask(fs: Any, uri: str, retry: RetryPolicy, **options: Any) -> dict[str, Any]:
    bucket, key, _ = fs.split_path(uri)
    # req_kw says that the requester pays, where a bucket is read so.
    request = fs._call_s3("get_object", Bucket=bucket, Key=key, **fs.req_kw, **options)
    answer: dict[str, Any] = await asyncio.wait_for(request, retry.attempt_s())
    return answer


async def _body(answer: dict[str, Any], size: int, retry: RetryPolicy) -> bytes:
    body = answer["Body"]
    try:
        data: bytes = await asyncio.wait_for(body.read(), retry.attempt_s(size))
    finally:
        body.close()
    if len(data) != size:
        raise CutOffError(f"{len(data)} bytes came of {size}")
    return data


async def _all(parts: Iterable[Any]) -> list[bytes]:
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def abort_abandoned_uploads(fs: Any, uri: str) -> int:
    """Aborts multipart uploads below `uri` that were begun long ago and never completed; how many.

    One that is still alive fails with NoSuchUpload, and its writer begins it anew.
    """
    bucket, key, _ = fs.split_path(uri)
    aborted, more = 0, dict[str, str]()
    while True:
        found = await fs._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/", **more)
        for upload in found.get("Uploads", []):
            if (datetime.now(UTC) - upload["Initiated"]).total_seconds() > ABANDONED_S:
                await fs._call_s3(
                    "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
                aborted += 1
        if not found.get("IsTruncated"):
            return aborted
        more = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}
