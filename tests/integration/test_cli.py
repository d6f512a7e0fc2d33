"""The steps as programs: exit codes, the one sentence that is left behind, and what people use besides the steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
from tasks import artifacts, registry
from tasks.__main__ import STEPS, main
from tasks.data.sources import bring, find
from tasks.errors import DataError, SettingsError
from tasks.storage import Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which Kubernetes looks for a pod's last words."""
    path = tmp_path / "termination-log"
    path.touch()
    monkeypatch.setenv("RETRAIN_TERMINATION_LOG", str(path))
    return path


def configure(store: Store, *settings: str) -> int:
    assignments = [f"--set={setting}" for setting in settings]
    return main(["configure", "--run", f"s3://{store.bucket}/runs/r", "--pipeline", "config/demo.yaml", *assignments])


def test_the_very_command_that_is_documented(store: Store) -> None:
    command = [sys.executable, "-m", "tasks", "configure", "--run", f"s3://{store.bucket}/runs/r"]
    ended = subprocess.run(
        [*command, "--pipeline", "config/demo.yaml", "--set", "training.epochs=1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "check the settings" in ended.stderr.splitlines()[0]
    assert "done in" in ended.stderr.splitlines()[-1]
    assert store.get_json("runs/r/config.json")["settings"]["training"]["epochs"] == 1
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert os.environ[name] not in ended.stdout + ended.stderr


def test_configure_again_keeps_the_time_of_the_first(store: Store) -> None:
    assert configure(store) == 0
    config = store.get_json("runs/r/config.json")
    store.put_json("runs/r/config.json", {**config, "created": "2026-01-01T00:00:00+00:00"})
    assert configure(store, "force=true") == 0
    again = store.get_json("runs/r/config.json")
    assert again["created"] == "2026-01-01T00:00:00+00:00"
    assert again["requested"] == {"force": True}


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["configure", "--pipeline", "config/none.yaml"], 78, "config/none.yaml: cannot be read"),
        (["configure", "--pipeline", "config/demo.yaml", "--set", "training.epochs=0"], 78, "training.epochs: "),
        (["configure", "--pipeline", "config/demo.yaml", "--set", "x"], 78, "expected NAME=VALUE"),
        (["train"], 78, "has no config.json: run the configure step first"),
        (["gate"], 65, "has no result of the evaluate step: run it first"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    arguments: list[str], code: int, sentence: str, store: Store, reason: Path
) -> None:
    assert main([*arguments, "--run", f"s3://{store.bucket}/runs/r"]) == code
    assert sentence in reason.read_text()
    assert "\n" not in reason.read_text()
    # Nothing but the reason, for the report.
    assert {entry.key for entry in store.list("runs/")} <= {f"runs/r/failures/{arguments[0]}.json"}


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("configure", "report", "pull")])
def test_a_step_out_of_order_says_which_one_is_missing(step: str, store: Store, reason: Path) -> None:
    assert configure(store) == 0
    assert main([step, "--run", f"s3://{store.bucket}/runs/r"]) == DataError.exit_code
    assert "run it first" in reason.read_text()
    assert not store.exists(f"runs/r/results/{step}.json")


@pytest.mark.parametrize("uri", ["runs/r", "s3://bucket/r", "s3://bucket/runs/", "s3://bucket/runs/a/b"])
def test_a_run_that_is_none_is_refused(uri: str, reason: Path) -> None:
    assert main(["pull", "--run", uri]) == SettingsError.exit_code
    assert "expected s3://" in reason.read_text()


def test_a_store_that_is_away_is_worth_another_try(monkeypatch: pytest.MonkeyPatch, reason: Path) -> None:
    for name, value in {"S3_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    assert main(["pull", "--run", "s3://b/runs/r"]) == 75
    assert "127.0.0.1:9" in reason.read_text()


def test_settings_of_another_version_of_the_code_are_refused(store: Store, reason: Path) -> None:
    assert configure(store) == 0
    config = store.get_json("runs/r/config.json")
    config["settings"]["training"]["momentum"] = 0.9
    store.put_json("runs/r/config.json", config)
    assert main(["pull", "--run", f"s3://{store.bucket}/runs/r"]) == 78
    assert "does not fit this version: training.momentum: is not a setting, found 0.9" in reason.read_text()


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tarin"])
    assert ended.value.code == 2
    assert "invalid choice: 'tarin'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--version"])
    assert tasks.__version__ in capsys.readouterr().out


def test_settings_are_listed_with_what_they_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--pipeline", "config/demo.yaml"]) == 0
    assert "training.epochs = 4\n    Passes over the training pairs\n" in capsys.readouterr().out


