"""docker-compose.yaml as Docker Compose reads it, with the .env that `make compose-env` writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts import compose_env

ROOT = Path(__file__).resolve().parents[2]
AIRFLOW = ["api-server", "scheduler", "dag-processor", "triggerer"]
ROOT_KEY = {"MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"}


def compose() -> list[str]:
    """The command of Docker Compose 2; it needs no Docker engine to read a file."""
    for command in (["docker", "compose"], [os.environ.get("COMPOSE_BINARY", "docker-compose")]):
        if shutil.which(command[0]):
            version = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            if version.returncode == 0 and version.stdout.lstrip("v").split(".")[0] >= "2":
                return command
    pytest.skip(
        "there is no Docker Compose 2: neither `docker compose`, nor docker-compose on PATH or in COMPOSE_BINARY"
    )


@pytest.fixture
def env(tmp_path: Path) -> Path:
    """What `make compose-env` writes."""
    path = tmp_path / ".env"
    assert compose_env.main(path) == 0
    assert path.stat().st_mode & 0o077 == 0
    return path


def read(env: Path, *files: str, **variables: str) -> dict[str, Any]:
    """The services that would run."""
    arguments = [argument for file in ["docker-compose.yaml", *files] for argument in ("--file", str(ROOT / file))]
    found = subprocess.run(
        [*compose(), "--env-file", str(env), *arguments, "config", "--format", "json"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)["services"]


def test_everything_listens_on_loopback_and_looks_after_itself(env: Path) -> None:
    services = read(env)
    assert set(services) == {*AIRFLOW, "init", "database", "object-store", "object-store-users"}
    assert {port["host_ip"] for service in services.values() for port in service.get("ports", [])} == {"127.0.0.1"}
    for name in [*AIRFLOW, "database"]:
        assert "healthcheck" in services[name]
        assert services[name]["restart"] == "unless-stopped"
    for name in AIRFLOW:
        assert services[name]["depends_on"]["init"]["condition"] == "service_completed_successfully"
        assert services[name]["environment"]["RETRAIN_RUNNER"] == "local"


def test_airflow_does_not_have_the_stores_root_key(env: Path) -> None:
    services = read(env)
    values = dict(line.split("=", 1) for line in env.read_text().splitlines())
    for name, service in services.items():
        if not name.startswith("object-store"):
            assert not ROOT_KEY & set(service["environment"])
            assert values["MINIO_ROOT_PASSWORD"] not in json.dumps(service)
    keys = [values[name] for name in values if name.endswith("ACCESS_KEY") or name == "MINIO_ROOT_PASSWORD"]
    assert len(set(keys)) == 3


def test_the_stores_users_get_the_policies_of_the_documentation(env: Path) -> None:
    mounts = {mount["target"]: Path(mount["source"]) for mount in read(env)["object-store-users"]["volumes"]}
    policies = {path.stem for path in mounts["/policies"].glob("*.json")}
    given = re.findall(r'^.*\ballow "\$\w+" "\$\w+" (.+)$', mounts["/users.sh"].read_text(), re.MULTILINE)
    assert [roles.split() for roles in given] == [["trainer", "promoter", "pruner"], ["reader"]]
    assert policies == {"trainer", "promoter", "pruner", "reader"}


def test_no_password_is_in_the_file(env: Path) -> None:
    services = read(env)
    values = dict(line.split("=", 1) for line in env.read_text().splitlines())
    assert services["database"]["environment"]["POSTGRES_PASSWORD"] == values["POSTGRES_PASSWORD"]
    empty = env.with_name("empty")
    empty.touch()
    with pytest.raises(AssertionError, match="run `make compose-env` first"):
        read(empty)


def test_another_s3_takes_the_place_of_the_object_store(env: Path) -> None:
    services = read(env, COMPOSE_PROFILES="", S3_ENDPOINT_URL="https://s3.example.org")
    assert set(services) == {*AIRFLOW, "init", "database"}
    assert services["scheduler"]["environment"]["S3_ENDPOINT_URL"] == "https://s3.example.org"


def test_steps_can_be_pods_of_a_cluster(env: Path) -> None:
    variables = {"RETRAIN_POD_IMAGE": "registry/trainer:1", "RETRAIN_KUBECONFIG": "/home/me/config"}
    services = read(env, "docker-compose.kubernetes.yaml", **variables)
    for name in AIRFLOW:
        assert services[name]["environment"]["RETRAIN_RUNNER"] == "kubernetes"
        assert services[name]["environment"]["RETRAIN_IMAGE"] == "registry/trainer:1"
        (mount,) = [each for each in services[name]["volumes"] if each["target"] == "/opt/kubeconfig"]
        assert mount["source"] == "/home/me/config"
        assert mount["read_only"]
