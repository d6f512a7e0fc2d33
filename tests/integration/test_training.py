"""The train step on the demo's tiny model, as a process: what it leaves, and that nothing it has done can be lost."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import train_process
import yaml
from conftest import bucket_of, free_port, running_store

from tasks import artifacts
from tasks.__main__ import main
from tasks.errors import RetryableError, SettingsError
from tasks.run import Run
from tasks.storage import Store
from tasks.training.checkpoints import Checkpoints
from tasks.training.fit import Trainer

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "data.max_train_rows": 1200,
    "data.max_eval_rows": 120,
    "data.licence": "CC-BY-2.0",
    "base_model.licence": "MIT",
    "training.epochs": 3,
    "training.batch_size": 32,
    "training.checkpoint_minutes": 0.001,
}
Begin = Callable[..., Run]


@pytest.fixture(scope="module")
def begin(bucket: Store) -> Begin:
    """A run that has done every step before train; the same settings give the same data."""

    def prepare(name: str, **settings: Any) -> Run:
        run = Run.at(f"s3://{bucket.bucket}/runs/{name}")
        asked = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
        assignments = [f"--set={key}={json.dumps(value)}" for key, value in asked.items()]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            assert main(["configure", "--run", run.uri, "--pipeline", "config/demo.yaml", *assignments]) == 0
            for step in ("pull", "validate", "preprocess"):
                assert main([step, "--run", run.uri]) == 0
        return Run(run.store, run.prefix)

    return prepare


@pytest.fixture(scope="module")
def undisturbed(begin: Begin) -> Run:
    """A run whose training nobody interrupted, by the very command that the orchestrator runs."""
    run = begin("undisturbed")
    command = [sys.executable, "-m", "tasks", "train", "--run", run.uri]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return run


def outcome(run: Run) -> tuple[Any, Any]:
    """What training found, and the candidate's files to the last bit."""
    result = run.store.get_json(run.key("results", "train.json"))
    manifest = artifacts.read_manifest(run.store, run.key("candidate"))
    return result["epochs"], [vars(file) for file in manifest.files]


def checkpoints(run: Run) -> list[str]:
    return [entry.key for entry in run.store.list(run.key("checkpoints/")) if entry.key.endswith("/manifest.json")]


# What comes out