def test_models_are_listed_shown_pulled_and_rolled_back(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], reason: Path
) -> None:
    bucket = ["--bucket", store.bucket]
    assert main(["models", "show", "m", *bucket]) == DataError.exit_code
    assert reason.read_text() == "no version of 'm' has been promoted yet"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for version in ("v1", "v2"):
        registry.publish(store, "m", version, tmp_path / "model", {"version": version})
    registry.move(store, "m", "v1", expected=None, who="me", why="first")
    assert main(["models", "alias", "m", "staging", *bucket, "--version", "v2", "--why", "to be tried"]) == 0
    assert capsys.readouterr().out == "m: staging is v2, and was not set\n"
    assert main(["models", "list", "m", *bucket]) == 0
    assert capsys.readouterr().out == "v1  <- production\nv2  <- staging\n"
    assert main(["models", "diff", "m", "production", "staging", *bucket]) == 0
    assert capsys.readouterr().out == 'equal files: 1, 2 bytes\nversion: "v1" -> "v2"\n'
    assert main(["models", "show", "m", *bucket]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "v1"
    assert main(["models", "pull", "m", *bucket, "--version", "v2", "--to", str(tmp_path / "pulled")]) == 0
    assert "m v2 is in" in capsys.readouterr().out
    assert main(["models", "pull", "m", *bucket, "--to", str(tmp_path)]) == SettingsError.exit_code
    assert "is there already" in reason.read_text()
    assert (tmp_path / "model" / "config.json").exists()
    assert (tmp_path / "pulled" / "config.json").exists()
    capsys.readouterr()
    for _ in range(2):  # saying it twice does it once
        assert main(["models", "rollback", "m", *bucket, "--version", "v2", "--why", "v1 is rude"]) == 0
    assert "production is v2" in capsys.readouterr().out
    assert main(["models", "history", "m", *bucket]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert "production: nothing -> v1  by me: first" in first
    assert "staging: nothing -> v2" in second
    assert "production: v1 -> v2" in third
    assert third.endswith(": v1 is rude")
    assert main(["models", "rollback", "m", *bucket, "--why", "v2 is worse"]) == 0
    assert "production is v1, and was v2" in capsys.readouterr().out
    assert main(["models", "alias", "m", "staging", *bucket, "--version", "v1", "--why", "v2 is bad"]) == 0
    assert main(["models", "withdraw", "m", *bucket, "--version", "v2", "--why", "it is rude"]) == 0
    assert main(["models", "rollback", "m", *bucket, "--why", "?"]) == DataError.exit_code
    assert "production of m has no earlier version to go back to" in reason.read_text()
    assert main(["models", "rollback", "m", *bucket, "--version", "v2", "--why", "?"]) == DataError.exit_code
    assert reason.read_text() == "m v2 was withdrawn, and is not to be chosen again"
    capsys.readouterr()
    assert main(["models", "list", "m", *bucket]) == 0
    assert capsys.readouterr().out == "v1  <- production, staging\nv2  <- withdrawn\n"
    assert main(["models", "history", "m", *bucket]) == 0
    assert "  withdraw v2  by " in capsys.readouterr().out
    assert main(["models", "rollback", "m", *bucket, "--version", "v9", "--why", "?"]) == DataError.exit_code
    assert reason.read_text() == "m has no version 'v9'"


# Mirrors


def test_a_mirrored_source_is_used_like_the_original(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"s3://{store.bucket}/mirrors/corpus"
    assert main(["mirror", "examples/demo/corpus", "--kind", "dataset", "--to", uri]) == 0
    assert "4 files" in capsys.readouterr().out
    assert configure(store, f"data.source={uri}", "data.max_train_rows=50", "data.max_eval_rows=5") == 0
    assert main(["pull", "--run", f"s3://{store.bucket}/runs/r"]) == 0
    mirrored = store.get_json("runs/r/results/pull.json")["dataset"]
    assert configure(store, "data.max_train_rows=50", "data.max_eval_rows=5") == 0
    assert main(["pull", "--run", f"s3://{store.bucket}/runs/r"]) == 0
    assert store.get_json("runs/r/results/pull.json")["dataset"] == mirrored
    brought = bring(find(uri, None, "dataset"), tmp_path)
    assert (brought / "en-es" / "test-00000-of-00001.parquet").exists()


@pytest.mark.parametrize(
    ("source", "revision", "code", "sentence"),
    [
        ("no/such-hub-name", None, 75, "the hub did not answer"),
        ("not a name", None, 78, "is no existing directory, no s3:// mirror and no hub name"),
        ("examples/demo/corpus", "805090d", 78, "is a local directory, which has no revision '805090d'"),
        ("s3://{bucket}/mirrors/none", None, 78, "is not a mirror"),
        ("tests", None, 65, "has no *.safetensors: a base model's weights are read from safetensors only"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(
    source: str, revision: str | None, code: int, sentence: str, *, store: Store, reason: Path
) -> None:
    source = source.format(bucket=store.bucket)
    more = ["--revision", revision] if revision else []
    target = f"s3://{store.bucket}/mirrors/m"
    assert main(["mirror", source, "--kind", "model", "--to", target, *more]) == code
    assert sentence in reason.read_text()
    assert not list(store.list("mirrors/m"))


def test_pickled_weights_are_left_behind(store: Store, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model.safetensors", "pytorch_model.bin", "config.json", "tf_model.h5", "run.py"):
        (model / name).write_bytes(b"{}")
    assert main(["mirror", str(model), "--kind", "model", "--to", f"s3://{store.bucket}/mirrors/m"]) == 0
    manifest = artifacts.read_manifest(store, "mirrors/m")
    assert {file.path for file in manifest.files} == {"model.safetensors", "config.json"}
