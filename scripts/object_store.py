"""An object store as a process on this machine: MinIO, or MiniStack where there is no MinIO.

The local stack and the tests start it the same way:

    server = object_store.server("ministack", folder, port, object_store.Credentials("user", "a long password"))
    process = subprocess.Popen(server.command, env={**os.environ, **server.environment})
    server.wait_until_ready(process)
    os.environ.update(server.client_environment)

Both keep their data in the folder and listen on loopback only.
"""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from scripts.preflight import NotReadyError

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Credentials:
    """A store's root key. It is not shown where the object is."""

    access_key: str
    secret_key: str = field(repr=False)

    @classmethod
    def random(cls) -> Credentials:
        """A key that nobody knows yet."""
        return cls(f"retrain-{secrets.token_hex(4)}", secrets.token_hex(24))


@dataclass(frozen=True)
class Server:
    """How to start a store, and how to talk to it."""

    kind: str
    port: int
    command: list[str]
    environment: dict[str, str] = field(repr=False)
    health: str
    credentials: Credentials

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://{HOST}:{self.port}"

    @property
    def client_environment(self) -> dict[str, str]:
        """What its clients need in their environment."""
        return {
            "S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_key,
        }

    def wait_until_ready(self, process: subprocess.Popen[bytes], timeout: float = 60) -> None:
        """Return once it answers. Raises `RuntimeError` when it ends or stays silent."""
        deadline = time.monotonic() + timeout
        while not answers(self.port, self.health):
            if process.poll() is not None:
                raise RuntimeError(f"{self.kind} ended with exit code {process.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.kind} did not answer on port {self.port} within {timeout:.0f} s")
            time.sleep(0.1)


def server(kind: str, folder: Path, port: int, credentials: Credentials, *, console_port: int | None = None) -> Server:
    """A store of a kind (`minio`, `ministack`) with its data in a folder; `console_port` is for MinIO's web page."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "minio":
        binary = find_minio(Path.home() / "go" / "bin")
        if binary is None:
            raise RuntimeError("there is no minio binary on PATH, in ~/go/bin, or in MINIO_BINARY")
        console = ["--console-address", f"{HOST}:{console_port}"] if console_port else []
        return Server(
            kind,
            port,
            [binary, "server", str(folder), "--address", f"{HOST}:{port}", *console],
            {
                "MINIO_ROOT_USER": credentials.access_key,
                "MINIO_ROOT_PASSWORD": credentials.secret_key,
                "MINIO_BROWSER": "on" if console_port else "off",
                "MINIO_UPDATE": "off",  # asks the network for news
            },
            "/minio/health/ready",
            credentials,
        )
    return Server(
        kind,
        port,
        [sys.executable, "-m", "ministack"],
        {
            "GATEWAY_PORT": str(port),
            "BIND_HOST": HOST,
            "SERVICES": "s3",
            "IOT_MTLS_ENABLED": "0",  # else it opens a message broker on every interface, whatever SERVICES says
            "AUTH": "true",
            "AWS_ACCESS_KEY_ID": credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
            "S3_PERSIST": "1",
            "S3_DATA_DIR": str(folder / "s3"),
            "PERSIST_STATE": "1",
            "STATE_DIR": str(folder / "state"),
            "TMPDIR": str(folder),  # for its pid file
            "LOG_LEVEL": "WARNING",
        },
        "/_ministack/health",
        credentials,
    )


def find_minio(*more_folders: Path) -> str | None:
    """The MinIO binary: `MINIO_BINARY`, else `minio` on PATH or in one of these folders.

    Raises `NotReadyError` where `MINIO_BINARY` names something else than a program.
    """
    if named := os.environ.get("MINIO_BINARY"):
        if not shutil.which(named):
            raise NotReadyError(
                f"MINIO_BINARY is {named!r}, which is no program that can be run: correct it, or unset it to use the "
                f"minio on PATH or else MiniStack."
            )
        return named
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, more_folders)])
    return shutil.which("minio", path=path)


def answers(port: int, path: str) -> bool:
    """Whether an HTTP server on this machine answers a request with 200."""
    # http.client asks no proxy, whatever the environment says.
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
