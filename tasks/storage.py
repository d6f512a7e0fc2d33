"""The one door to the object store: a bucket, its objects, and what can go wrong with them.

Everything the steps keep goes through `Store`; no other module imports boto3. Reading is `retrain_models.storage`,
which says how the store and the credentials are found. For writing, `S3_ENCRYPTION` asks for an encryption at rest
(`AES256`, or `aws:kms` with a key in `S3_KMS_KEY_ID`) where the bucket's own default is not the right one.

A store without conditional writes can be used with `RETRAIN_STORE_LOCK`, the path of a file that every writer can lock:
it takes the place of the condition.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mimetypes
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error, S3UploadFailedError

from retrain_models.errors import (
    ConflictError,
    MissingObjectError,
    StoreRefusedError,
    StoreUnreachableError,
)
from retrain_models.storage import Bucket, StoredObject, in_parallel
from tasks.errors import SettingsError, StepError

__all__ = [
    "ConflictError",
    "MissingObjectError",
    "Store",
    "StoreRefusedError",
    "StoreUnreachableError",
    "StoredObject",
    "in_parallel",
    "split_uri",
    "to_json",
]


class Store(Bucket):
    """One bucket of an S3-compatible object store, for reading and writing.

    Raises, from every method: `StoreUnreachableError` (retry), `StoreRefusedError` (never retry).
    """

    @contextlib.contextmanager
    def _errors(self, action: str, key: str = "") -> Iterator[None]:
        with super()._errors(action, key):
            try:
                yield
            except S3UploadFailedError as error:  # it hides the store's own answer, which says whether to try again
                raise error.__context__ or StoreUnreachableError(str(error)) from None
            except Boto3Error as error:
                where = f"s3://{self.bucket}/{key}"
                raise StoreUnreachableError(f"the object store could not {action} {where}: {error}") from error

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        """Write an object and return its ETag.

        With `if_match` only over the version with that ETag, with `if_absent` only where there is none:
        otherwise `ConflictError`, and nothing is written.
        """
        lock = os.environ.get("RETRAIN_STORE_LOCK")
        if lock and (if_match is not None or if_absent):
            return self._put_locked(Path(lock), key, data, if_match)
        condition: dict[str, str] = {}
        if if_match is not None:
            condition["IfMatch"] = if_match
        if if_absent:
            condition["IfNoneMatch"] = "*"
        with self._errors("write", key):
            answer = self._client.put_object(
                Bucket=self.bucket, Key=key, Body=data, ContentType=content_type(key), **encryption(), **condition
            )
            return answer["ETag"]

    def _put_locked(self, lock: Path, key: str, data: bytes, if_match: str | None) -> str:
        """The same, by looking first, while nobody else may write."""
        try:
            file = lock.open("a")
        except OSError as error:
            raise SettingsError(f"RETRAIN_STORE_LOCK is {str(lock)!r}, which cannot be opened: {error}") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                found: str | None = self.get_tagged(key)[1]
            except MissingObjectError:
                found = None
            if found != if_match:
                raise ConflictError(f"s3://{self.bucket}/{key} was written by somebody else in the meantime")
            return self.put(key, data)

    def put_json(self, key: str, value: Any, **condition: Any) -> str:
        """Write a value as JSON that people can read; conditions as in `put`."""
        return self.put(key, to_json(value), **condition)

    def upload(self, path: Path, key: str, *, advance: Callable[[int], Any] | None = None) -> None:
        """Copy a local file to an object, in parts where it is large; `advance` is told of bytes as they leave."""
        with self._errors("write", key):
            self._client.upload_file(
                str(path),
                self.bucket,
                key,
                ExtraArgs={"ContentType": content_type(key), **encryption()},
                Callback=advance,
            )

    def upload_all(self, files: dict[str, Path], *, advance: Callable[[int], Any] | None = None) -> None:
        """Copy local files to objects (`{key: path}`), several at once."""
        in_parallel(lambda item: self.upload(item[1], item[0], advance=advance), list(files.items()))

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        with self._errors("delete", key):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def unfinished_uploads(self, prefix: str) -> Iterator[tuple[StoredObject, Callable[[], None]]]:
        """Uploads in parts that nobody has finished: what would have been stored (of size 0), and how to end it."""
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=prefix)
            for page in pages:
                for upload in page.get("Uploads", []):
                    yield StoredObject(upload["Key"], 0, upload["Initiated"]), self._aborting(upload)

    def _aborting(self, upload: dict[str, Any]) -> Callable[[], None]:
        def abort() -> None:
            with contextlib.suppress(MissingObjectError), self._errors("delete", upload["Key"]):
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

        return abort

    def create_bucket(self) -> None:
        """Make the bucket, unless it is there and ours."""
        try:
            with self._errors("create"):
                self._client.create_bucket(Bucket=self.bucket)
        except ConflictError:
            pass
        except StepError as error:
            if "BucketAlreadyOwnedByYou" not in str(error):
                raise


def split_uri(uri: str) -> tuple[Store, str]:
    """The store and key of `s3://BUCKET/KEY`. Raises `SettingsError` for anything else."""
    # Not urlsplit: in a key, '?' and '#' are characters like any other.
    match = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]*)/+(.*[^/])/*", uri)
    if not match:
        raise SettingsError(f"{uri!r} is not an object-store location: expected s3://BUCKET/KEY")
    return Store(match[1]), match[2]


def encryption() -> dict[str, str]:
    """What a write says about encryption at rest. Raises `SettingsError` when the environment contradicts itself."""
    kind, key = os.environ.get("S3_ENCRYPTION"), os.environ.get("S3_KMS_KEY_ID")
    if kind not in {None, "", "AES256", "aws:kms"} or (key and kind != "aws:kms"):
        raise SettingsError(f"S3_ENCRYPTION is {kind!r}: expected AES256, or aws:kms for the key in S3_KMS_KEY_ID")
    said = {"ServerSideEncryption": kind or "", "SSEKMSKeyId": key or ""}
    return {name: value for name, value in said.items() if value}


def to_json(value: Any) -> bytes:
    """A value as indented UTF-8 JSON. A number that JSON does not know (NaN, infinity) is an error, not a token."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode()


def content_type(key: str) -> str:
    """The media type by which a browser shows an object."""
    return mimetypes.guess_type(key)[0] or "application/octet-stream"
