"""The judge is hard to deceive: planted faults are refused, each for its own reason, and a better model passes.

The steps run as the orchestrator runs them, on a slice of the demo. What is at fault is a model (its weights, what it
was trained on), or what a model says (damaged in the tables that evaluate kept), or what lies in the store.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset

from tasks import artifacts, registry
from tasks.__main__ import main
from tasks.data.prepared import fetch_prepared
from tasks.data.tokenizer import extend, load_tokenizer
from tasks.evaluate import read_tables
from tasks.gate import check_all
from tasks.judging import metrics
from tasks.model import extend_vocabulary, load_model, save_model
from tasks.run import Run
from tasks.storage import Store

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "config" / "demo.yaml"
SMALL = {"data.max_train_rows": 2500, "data.max_eval_rows": 300, "training.epochs": 3}
Tables = tuple[pd.DataFrame, pd.DataFrame]


def step(run: Run, *names: str) -> int:
    """Run steps; returns the last exit code."""
    code = 0
    for name in names:
        if code := main([*name.split(), "--run", run.uri]):
            break
    return code


def configured(store: Store, run_id: str, pipeline: Path = DEMO, **settings: Any) -> Run:
    run = Run.at(f"s3://{store.bucket}/runs/{run_id}")
    assignments = [f"--set={name}={json.dumps(value)}" for name, value in {**SMALL, **settings}.items()]
    assert main(["configure", "--run", run.uri, "--pipeline", str(pipeline), *assignments]) == 0
    return run


@pytest.fixture(scope="module", autouse=True)
def in_the_repository() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def better(bucket: Store) -> Run:
    """A run whose candidate is better than the base model."""
    run = configured(bucket, "better")
    assert step(run, "pull", "validate", "preprocess", "train", "evaluate", "gate") == 0
    return run


@pytest.fixture
def another(bucket: Store, better: Run, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Run]:
    """A run like the better one up to some step, whose results may be others, perhaps of a model of another name."""

    def begin(
        *, trained: bool = False, model: str = "demo", settings: dict[str, Any] | None = None, **results: dict[str, Any]
    ) -> Run:
        pipeline = tmp_path / "pipeline.yaml"
        pipeline.write_text(DEMO.read_text().replace("name: demo\n", f"name: {model}\n"))
        run_id = request.node.name.replace("[", "-").replace("]", "").replace(" ", "-")
        run = configured(bucket, run_id, pipeline, **settings or {})
        for name in ("pull", "validate", "preprocess", *(["train"] if trained else [])):
            run.save_result(name, {**better.result(name), **results.get(name, {})})
        return run

    return begin


def fetched(run: Run, directory: Path) -> tuple[Any, Any]:
    """The better run's candidate, to be damaged."""
    artifacts.fetch(run.store, run.result("train")["candidate"], directory)
    return load_model(directory), load_tokenizer(directory)


def refused(run: Run) -> set[str]:
    gate = run.result("gate")
    assert (gate["decision"] == "promote") == all(check["passed"] for check in gate["checks"])
    return {check["name"] for check in gate["checks"] if not check["passed"]}


def test_a_better_model_passes(better: Run) -> None:
    assert refused(better) == set()
    found = better.store.get_json(better.key("evaluation", "metrics.json"))
    for system in metrics.SYSTEMS:
        assert found[system]["bleu"]["low"] < found[system]["bleu"]["score"] < found[system]["bleu"]["high"]
    assert found["gain"]["bleu"]["low"] > 5


# A model at fault


