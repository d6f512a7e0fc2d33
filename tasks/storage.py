"""The one door to the object store: a bucket, its objects, and what can go wrong with them.

Everything the steps keep goes through `Store`; no other module imports boto3. Credentials, region and endpoint come
from the usual AWS chain (`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, a workload identity, ...) and from `S3_ENDPOINT_URL`.
"""

from __future__ import annotations

import contextlib
import json
import mimetypes
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error, S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from tasks.errors import DataError, RetryableError, SettingsError, StepError

TRANSFERS = 8  # files moved at once; each file may itself be moved in parts


class MissingObjectError(StepError):
    """There is no object under this key."""


class ConflictError(StepError):
    """A conditional write lost: somebody else wrote the object first."""


class StoreUnreachableError(RetryableError):
    """The store did not answer, or answered that it is in trouble."""


class StoreRefusedError(SettingsError):
    """The store answered, and will not: credentials, permission, or no such bucket."""


@dataclass(frozen=True)
class StoredObject:
    """What a listing says of an object: its key and its size in bytes."""

    key: str
    size: int


class Store:
    """One bucket of an S3-compatible object store.

    Raises, from every method: `StoreUnreachableError` (retry), `StoreRefusedError` (never retry).
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.endpoint = endpoint()

    def __repr__(self) -> str:
        return f"Store(s3://{self.bucket} at {self.endpoint or 'AWS'})"

    @cached_property
    def _client(self) -> Any:
        # A client may be shared by threads; the session that makes it may not, so it is not the default one.
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            config=Config(
                connect_timeout=5,
                read_timeout=60,
                max_pool_connections=2 * TRANSFERS,
                retries={"mode": "standard"},  # AWS_MAX_ATTEMPTS says how often
                # Newer checksum headers are refused by some S3 servers; manifests carry our own SHA-256.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    @contextlib.contextmanager
    def _errors(self, action: str, key: str = "") -> Iterator[None]:
        """Translate what boto3 raises into one sentence of ours."""
        where = f"s3://{self.bucket}/{key}"
        try:
            yield
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code == "NoSuchBucket":
                raise StoreRefusedError(
                    f"there is no bucket {self.bucket!r} at {self.endpoint or 'AWS'}: create it, or set RETRAIN_BUCKET"
                ) from error
            if code in {"NoSuchKey", "404", "NotFound"}:
                raise MissingObjectError(f"{where} does not exist") from error
            if code in {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}:
                raise ConflictError(f"{where} was written by somebody else in the meantime") from error
            if status in {401, 403}:
                raise StoreRefusedError(
                    f"the object store refused to {action} {where} ({code}): check the AWS credentials and the "
                    f"permission for this prefix"
                ) from error
            if status >= 500 or status == 429:
                raise StoreUnreachableError(f"the object store failed to {action} {where} ({code})") from error
            raise StepError(f"the object store could not {action} {where}: {error}") from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StoreRefusedError(
                "no credentials for the object store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            ) from error
        except (ParamValidationError, ProfileNotFound, ConfigParseError) as error:
            raise StoreRefusedError(f"cannot {action} {where}: {error}") from error
        except (BotoCoreError, Boto3Error) as error:
            raise StoreUnreachableError(
                f"the object store at {self.endpoint or 'AWS'} could not {action} {where}: {error}"
            ) from error

    def get(self, key: str) -> bytes:
        """An object's bytes. Raises `MissingObjectError`."""
        return self.get_tagged(key)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """An object's bytes and the ETag that a conditional write needs. Raises `MissingObjectError`."""
        with self._errors("read", key):
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            return answer["Body"].read(), answer["ETag"]

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        """Write an object and return its ETag.

        With `if_match` only over the version with that ETag, with `if_absent` only where there is none:
        otherwise `ConflictError`, and nothing is written.
        """
        condition: dict[str, str] = {}
        if if_match is not None:
            condition["IfMatch"] = if_match
        if if_absent:
            condition["IfNoneMatch"] = "*"
        with self._errors("write", key):
            answer = self._client.put_object(
                Bucket=self.bucket, Key=key, Body=data, ContentType=content_type(key), **condition
            )
            return answer["ETag"]

    def get_json(self, key: str) -> Any:
        """An object's content, read as JSON. Raises `MissingObjectError`, and `DataError` when it is not JSON."""
        try:
            return json.loads(self.get(key))
        except ValueError as error:
            raise DataError(f"s3://{self.bucket}/{key} is damaged: it is not JSON ({error})") from error

    def put_json(self, key: str, value: Any, **condition: Any) -> str:
        """Write a value as JSON that people can read; conditions as in `put`."""
        return self.put(key, to_json(value), **condition)

    def exists(self, key: str) -> bool:
        """Whether there is an object under exactly this key."""
        try:
            with self._errors("look up", key):
                self._client.head_object(Bucket=self.bucket, Key=key)
        except MissingObjectError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose key starts with `prefix`, in key order."""
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            for page in pages:
                for entry in page.get("Contents", []):
                    yield StoredObject(entry["Key"], entry["Size"])

    def upload(self, path: Path, key: str) -> None:
        """Copy a local file to an object, in parts where it is large."""
        with self._errors("write", key):
            try:
                self._client.upload_file(str(path), self.bucket, key, ExtraArgs={"ContentType": content_type(key)})
            except S3UploadFailedError as error:  # it hides the store's own answer, which says whether to try again
                raise error.__context__ or error from None

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file; its folder is made. Raises `MissingObjectError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors("read", key):
            self._client.download_file(self.bucket, key, str(path))

    def upload_all(self, files: dict[str, Path]) -> None:
        """Copy local files to objects (`{key: path}`), several at once."""
        in_parallel(lambda item: self.upload(item[1], item[0]), list(files.items()))

    def download_all(self, files: dict[str, Path]) -> None:
        """Copy objects to local files (`{key: path}`), several at once."""
        in_parallel(lambda item: self.download(item[0], item[1]), list(files.items()))

    def create_bucket(self) -> None:
        """Make the bucket, unless it is there and ours."""
        try:
            with self._errors("create bucket"):
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


def endpoint() -> str | None:
    """`S3_ENDPOINT_URL`, or None for AWS. Raises `SettingsError` when it is no address or holds a password."""
    url = os.environ.get("S3_ENDPOINT_URL") or None
    if url and not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url):
        shown = re.sub(r"^(\w+://)?.*@", r"\1***@", url)
        raise SettingsError(
            f"S3_ENDPOINT_URL is {shown!r}: expected http://HOST:PORT or https://HOST, without a user or password"
        )
    return url


def to_json(value: Any) -> bytes:
    """A value as indented UTF-8 JSON. A number that JSON does not know (NaN, infinity) is an error, not a token."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode()


def content_type(key: str) -> str:
    """The media type by which a browser shows an object."""
    return mimetypes.guess_type(key)[0] or "application/octet-stream"


def in_parallel(work: Callable[[Any], Any], items: list[Any]) -> None:
    """Do the work for every item, several at once; the first failure is raised after the others have ended."""
    with ThreadPoolExecutor(max_workers=TRANSFERS) as pool:
        list(pool.map(work, items))
