"""A bucket, read: its objects, and what can go wrong with them.

Credentials and region come from the usual AWS chain (`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, a workload identity, ...), a
custom CA from `AWS_CA_BUNDLE`. `S3_ENDPOINT_URL` names a store that is not AWS, and `S3_ADDRESSING_STYLE` (path,
virtual) how it wants to be asked where the default does not fit.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from urllib3.exceptions import HTTPError

from retrain_models.errors import (
    ConflictError,
    DataError,
    MissingObjectError,
    RetryableError,
    SettingsError,
    StepError,
    StoreRefusedError,
    StoreUnreachableError,
)

T = TypeVar("T")

TRANSFERS = 8  # requests at once
CHUNK = 1 << 20  # bytes that are taken from a connection at once

# What the store must allow for each of our actions.
PERMISSIONS = {"read": "s3:GetObject", "look up": "s3:GetObject", "list": "s3:ListBucket", "write": "s3:PutObject"}
PERMISSIONS |= {"delete": "s3:DeleteObject", "create": "s3:CreateBucket"}
# boto3 translates an answer that breaks off only where it is read as a stream: otherwise it is urllib3's error.
CUT_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError, HTTPError)


@dataclass(frozen=True)
class StoredObject:
    """What a listing says of an object: its key, its size in bytes, and when it was written."""

    key: str
    size: int
    modified: datetime


class Bucket:
    """One bucket of an S3-compatible object store, for reading.

    Raises, from every method: `StoreUnreachableError` (retry), `StoreRefusedError` (never retry).
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.endpoint = endpoint()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(s3://{self.bucket} at {self.endpoint or 'AWS'})"

    @cached_property
    def _client(self) -> Any:
        # Imported late: a DAG file that only asks for the errors need not wait for it.
        import boto3  # noqa: PLC0415
        from botocore.config import Config  # noqa: PLC0415

        style = os.environ.get("S3_ADDRESSING_STYLE") or "auto"
        if style not in {"auto", "path", "virtual"}:
            raise SettingsError(f"S3_ADDRESSING_STYLE is {style!r}: expected path, virtual or auto")
        if (bundle := os.environ.get("AWS_CA_BUNDLE")) and not Path(bundle).exists():
            raise SettingsError(f"AWS_CA_BUNDLE is {bundle!r}, and there is no such file")
        # A client may be shared by threads; the session that makes it may not, so it is not the default one.
        session = boto3.session.Session()
        return session.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=os.environ.get("AWS_REGION") or session.region_name or "us-east-1",
            config=Config(
                connect_timeout=5,
                read_timeout=60,
                max_pool_connections=2 * TRANSFERS,
                retries={"mode": "standard"},  # with jittered back-off; AWS_MAX_ATTEMPTS says how often
                s3={"addressing_style": style},  # type: ignore[arg-type]
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
            raise self._translated(error, action, where) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StoreRefusedError(
                "no credentials for the object store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            ) from error
        except (ParamValidationError, ProfileNotFound, ConfigParseError) as error:
            raise StoreRefusedError(f"cannot {action} {where}: {error}") from error
        except SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" not in str(error):  # a connection that broke off
                raise StoreUnreachableError(f"the object store could not {action} {where}: {error}") from error
            raise StoreRefusedError(
                f"the certificate of {self.endpoint or 'AWS'} is not trusted ({error}): set AWS_CA_BUNDLE to the file "
                f"of the CA that signed it"
            ) from error
        except (BotoCoreError, HTTPError) as error:
            raise StoreUnreachableError(
                f"the object store at {self.endpoint or 'AWS'} could not {action} {where}: {error}"
            ) from error

    def _translated(self, error: ClientError, action: str, where: str) -> StepError:  # noqa: PLR0911  (one a fault)
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        refused = f"the object store refused to {action} {where} ({code}): "
        if code == "NoSuchBucket":
            return StoreRefusedError(
                f"there is no bucket {self.bucket!r} at {self.endpoint or 'AWS'}: create it, or set RETRAIN_BUCKET"
            )
        if code in {"NoSuchKey", "404", "NotFound"}:
            return MissingObjectError(f"{where} does not exist")
        if code in {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}:
            return ConflictError(f"{where} was written by somebody else in the meantime")
        if code == "RequestTimeTooSkewed":
            return StoreRefusedError(f"{refused}this machine's clock and the store's are too far apart: set the clock")
        if code.lower().startswith("kms"):
            return StoreRefusedError(f"{refused}check the encryption key, S3_KMS_KEY_ID")
        if code == "XMinioStorageFull":  # MinIO's: 507 where others fill up with 500
            return StoreUnreachableError(f"{refused}its disk is full")
        permission = PERMISSIONS[action]
        if code == "AccessDenied":
            return StoreRefusedError(f"{refused}these credentials lack the permission {permission} for this prefix")
        if status in {401, 403}:
            return StoreRefusedError(
                f"{refused}check the AWS credentials, and that they have {permission} for this prefix"
            )
        if status >= 500 or status in {408, 429} or code == "NoSuchUpload":  # ended by an answer that was lost
            return StoreUnreachableError(f"the object store failed to {action} {where} ({code})")
        return StepError(f"the object store could not {action} {where}: {error}")

    def get(self, key: str) -> bytes:
        """An object's bytes. Raises `MissingObjectError`."""
        return self.get_tagged(key)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """An object's bytes and the ETag that a conditional write needs. Raises `MissingObjectError`."""
        found = self.get_if_changed(key, None)
        assert found  # noqa: S101  (without an ETag there is always an answer)
        return found

    def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        """As `get_tagged`; but None, without a transfer, where the object still has this ETag."""

        def read() -> tuple[bytes, str] | None:
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=key, **({"IfNoneMatch": etag} if etag else {}))
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 304:
                    return None
                raise
            return answer["Body"].read(), answer["ETag"]

        with self._errors("read", key):
            return again_if_cut_off(read)

    def get_json(self, key: str) -> Any:
        """An object's content, read as JSON. Raises `MissingObjectError`, and `DataError` when it is not JSON."""
        try:
            return json.loads(self.get(key))
        except ValueError as error:
            raise DataError(f"s3://{self.bucket}/{key} is damaged: it is not JSON ({error})") from error

    def find(self, key: str) -> StoredObject | None:
        """What is stored under exactly this key, or None."""
        try:
            with self._errors("look up", key):
                answer = self._client.head_object(Bucket=self.bucket, Key=key)
        except MissingObjectError:
            return None
        return StoredObject(key, answer["ContentLength"], answer["LastModified"])

    def size(self, key: str) -> int:
        """An object's size in bytes. Raises `MissingObjectError`."""
        found = self.find(key)
        if found is None:
            raise MissingObjectError(f"s3://{self.bucket}/{key} does not exist")
        return found.size

    def exists(self, key: str) -> bool:
        """Whether there is an object under exactly this key."""
        return self.find(key) is not None

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        """Every object whose key starts with `prefix` and follows the key `after`, in key order."""
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix, StartAfter=after
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    yield StoredObject(entry["Key"], entry["Size"], entry["LastModified"])

    def read_into(self, key: str, file: int, start: int, length: int, advance: Callable[[int], Any]) -> int:
        """Copy `length` bytes of an object, from `start` on, to the same place of an open file (a descriptor).

        A transfer that breaks off goes on from where it was. Returns the size of the whole object, which tells whether
        it is the expected one; 0 where it ends before `start`. Raises `MissingObjectError`.
        """
        done, size = 0, 0

        def read() -> None:
            nonlocal done, size
            wanted = f"bytes={start + done}-{start + length - 1}"
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=key, Range=wanted)
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 416:
                    return
                raise
            if "ContentRange" not in answer:
                raise StepError(f"the object store gave all of s3://{self.bucket}/{key} where a part was asked for")
            size = int(answer["ContentRange"].rpartition("/")[2])
            for chunk in answer["Body"].iter_chunks(CHUNK):
                os.pwrite(file, chunk, start + done)
                done += len(chunk)
                advance(len(chunk))

        with self._errors("read", key):
            again_if_cut_off(read)
        return size

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file, which appears whole; its folder is made. Raises `MissingObjectError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_of(path.parent), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            fresh = Path(scratch) / path.name

            def read() -> None:
                answer = self._client.get_object(Bucket=self.bucket, Key=key)
                with fresh.open("wb") as file:
                    file.writelines(answer["Body"].iter_chunks(CHUNK))

            with self._errors("read", key):
                again_if_cut_off(read)
            fresh.replace(path)

    def download_all(self, files: dict[str, Path]) -> None:
        """Copy objects to local files (`{key: path}`), several at once."""
        in_parallel(lambda item: self.download(item[0], item[1]), list(files.items()))


@contextlib.contextmanager
def disk_of(directory: Path) -> Iterator[None]:
    """Say in a sentence, as a `RetryableError`, that the disk of a directory is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise RetryableError(f"the disk of {directory} is full: make room, and try again") from error


def again_if_cut_off(read: Callable[[], T]) -> T:
    """Repeat what was cut off in the middle of an answer, which boto3's own retries do not cover."""
    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS") or 3)
    for attempt in range(1, attempts):
        with contextlib.suppress(*CUT_OFF):
            return read()
        time.sleep(random.uniform(0, 2**attempt))  # noqa: S311  (jitter, not a secret)
    return read()


def endpoint() -> str | None:
    """`S3_ENDPOINT_URL`, or None for AWS. Raises `SettingsError` when it is no address or holds a password."""
    url = os.environ.get("S3_ENDPOINT_URL") or None
    if url and not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url):
        shown = re.sub(r"^(\w+://)?.*@", r"\1***@", url)
        raise SettingsError(
            f"S3_ENDPOINT_URL is {shown!r}: expected http://HOST:PORT or https://HOST, without a user or password"
        )
    return url


def in_parallel(work: Callable[[Any], T], items: list[Any]) -> list[T]:
    """Do the work for every item, several at once; the first failure is raised after the others have ended."""
    with ThreadPoolExecutor(max_workers=TRANSFERS) as pool:
        return list(pool.map(work, items))