@pytest.mark.parametrize("fault", ["shuffled weights", "not a number"])
def test_a_model_with_ruined_weights_is_refused(
    fault: str, better: Run, another: Callable[..., Run], tmp_path: Path
) -> None:
    model, tokenizer = fetched(better, tmp_path / "candidate")
    kernel = model.lm_head.kernel
    values = kernel.numpy()
    kernel.assign(np.random.default_rng(0).permuted(values, axis=1) if fault == "shuffled weights" else values * np.nan)
    save_model(model, tokenizer, tmp_path / "ruined")
    key = f"ruined/{fault}"
    artifacts.publish(better.store, key, tmp_path / "ruined")
    run = another(trained=True, train={"candidate": key})
    assert step(run, "evaluate", "gate") == 0
    assert {"validation loss", "BLEU", "stored model reproduces its loss"} <= refused(run)
    assert step(run, "promote") == 65
    sentences = [check["sentence"] for check in run.result("gate")["checks"] if check["name"] == "validation loss"]
    assert ("There is no value" in sentences[0]) == (fault == "not a number")


def test_an_undertrained_model_is_refused(another: Callable[..., Run]) -> None:
    run = another(settings={"training.learning_rate": 1e-7, "training.epochs": 1})
    assert step(run, "train", "evaluate", "gate") == 0
    assert refused(run) == {"BLEU gain over champion", "BLEU gain not by chance"}


@pytest.mark.parametrize("fault", ["swapped languages", "test set learnt by heart"])
def test_a_model_trained_on_the_wrong_pairs_is_refused(
    fault: str, better: Run, another: Callable[..., Run], tmp_path: Path
) -> None:
    splits = fetch_prepared(better, tmp_path).splits
    if fault == "swapped languages":
        rows = splits["train"].to_dict()
        rows["input_ids"], rows["labels"] = rows["labels"], rows["input_ids"]
    else:
        rows = {name: values * 4 for name, values in splits["test"].to_dict().items()}
    table = Dataset.from_dict(rows, features=splits["train"].features).data.table
    path = tmp_path / "prepared" / "train.arrow"
    path.unlink()
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    key = f"prepared/{fault}"
    artifacts.publish(better.store, key, tmp_path / "prepared", {"rows": better.result("preprocess")["rows"]})
    run = another(preprocess={"prepared": key}, settings={"training.epochs": 15} if fault.startswith("test") else {})
    assert step(run, "train", "evaluate", "gate") == 0
    if fault == "swapped languages":
        assert {"BLEU gain over champion", "BLEU gain not by chance"} <= refused(run)
    else:
        assert refused(run) == {"no leak of the test split"}


# Outputs at fault


def without_some_accents(text: str, every: int = 2) -> str:
    letters, seen = [], 0
    for char in text:
        plain = unicodedata.normalize("NFD", char)[0]
        seen += plain != char
        letters.append(plain if plain != char and seen % every else char)
    return "".join(letters)


def long_ones_empty(table: pd.DataFrame) -> pd.Series:
    """Perfect where it is short, nothing where it is long: BLEU is higher than the honest candidate's."""
    words = table["reference"].str.split().str.len()
    return table["reference"].where(words <= words.quantile(0.97), "")


OUTPUTS: dict[str, tuple[Callable[[pd.DataFrame], pd.Series], set[str]]] = {
    "copies the source": (lambda table: table["source"], {"copied outputs", "BLEU", "BLEU not worse than champion"}),
    "truncated": (lambda table: table["candidate"].str[:12], {"outputs long enough"}),
    "rambling": (lambda table: table["candidate"] + " y algo más", {"outputs short enough"}),
    "half the accents lost": (
        lambda table: table["champion"].map(without_some_accents),
        {"worst slice", "BLEU not worse than champion"},
    ),
    "stuck": (lambda table: table["candidate"].where(table.index % 20 > 0, "no no no no no no"), {"repeating outputs"}),
    "better BLEU, long ones empty": (long_ones_empty, {"empty outputs"}),
    "better loss, worse BLEU": (
        lambda table: table["champion"].str.replace("el ", "la "),
        {"BLEU not worse than champion"},
    ),
}


@pytest.fixture(scope="module")
def tables(better: Run) -> Tables:
    return read_tables(better)


