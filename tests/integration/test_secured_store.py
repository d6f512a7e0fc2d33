"""A store as companies have it: https with a CA of its own, a region, buckets as host names, encryption at rest.

MinIO only: MiniStack has none of these.
"""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port

from scripts import object_store
from tasks import registry
from tasks.errors import SettingsError
from tasks.registry import ProductionMovedError
from tasks.storage import Store, StoreRefusedError, StoreUnreachableError

DOMAIN, REGION, KEY = "store.test", "eu-west-3", "models-key"
MODEL = "m"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate that signs itself, for the store's address and names."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl on PATH")
    folder = tmp_path_factory.mktemp("certificates")
    names = f"subjectAltName=IP:{object_store.HOST},DNS:{DOMAIN},DNS:*.{DOMAIN}"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(folder / "private.key"), "-out", str(folder / "public.crt")]
    command = ["openssl", "req", "-x509", *kind, *files, "-subj", f"/CN={DOMAIN}", "-addext", names]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def environment(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The running store, as its clients' environment."""
    if object_store.find_minio(Path.home() / "go" / "bin") is None:
        pytest.skip("no minio binary in MINIO_BINARY, on PATH or in ~/go/bin")
    folder, port = tmp_path_factory.mktemp("secured"), free_port()
    server = object_store.server("minio", folder / "data", port, object_store.Credentials.random())
    kms = f"{KEY}:{base64.b64encode(secrets.token_bytes(32)).decode()}"
    settings = {"MINIO_DOMAIN": DOMAIN, "MINIO_SITE_REGION": REGION, "MINIO_KMS_SECRET_KEY": kms}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*server.command, "--certs-dir", str(certificates)],
            env={**os.environ, **server.environment, **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    yield {
        **server.client_environment,
        "S3_ENDPOINT_URL": f"https://{object_store.HOST}:{port}",
        "AWS_CA_BUNDLE": str(certificates / "public.crt"),
        "AWS_REGION": REGION,
    }
    process.terminate()
    process.wait(20)


@pytest.fixture
def secured(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Store:
    """A new bucket in it, which the environment names."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = Store(f"test-{secrets.token_hex(6)}")
    deadline = time.monotonic() + 60
    while True:
        try:
            store.create_bucket()
        except StoreUnreachableError:
            assert time.monotonic() < deadline, "the store did not answer within a minute"
            time.sleep(0.2)
        else:
            return store


def promote_and_pull(store: Store, folder: Path) -> None:
    """The registry's whole way: large and small files, two versions, a move that loses, a pull."""
    for version, before in (("1", None), ("2", "1")):
        directory = folder / version
        directory.mkdir()
        (directory / "frozen.bin").write_bytes(b"f" * 9_000_000)  # in parts
        (directory / "trained.bin").write_text(version)
        registry.publish(store, MODEL, version, directory, {})
        registry.move(store, MODEL, version, expected=before, who="w", why="y")
    with pytest.raises(ProductionMovedError):
        registry.move(store, MODEL, "1", expected="1", who="w", why="y")
    assert registry.pull(store, MODEL, "production", folder / "model") == "2"
    assert (folder / "model" / "trained.bin").read_text() == "2"


def test_a_ca_of_its_own(secured: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promote_and_pull(secured, tmp_path)
    monkeypatch.delenv("AWS_CA_BUNDLE")
    with pytest.raises(StoreRefusedError, match=r"certificate of https://.* is not trusted.*: set AWS_CA_BUNDLE"):
        Store(secured.bucket).get("k")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(SettingsError, match=r"AWS_CA_BUNDLE is .*none\.pem.*no such file"):
        Store(secured.bucket).get("k")


@pytest.mark.parametrize(("kind", "key"), [("AES256", None), ("aws:kms", KEY), ("aws:kms", None)])
def test_encryption_at_rest(
    kind: str, key: str | None, secured: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ENCRYPTION", kind)
    if key:
        monkeypatch.setenv("S3_KMS_KEY_ID", key)
    promote_and_pull(secured, tmp_path)
    for entry in secured.list(""):
        answer = secured._client.head_object(Bucket=secured.bucket, Key=entry.key)
        assert answer["ServerSideEncryption"] == kind, entry.key
        assert (answer.get("SSEKMSKeyId") or "").endswith(key or "")


def test_a_key_that_the_store_does_not_have(secured: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENCRYPTION", "aws:kms")
    monkeypatch.setenv("S3_KMS_KEY_ID", "no-such-key")
    with pytest.raises(StoreRefusedError, match=r"refused to write .*: check the encryption key, S3_KMS_KEY_ID"):
        secured.put("k", b"1")


@pytest.mark.parametrize(
    "settings", [{"S3_ENCRYPTION": "rot13"}, {"S3_KMS_KEY_ID": KEY}, {"S3_ENCRYPTION": "AES256", "S3_KMS_KEY_ID": KEY}]
)
def test_an_encryption_that_is_none(settings: dict[str, str], secured: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=r"S3_ENCRYPTION is .*: expected AES256, or aws:kms for the key in"):
        secured.put("k", b"1")


def test_buckets_as_host_names(
    secured: Store, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    lookup = socket.getaddrinfo

    def name_server(host: Any, *args: Any, **more: Any) -> Any:
        """The company's, which knows the store's names."""
        asked.append(host)
        return lookup(object_store.HOST if str(host).endswith(DOMAIN) else host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", name_server)
    monkeypatch.setenv("NO_PROXY", f"{object_store.HOST},{DOMAIN}")
    monkeypatch.setenv("no_proxy", f"{object_store.HOST},{DOMAIN}")
    monkeypatch.setenv("S3_ENDPOINT_URL", environment["S3_ENDPOINT_URL"].replace(object_store.HOST, DOMAIN))
    for style, host in (("virtual", f"{secured.bucket}.{DOMAIN}"), ("path", DOMAIN)):
        asked.clear()
        monkeypatch.setenv("S3_ADDRESSING_STYLE", style)
        (tmp_path / style).mkdir()
        store = Store(secured.bucket)
        for entry in store.list(""):
            store.delete(entry.key)
        promote_and_pull(store, tmp_path / style)
        assert set(asked) == {host}
    monkeypatch.setenv("S3_ADDRESSING_STYLE", "sideways")
    with pytest.raises(SettingsError, match="S3_ADDRESSING_STYLE is 'sideways': expected path, virtual or auto"):
        Store(secured.bucket).get("k")


def test_a_region(secured: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, region in (("AWS_REGION", REGION), ("AWS_DEFAULT_REGION", REGION), ("AWS_REGION", "us-west-2")):
        monkeypatch.delenv("AWS_REGION", raising=False)
        monkeypatch.setenv(variable, region)
        store = Store(secured.bucket)
        store.put("k", region.encode())  # boto3 follows the store to its own region
        assert store.get("k").decode() == region
        assert store._client.meta.region_name == region
