"""The example service under load, while good and broken models are promoted: no request fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port

from tasks import registry
from tasks.data.tokenizer import load_tokenizer
from tasks.judging import ctranslate
from tasks.storage import Store

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples" / "demo" / "base-model"


def publish(store: Store, tmp_path: Path, version: str, damage: Callable[[Path], Any] = lambda path: None) -> None:
    directory = tmp_path / version
    shutil.copytree(BASE, directory)
    (directory / "README.md").write_text(version)
    damage(directory)
    settings = {"preprocessing": {"prompt": "translate English to Spanish: ", "max_tokens": 32}}
    about = {"version": version, "metrics": {"candidate": 50.0}, "lineage": {"settings": settings}}
    registry.publish(store, "demo", version, directory, about)


def add_int8(directory: Path) -> None:
    ctranslate.convert(directory, load_tokenizer(directory), directory / "ctranslate2", quantization="int8")


def move(store: Store, version: str, before: str | None) -> None:
    registry.move(store, "demo", version, expected=before, who="w", why="y")


@pytest.fixture
def url(bucket: Store, tmp_path: Path) -> Iterator[str]:
    """The running service."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "examples.translate_service.app:app", "--port", str(port)]
    settings = {"MODEL": "demo", "MODELS": str(tmp_path / "models"), "POLL_SECONDS": "0.2"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        text = answer.read().decode()
    return text if url.endswith("/metrics") else json.loads(text)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within four minutes"
        time.sleep(0.2)


def healthy(url: str) -> bool:
    try:
        return ask(f"{url}/health")["status"] == "ok"
    except OSError:  # not started, or no model yet
        return False


def test_models_are_swapped_under_load_and_no_request_fails(bucket: Store, url: str, tmp_path: Path) -> None:
    publish(bucket, tmp_path, "1")
    publish(bucket, tmp_path, "2", add_int8)
    publish(bucket, tmp_path, "3", lambda directory: (directory / "model.safetensors").write_bytes(b"no weights"))
    move(bucket, "1", None)
    until(lambda: healthy(url))
    served = ask(f"{url}/version")
    assert (served["metrics"], served["engine"]) == ({"candidate": 50.0}, "tensorflow")

    answers: Counter[str] = Counter()
    failed: list[BaseException] = []
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            try:
                answer = ask(f"{url}/translate", {"sentences": ["Where is the laptop?", "Good morning."]})
                assert len(answer["translations"]) == 2
                assert all(answer["translations"])
                answers[answer["version"]] += 1
            except BaseException as error:
                failed.append(error)

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        until(lambda: answers["1"] >= 4)
        move(bucket, "2", "1")
        until(lambda: answers["2"] >= 4)
        move(bucket, "3", "2")
        until(lambda: "translate_models_refused_total 1" in ask(f"{url}/metrics"))
        so_far = answers["2"]
        until(lambda: answers["2"] >= so_far + 4)
    finally:
        over.set()
        for client in clients:
            client.join()
    assert failed == []
    assert set(answers) == {"1", "2"}
    assert ask(f"{url}/health")["version"] == "2"
    assert ask(f"{url}/version")["engine"] == "ctranslate2"
    assert not (tmp_path / "models" / "demo" / "2" / "model.safetensors").exists()
    assert ask(f"{url}/translate", {"sentences": ["Where is the laptop?"]})["translations"][0].startswith("¿Dónde está")
    assert 'translate_model_info{version="2"} 1' in ask(f"{url}/metrics")
    for sentences in ([], [""], ["x" * 2001], ["x"] * 65, "x"):
        with pytest.raises(urllib.error.HTTPError, match="422"):
            ask(f"{url}/translate", {"sentences": sentences})