def judged(tables: Tables, run: Run) -> set[str]:
    """What the gate refuses of these translations and losses."""
    found = {
        "trained_validation_loss": metrics.finite(
            metrics.mean_loss(tables[1].query("split == 'validation'"), "candidate")
        ),
        **metrics.measure(*tables, run.settings.gate),
    }
    checks = check_all(
        found,
        run.settings,
        evaluated={"test_fingerprint": found["fingerprint"]},
        data_valid=True,
        reproduced=1.0,
    )
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("fault", OUTPUTS)
def test_bad_outputs_are_refused_though_the_loss_is_good(fault: str, tables: Tables, better: Run) -> None:
    damage, reasons = OUTPUTS[fault]
    translations, losses = tables
    assert judged(tables, better) == set()
    refusals = judged((translations.assign(candidate=damage(translations)), losses), better)
    assert reasons <= refusals
    assert not any("loss" in name for name in refusals)
    if "better BLEU" in fault:
        assert refusals <= {"empty outputs", "outputs long enough"}


def test_tokens_that_stand_for_no_text_are_refused(tables: Tables, better: Run) -> None:
    translations, losses = tables
    unknown = translations["candidate_tokens"] // 10
    assert judged((translations.assign(candidate_unknown=unknown), losses), better) == {"unknown tokens"}


# Too little, or nothing, to judge by


def test_a_test_set_of_one_row_is_refused(tables: Tables, better: Run) -> None:
    assert "enough sentences" in judged((tables[0].head(1), tables[1]), better)


def test_references_that_are_all_empty_are_refused(tables: Tables, better: Run) -> None:
    assert {"BLEU", "outputs short enough"} <= judged((tables[0].assign(reference=""), tables[1]), better)


def test_losses_that_cannot_be_compared_are_refused(tables: Tables, better: Run) -> None:
    refusals = judged((tables[0], tables[1].assign(comparable=False)), better)
    assert {"comparable tokenizers", "validation loss against champion"} <= refusals