def test_the_candidate_is_a_directory_to_load_with_its_story(undisturbed: Run, tmp_path: Path) -> None:
    artifacts.fetch(undisturbed.store, undisturbed.key("candidate"), tmp_path / "candidate")
    names = {path.name for path in (tmp_path / "candidate").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "training.json", "loss.svg"} <= names
    assert {name for name in names if name.endswith(".safetensors")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert "extension.json" not in names
    _, front_matter, card = (tmp_path / "candidate" / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front_matter)
    result = undisturbed.result("train")
    assert (about["language"], about["base_model"]) == (["en", "es"], "examples/demo/base-model")
    for row in result["epochs"]:
        assert f"| {row['epoch']} | " in card
        assert f"{row['validation_loss']:.4f}" in card
    assert "{{" not in card
    assert "Base model: MIT. Data: CC-BY-2.0." in card
    assert f"moved by {result['weight_change']:.4f} of their length" in card
    assert "translate English to Spanish: " in card


def test_the_result_says_what_learned_and_how_far_it_moved(undisturbed: Run) -> None:
    result = undisturbed.result("train")
    assert {row["layer"]: row["trainable"] > 0 for row in result["parameters"]} == {
        "shared": False, "encoder": False, "decoder": False, "lm_head": True,
    }  # fmt: skip
    assert 0 < result["weight_change"] < 1
    assert result["validation_loss"] == pytest.approx(min(row["validation_loss"] for row in result["epochs"]), abs=0.01)


def test_tensorboard_can_show_the_curves(undisturbed: Run, tmp_path: Path) -> None:
    files = [entry.key for entry in undisturbed.store.list(undisturbed.key("tensorboard/"))]
    assert files
    curves: dict[str, list[float]] = {}
    for key in files:
        undisturbed.store.download(key, tmp_path / "events")
        for record in tf.data.TFRecordDataset(str(tmp_path / "events")):
            for value in tf.compat.v1.Event.FromString(record.numpy()).summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                curves.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    table = undisturbed.result("train")["epochs"]
    assert curves["loss/validation"] == pytest.approx([row["validation_loss"] for row in table], rel=1e-6)
    assert len(curves["loss/step"]) == 3 * -(-undisturbed.result("preprocess")["rows"]["train"] // 32)


# What was computed once is not computed again


def test_next_week_only_new_pairs_go_through_the_trunk(
    undisturbed: Run, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    first = undisturbed.result("preprocess")["rows"]
    week = begin("next-week", data__max_train_rows=1260)
    with caplog.at_level(logging.INFO):
        assert main(["train", "--run", week.uri]) == 0
    line = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("decoder states:"))
    computed = int(line.split(" for ")[2].split(" pairs")[0].replace(",", ""))
    wanted = int(line.split(" for ")[1].split(" pairs")[0].replace(",", ""))
    assert wanted > first["train"]
    assert 0 < computed < wanted  # the sample is another, so most but not all pairs are known


@pytest.mark.parametrize("how", ["off", "run"])
def test_states_from_the_store_change_nothing(how: str, undisturbed: Run, begin: Begin) -> None:
    run = begin(f"states-{how}", training__decoder_states=how)
    assert main(["train", "--run", run.uri]) == 0
    expected = [row["validation_loss"] for row in undisturbed.result("train")["epochs"]]
    found = [row["validation_loss"] for row in run.store.get_json(run.key("results", "train.json"))["epochs"]]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.fixture
def reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the step leaves its last sentence."""
    path = tmp_path / "reason"
    path.touch()
    monkeypatch.setenv("RETRAIN_TERMINATION_LOG", str(path))
    return path


@pytest.fixture(scope="module")
def short(begin: Begin) -> Run:
    """A run whose training lacks something."""
    return begin("short", training__decoder_states="run")


def test_too_little_disk_is_said_before_anything_is_computed(
    short: Run, monkeypatch: pytest.MonkeyPatch, reason: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    full = SimpleNamespace(disk_usage=lambda path: usage(10**6, 10**6 - 1000, 1000))
    monkeypatch.setattr("tasks.training.decoder_states.shutil", full)
    assert main(["train", "--run", short.uri]) == RetryableError.exit_code
    assert re.search(r"decoder states need [\d.]+ MB in .*, where 1 KB are free: .*_states to off", reason.read_text())
    assert not short.store.exists(short.key("candidate", "manifest.json"))


def test_more_disk_than_the_pod_may_use_is_refused_though_the_node_has_it(
    short: Run, monkeypatch: pytest.MonkeyPatch, reason: Path
) -> None:
    monkeypatch.setenv("RETRAIN_DISK_LIMIT", "1000")
    assert main(["train", "--run", short.uri]) == SettingsError.exit_code
    assert re.search(r"decoder states need [\d.]+ MB, and the step may use 1 KB of disk: raise", reason.read_text())


def test_too_little_memory_is_said(short: Run, monkeypatch: pytest.MonkeyPatch, reason: Path) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *_: tf.zeros([2**45]))  # more than any machine has
    assert main(["train", "--run", short.uri]) == SettingsError.exit_code
    assert "training needed more memory than there is: lower training.batch_size" in reason.read_text()
    assert not short.store.exists(short.key("candidate", "manifest.json"))


def test_a_disk_that_fills_up_is_said_and_leaves_nothing_to_believe(
    short: Run, undisturbed: Run, tmp_path: Path, reason: Path
) -> None:
    """A real one, on which the base model fits, but not the candidate beside it."""
    mount = 'mount -t tmpfs -o size=8m t "$TMPDIR" && exec "$@"'
    on_small_disk = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    (disk := tmp_path / "disk").mkdir()
    environment = {**os.environ, "TMPDIR": str(disk)}
    if subprocess.run([*on_small_disk, "true"], env=environment, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    command = [*on_small_disk, sys.executable, "-m", "tasks", "train", "--run", short.uri]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == RetryableError.exit_code, ended.stderr[-3000:]
    assert f"the disk of {disk} is full: give the step more disk" in reason.read_text()
    assert not short.store.exists(short.key("candidate", "manifest.json"))
    assert main(["train", "--run", short.uri]) == 0
    assert outcome(short) == outcome(undisturbed)


# Nothing is lost


def test_killed_ten_times_it_ends_as_if_it_never_had_been(undisturbed: Run, begin: Begin, tmp_path: Path) -> None:
    run = begin("killed")
    log = tmp_path / "log"
    log.touch()
    chance = random.Random(0)  # noqa: S311
    for kill in range(10):
        process = train_process.start(run.uri, log)
        if kill % 2:  # somewhere after it has written a checkpoint, which may be in the midst of the next
            written = log.read_text().count("checkpoint at step")
            while log.read_text().count("checkpoint at step") == written and process.is_alive():
                time.sleep(0.01)
        process.join(chance.uniform(0, 1 if kill % 2 else 8))
        if process.is_alive():
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        else:  # it came to its end; what it left is looked at, and the next one starts from nothing
            assert process.exitcode == 0, log.read_text()[-3000:]
            assert outcome(run) == outcome(undisturbed)
            for entry in list(run.store.list(run.key("checkpoints/"))):
                run.store.delete(entry.key)
    process = train_process.start(run.uri, log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert "going on from a checkpoint" in log.read_text()
    assert outcome(run) == outcome(undisturbed)


def test_sigterm_leaves_a_checkpoint_and_asks_for_another_try(undisturbed: Run, begin: Begin, tmp_path: Path) -> None:
    run = begin("evicted", training__checkpoint_minutes=60)
    (tmp_path / "log").touch()
    process = train_process.start(run.uri, tmp_path / "log")
    while "epoch 0:" not in (tmp_path / "log").read_text() and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == RetryableError.exit_code, (tmp_path / "log").read_text()[-3000:]
    assert "stopped by SIGTERM" in (tmp_path / "log").read_text()
    assert len(checkpoints(run)) == 1
    assert not run.store.exists(run.key("candidate", "manifest.json"))
    process = train_process.start(run.uri, tmp_path / "second")
    process.join()
    assert process.exitcode == 0
    assert "going on from a checkpoint" in (tmp_path / "second").read_text()
    assert outcome(run) == outcome(undisturbed)


def test_the_one_before_the_last_stays_though_the_last_is_written_twice(undisturbed: Run) -> None:
    """As when the clock's turn falls on an epoch's end."""
    kept = Checkpoints(undisturbed.store, "runs/twice/checkpoints", "this", minutes=1)
    for step in (1, 2, 3, 3):
        kept.save(step, {"weight": np.zeros(2, np.float32)}, {})
    run = Run(undisturbed.store, "runs/twice")
    assert [key.split("/")[-2] for key in checkpoints(run)] == ["00000002", "00000003"]


def test_training_goes_on_while_the_store_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    arrays = {"weight": np.arange(3, dtype=np.float32)}
    with running_store("ministack", tmp_path) as server, bucket_of(server) as store:
        kept = Checkpoints(store, "checkpoints", "this", minutes=1)
        with pytest.MonkeyPatch.context() as nowhere:
            nowhere.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
            away = Checkpoints(Store(store.bucket), "checkpoints", "this", minutes=1)
        away.save(1, arrays, {"step": 1})
        assert "no checkpoint could be written; training goes on without" in caplog.text
        assert not away.is_due()  # it is not tried again at every step
        kept.save(2, arrays, {"step": 2})
        found = kept.latest({"weight": (3,)})
    assert found is not None
    assert found[1] == {"step": 2}


@pytest.mark.parametrize("fault", ["no manifest", "damaged", "of other settings", "garbage"])
def test_a_checkpoint_that_is_not_to_be_trusted_is_ignored(
    fault: str, undisturbed: Run, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    run, store = begin(f"fault-{fault.replace(' ', '-')}"), undisturbed.store
    newest = checkpoints(undisturbed)[-1].removesuffix("manifest.json")
    for name in ("state.safetensors", "manifest.json"):  # a whole one, but the training's end is not its beginning
        data = store.get(newest + name)
        if fault == "damaged" and name == "state.safetensors":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "of other settings" and name == "manifest.json":
            data = json.dumps({**json.loads(data), "identity": "0" * 64}).encode()
        if fault == "garbage" and name == "manifest.json":
            data = b"\x80\x04"
        if not (fault == "no manifest" and name == "manifest.json"):
            store.put(run.key("checkpoints", "99999999", name), data)
    with caplog.at_level(logging.WARNING):
        assert main(["train", "--run", run.uri]) == 0
    assert [
        record for record in caplog.records if "99999999" in record.getMessage() and "ignored" in record.getMessage()
    ]
    assert "going on from" not in caplog.text
    assert outcome(run) == outcome(undisturbed)
    assert len(checkpoints(run)) == 2  # the last two, and what was not to be trusted is gone
    assert not list(store.list(run.key("checkpoints", "99999999")))


def test_run_again_after_the_end_it_finds_the_same(undisturbed: Run) -> None:
    before = outcome(undisturbed)
    assert main(["train", "--run", undisturbed.uri]) == 0
    assert outcome(undisturbed) == before
