"""What every test may use: an Airflow of its own, and real object stores on free ports of the loopback interface."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from datasets import Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import airflow_settings, object_store  # noqa: E402

# Airflow reads its environment when it is imported, so it is set before any test module is.
_home = Path(tempfile.mkdtemp(prefix="retrain-airflow-"))
atexit.register(shutil.rmtree, _home, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith(("AIRFLOW", "RETRAIN_", "AWS_", "S3_"))]:
    del os.environ[_name]  # a test must not depend on, or write to, what the developer works with
os.environ.update(airflow_settings.environment(_home, airflow_settings.new_secrets(), port=8080, bucket="retrain"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = object_store.HOST  # a developer's proxy knows nothing of loopback
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(ROOT / ".cache" / "hypothesis")
hypothesis.settings.register_profile("retrain", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("retrain")

from tasks.storage import Store  # noqa: E402


def free_port() -> int:
    """A port that nobody uses at the moment, and whose neighbour (MinIO's web page) nobody uses either."""
    # Below those that the system gives to connections: one of these would take it before its server does.
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, socket.socket() as neighbour, contextlib.suppress(OSError):
            probe.bind((object_store.HOST, port))
            neighbour.bind((object_store.HOST, port + 1))
            return port


@contextmanager
def running_store(kind: str, folder: Path) -> Iterator[object_store.Server]:
    """A real object store of a kind, while the test needs it."""
    server = object_store.server(kind, folder / "data", free_port(), object_store.Credentials.random())
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            server.command, env={**os.environ, **server.environment}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        server.wait_until_ready(process)
        yield server
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def bucket_of(server: object_store.Server) -> Iterator[Store]:
    """A new bucket of a store, which this process's environment names for a while."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**server.client_environment, "RETRAIN_BUCKET": bucket}.items():
            patch.setenv(name, value)
        store = Store(bucket)
        store.create_bucket()
        yield store


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object_store.Server]:
    """A running MiniStack: what the demo uses where there is no MinIO."""
    with running_store("ministack", tmp_path_factory.mktemp("ministack")) as server:
        yield server


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object_store.Server]:
    """A running MinIO, found in MINIO_BINARY, on PATH or in ~/go/bin."""
    if object_store.find_minio(Path.home() / "go" / "bin") is None:
        pytest.skip("no minio binary in MINIO_BINARY, on PATH or in ~/go/bin")
    with running_store("minio", tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture(params=["ministack", "minio"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """An empty bucket in each kind of store; the steps find it through the environment."""
    with bucket_of(request.getfixturevalue(request.param)) as store:
        yield store


@pytest.fixture(scope="module")
def bucket(ministack: object_store.Server) -> Iterator[Store]:
    """One bucket for all tests of a module, which tell a story in order."""
    with bucket_of(ministack) as store:
        yield store


@pytest.fixture(scope="module")
def airflow_database() -> None:
    """Airflow's tables, for what runs DAGs."""
    from airflow.models.asset import AssetActive
    from airflow.utils import db
    from airflow.utils.session import create_session
    from sqlalchemy import delete

    db.initdb()
    with create_session() as session:  # an asset's name has one address, and each module has a bucket of its own
        session.execute(delete(AssetActive))


# The demo's tiny base model and a few pairs. TensorFlow is imported only by the tests that ask for one of these.

BASE = ROOT / "examples" / "demo" / "base-model"
PROMPT = "translate English to Spanish: "
PAIRS = {
    "My wife has a car.": "Mi esposa tiene un carro.",
    "Where is the computer?": "¿Dónde está la computadora?",
    "They did not drink the juice this morning because it was cold.": "No bebieron el jugo esta mañana.",
    "Yes.": "Sí.",
    "The potatoes cost 10 dollars.": "Las papas cuestan 10 dólares.",
}


@pytest.fixture(scope="session")
def base() -> Path:
    """The directory of a base model of a million parameters."""
    return BASE


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    from tasks.data.tokenizer import load_tokenizer

    return load_tokenizer(base)


@pytest.fixture
def model(base: Path) -> Any:
    from tasks.model import load_model

    return load_model(base)


@pytest.fixture(scope="session")
def rows(tokenizer: Any) -> Dataset:
    """A few tokenised pairs of different lengths."""
    from datasets import Dataset

    encoded = {"input_ids": [PROMPT + source for source in PAIRS], "labels": list(PAIRS.values())}
    return Dataset.from_dict({name: tokenizer(texts)["input_ids"] for name, texts in encoded.items()})