def test_a_champion_with_another_tokenizer_is_refused(better: Run, another: Callable[..., Run], tmp_path: Path) -> None:
    artifacts.fetch(better.store, better.result("pull")["base_model"], tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    pieces = content["model"]["vocab"]
    pieces[3:] = [[text if len(text) < 3 else f"unused {row}", score] for row, (text, score) in enumerate(pieces[3:])]
    path.write_text(json.dumps(content))
    artifacts.publish(better.store, "base-models/other-tokenizer", tmp_path / "base")
    run = another(trained=True, pull={"base_model": "base-models/other-tokenizer"})
    assert step(run, "evaluate", "gate") == 0
    assert "comparable tokenizers" in refused(run)


def with_added_characters(base: Path, characters: list[str], directory: Path) -> None:
    """The model in `base` with rows for characters that its tokenizer lacks, as a run makes it."""
    extension = extend(load_tokenizer(base), characters, directory)
    model = load_model(base)
    extend_vocabulary(model, extension)
    save_model(model, load_tokenizer(directory), directory)


def without_pieces(model: Any, tokenizer: Any, characters: str, directory: Path) -> None:
    """A model as the given one whose tokenizer lacks the characters; the rows of their pieces are spare, at the end."""
    save_model(model, tokenizer, directory)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    pieces = content["model"]["vocab"]
    order = sorted(range(len(pieces)), key=lambda row: not set(characters).isdisjoint(pieces[row][0]))
    kept = sum(set(characters).isdisjoint(text) for text, _ in pieces)
    content["model"]["vocab"] = [pieces[row] for row in order[:kept]]
    path.write_text(json.dumps(content))
    embedding, kernel = model.shared.weights[0], model.lm_head.kernel
    embedding.assign(embedding.numpy()[order])
    head = kernel.numpy()[:, order]
    head[:, kept:] = head[:, :1]  # of padding, which is never likely
    kernel.assign(head)
    save_model(model, load_tokenizer(directory), directory)


def make_champion(store: Store, name: str, directory: Path) -> None:
    """Publish a directory as the first version of a model, in production."""
    registry.publish(store, name, "v1", directory, {"metrics": {"candidate": 50.0, "champion": 40.0}})
    registry.move(store, name, "v1", expected=None, who="a test", why="it is the champion")


def test_losses_are_compared_where_champion_and_candidate_write_alike_whatever_rows_they_have_added(
    better: Run, another: Callable[..., Run], tmp_path: Path
) -> None:
    """The champion's data had ñ, the candidate's ¿ as well, which took the row that ñ had."""
    without_pieces(*fetched(better, tmp_path / "candidate"), "ñ¿", tmp_path / "plain")
    with_added_characters(tmp_path / "plain", ["ñ"], tmp_path / "champion")
    with_added_characters(tmp_path / "plain", ["¿", "ñ"], tmp_path / "extended")
    make_champion(better.store, "added", tmp_path / "champion")
    artifacts.publish(better.store, "extended", tmp_path / "extended")
    run = another(trained=True, model="added", train={"candidate": "extended"})
    assert step(run, "evaluate", "gate") == 0
    splits = fetch_prepared(run, tmp_path / "data").splits
    references = [*splits["validation"]["target"], *splits["test"]["target"]]
    alike = read_tables(run)[1]["comparable"].tolist()
    assert alike == ["¿" not in reference for reference in references]
    assert any("ñ" in reference and so for reference, so in zip(references, alike, strict=True))
    found = run.store.get_json(run.key("evaluation", "metrics.json"))
    assert found["comparable"] == pytest.approx(np.mean(alike))
    # The same weights: where both write alike there is no difference, though the losses by their own tokenizers differ.
    assert abs(found["gain"]["validation_loss"]["observed"]) < 0.001
    assert abs(found["candidate"]["validation_loss"] - found["champion"]["validation_loss"]) > 0.005
    assert refused(run).isdisjoint({"comparable tokenizers", "validation loss against champion"})


# What lies in the store


@pytest.mark.parametrize("fault", ["truncated", "a list", "a better score", "no slices", "gone"])
def test_metrics_that_are_damaged_or_tampered_with_are_refused(fault: str, better: Run, caplog: Any) -> None:
    key = better.key("evaluation", "metrics.json")
    content = better.store.get(key)
    found = json.loads(content)
    found["candidate"]["bleu"]["score"] += 1
    damaged = {
        "truncated": content[: len(content) // 2],
        "a list": b"[]",
        "a better score": json.dumps(found).encode(),
        "no slices": json.dumps({name: value for name, value in found.items() if name != "slices"}).encode(),
    }
    try:
        if fault == "gone":
            better.store._client.delete_object(Bucket=better.store.bucket, Key=key)
        else:
            better.store.put(key, damaged[fault])
        assert step(better, "gate") == 65
        assert "metrics.json" in caplog.text
    finally:
        better.store.put(key, content)


def test_a_candidate_that_changed_after_its_evaluation_is_refused(
    better: Run, another: Callable[..., Run], tmp_path: Path, caplog: Any
) -> None:
    run = another(trained=True)
    run.save_result("evaluate", better.result("evaluate"))
    for name in ("metrics.json", "translations.parquet", "losses.parquet"):
        run.store.put(run.key("evaluation", name), better.store.get(better.key("evaluation", name)))
    assert step(run, "gate") == 0
    assert refused(run) == set()
    artifacts.fetch(run.store, run.result("pull")["base_model"], tmp_path / "base")
    artifacts.publish(run.store, "swapped", tmp_path / "base")
    run.save_result("train", {**better.result("train"), "candidate": "swapped"})
    caplog.clear()
    assert step(run, "promote") == 65
    assert "is not the one that the gate let through" in caplog.text
    assert registry.read_pointer(run.store, "demo") is None
    assert step(run, "gate") == 0
    assert refused(Run.at(run.uri)) == {"stored model reproduces its translations"}


def test_numbers_are_recomputed_without_a_model(better: Run) -> None:
    key, result = better.key("evaluation", "metrics.json"), better.result("evaluate")
    before = better.store.get(key)
    better.store.put(key, b"{}")
    assert step(better, "evaluate --recompute") == 0
    assert better.store.get(key) == before
    assert {**result, "seconds": 0} == {**Run.at(better.uri).result("evaluate"), "seconds": 0}


def test_a_dry_run_shows_other_limits_and_leaves_everything_as_it_is(better: Run, capsys: Any) -> None:
    def objects() -> dict[str, bytes]:
        return {entry.key: better.store.get(entry.key) for entry in better.store.list(better.prefix)}

    before = objects()
    assert main(["gate", "--run", better.uri, "--dry-run", "--set", "gate.min_bleu=99.5"]) == 0
    shown = capsys.readouterr().out
    assert "REFUSES  BLEU  " in shown
    assert shown.count("REFUSES") == 1
    assert "would reject" in shown
    assert objects() == before
    assert main(["gate", "--run", better.uri, "--set", "gate.min_bleu=1"]) == 78


def test_extra_test_sets_have_floors_of_their_own(another: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "talks.tsv"
    path.write_text("My wife has a car.\tMi esposa tiene un carro.\nYes.\tSí.\n" * 3)
    sets = {"evaluation.extra_sets": {"talks": str(path)}, "gate.extra_min_bleu": {"talks": 99.9}}
    run = another(trained=True, settings={**sets, "evaluation.engine": "ctranslate2"})
    assert step(run, "evaluate", "gate") == 0
    assert refused(run) == {"BLEU on talks"}
    found = run.store.get_json(run.key("evaluation", "metrics.json"))
    assert found["extra"]["talks"]["sentences"] == 6
    assert found["engine"]["candidate"].startswith("ctranslate2")
    path.write_text("one column\n")
    assert step(run, "evaluate") == 65


# The champion


def test_a_champion_with_damaged_weights_ends_the_evaluation_and_nothing_is_promoted(
    better: Run, another: Callable[..., Run], tmp_path: Path, caplog: Any
) -> None:
    artifacts.fetch(better.store, better.result("train")["candidate"], tmp_path / "champion")
    make_champion(better.store, "damaged", tmp_path / "champion")
    (weights,) = [file for file in registry.manifest(better.store, "damaged", "v1").files if "model" in file.path][:1]
    key = f"{registry.files_prefix('damaged')}/{weights.sha256}"
    content = better.store.get(key)
    better.store.put(key, content[:-1] + bytes([content[-1] ^ 1]))
    run = another(trained=True, model="damaged")
    caplog.clear()
    assert step(run, "evaluate") == 65
    assert f"{weights.sha256} is not the file that its manifest names" in caplog.text
    assert step(run, "gate") == step(run, "promote") == 65
    assert registry.resolve(run.store, "damaged", registry.PRODUCTION) == "v1"


def test_a_champion_translates_once_and_must_be_readable(better: Run, another: Callable[..., Run], caplog: Any) -> None:
    """Last, because it changes production."""
    caplog.set_level("INFO")
    assert step(better, "promote") == 0
    version = registry.resolve(better.store, "demo", registry.PRODUCTION)
    run = another(trained=True)
    caplog.clear()
    assert step(run, "evaluate", "gate") == 0
    assert "champion: loss" in caplog.text
    assert run.result("evaluate")["champion"] == version
    assert refused(run) == {"BLEU gain over champion", "BLEU gain not by chance"}  # it is the same model
    first = run.store.get(run.key("evaluation", "translations.parquet"))
    caplog.clear()
    assert step(run, "evaluate") == 0
    assert "champion: loss" not in caplog.text
    assert run.store.get(run.key("evaluation", "translations.parquet")) == first
    bucket, client = run.store.bucket, run.store._client
    client.delete_object(Bucket=bucket, Key=f"{registry.version_prefix('demo', version)}/{artifacts.MANIFEST}")
    assert step(run, "evaluate") == 65
    assert f"demo has no version '{version}'" in caplog.text
