"""pull, validate and preprocess as programs, on small corpora in the hub's layout and a real store."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import bucket_of, free_port
from huggingface_hub import constants
from stand_in_hub import Hub, running_hub

from scripts.object_store import Server
from tasks import artifacts, registry
from tasks.__main__ import main
from tasks.data.prepared import fetch_prepared
from tasks.data.tokenizer import load_tokenizer
from tasks.errors import RetryableError
from tasks.preprocess import prepare
from tasks.pull import DATASET_MANIFEST
from tasks.run import Run
from tasks.settings import Preprocessing, load
from tasks.storage import Store
from tasks.validate import mark_splits

ROOT = Path(__file__).resolve().parents[2]
Pair = tuple[str | None, str | None]
Make = Callable[..., Path]
WORDS = ("carro", "papa", "jugo", "casa", "hermano", "computadora", "lunes", "piscina", "libro", "perro")
CLEAN: dict[str, list[Pair]] = {
    split: [
        (f"The {word} has {number} {split} things.", f"Mi {word} tiene {number} cosas de {clave}.")
        for word in WORDS
        for number in range(count)
    ]
    for split, count, clave in (("train", 12, "aprender"), ("validation", 11, "mirar"), ("test", 11, "probar"))
}
README = "\n".join(
    [
        *["---", "configs:", "- config_name: en-es", "  data_files:"],
        *(f"  - split: {split}\n    path: en-es/{split}-*" for split in CLEAN),
        "---\n",
    ]
)
SMALL = {"validation.min_train_rows": 100, "validation.min_eval_rows": 100}


@pytest.fixture(autouse=True)
def reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a step leaves the reason of its failure."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "termination-log"
    path.touch()
    monkeypatch.setenv("RETRAIN_TERMINATION_LOG", str(path))
    return path


@pytest.fixture
def store(ministack: Server) -> Iterator[Store]:
    """An empty bucket of one kind of store: that all of them behave alike is tested elsewhere."""
    with bucket_of(ministack) as store:
        yield store


@pytest.fixture
def corpus(tmp_path: Path) -> Make:
    """Write a corpus in the hub's layout; returns its directory."""

    def make(
        splits: dict[str, list[Pair]], *, column: str = "translation", languages: str = "en-es", **how: Any
    ) -> Path:
        directory = Path(tempfile.mkdtemp(dir=tmp_path)) / "corpus"
        (directory / "en-es").mkdir(parents=True)
        (directory / "README.md").write_text(README)
        first, second = languages.split("-")
        for split, pairs in splits.items():
            rows = [{first: source, second: target} for source, target in pairs]
            kind = pa.struct({first: pa.string(), second: pa.string()})
            table = pa.table({column: pa.array(rows, kind)})
            pq.write_table(table, directory / "en-es" / f"{split}-00000-of-00001.parquet", **how)
        return directory

    return make


@pytest.fixture
def step(store: Store) -> Callable[..., int]:
    """Run steps of one run, the first time with the settings; returns the last exit code."""

    def run(*names: str, source: Path | str | None = None, run: str = "r", **settings: Any) -> int:
        uri, code = f"s3://{store.bucket}/runs/{run}", 0
        if source:
            changes = {"data.source": str(source), **SMALL, **settings}
            assignments = [f"--set={name}={json.dumps(value)}" for name, value in changes.items()]
            assert main(["configure", "--run", uri, "--pipeline", "config/demo.yaml", *assignments]) == 0
        for name in names:
            if code := main([name, "--run", uri]):
                break
        return code

    return run


def result(store: Store, name: str, run: str = "r") -> dict[str, Any]:
    return store.get_json(f"runs/{run}/results/{name}.json")


# pull


def test_the_fingerprint_is_that_of_the_rows_not_of_the_files(
    store: Store, corpus: Make, step: Callable[..., int]
) -> None:
    shuffled = {split: random.Random(1).sample(pairs, len(pairs)) for split, pairs in CLEAN.items()}  # noqa: S311
    same = [corpus(CLEAN), corpus(shuffled), corpus(CLEAN, row_group_size=7, compression="gzip")]
    other = [
        corpus({**CLEAN, "train": [*CLEAN["train"][:-1], ("Another sentence.", "Otra frase.")]}),
        corpus({**CLEAN, "train": CLEAN["train"][:-1]}),
        corpus({**CLEAN, "train": [*CLEAN["train"], CLEAN["train"][0]]}),
        corpus({**CLEAN, "validation": CLEAN["test"], "test": CLEAN["validation"]}),
        corpus({**CLEAN, "train": [("", "x"), *CLEAN["train"][1:]]}),
        corpus({**CLEAN, "train": [(None, "x"), *CLEAN["train"][1:]]}),
    ]
    keys = []
    for number, source in enumerate([*same, *other]):
        assert step("pull", source=source, run=f"r{number}") == 0
        keys.append(result(store, "pull", f"r{number}")["dataset"].rsplit("/", 1)[-1])
    assert len(set(keys[: len(same)])) == 1
    assert len(set(keys)) == 1 + len(other)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub-cache", free_port()) as hub:
        yield hub


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The objects that were uploaded or downloaded as files, in order."""
    seen: list[str] = []

    def spy(method: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(store: Store, *arguments: Any, **options: Any) -> Any:
            seen.append(arguments[place])
            return method(store, *arguments, **options)

        return call

    monkeypatch.setattr(Store, "upload", spy(Store.upload, 1))
    monkeypatch.setattr(Store, "read_into", spy(Store.read_into, 0))
    return seen


@pytest.mark.parametrize(("kind", "looks"), [("directory", 0), ("mirror", 0), ("commit", 0), ("branch", 2)])
def test_what_is_in_the_store_already_is_neither_fetched_nor_written_again(
    kind: str, looks: int, *, store: Store, corpus: Make, step: Callable[..., int], hub: Hub, traffic: list[str]
) -> None:
    places, revisions = [str(corpus(CLEAN)), str(ROOT / "examples" / "demo" / "base-model")], ["", ""]
    for number, name in enumerate(("dataset", "model")):
        if kind == "mirror":
            uri = f"s3://{store.bucket}/mirrors/{name}"
            assert main(["mirror", places[number], "--kind", name, "--to", uri]) == 0
            places[number] = uri
        elif kind != "directory":
            commit = hub.commit(f"{name}s/owner/{name}", Path(places[number]))
            places[number], revisions[number] = f"owner/{name}", commit if kind == "commit" else "main"
    settings = dict(zip(("data.revision", "base_model.revision"), (r or None for r in revisions), strict=True))
    settings["base_model.source"] = places[1]

    assert step("pull", source=places[0], run="first", **settings) == 0
    first = result(store, "pull", "first")
    traffic.clear(), hub.requests.clear()
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)  # as on another machine
    assert step("pull", source=places[0], run="again", **settings) == 0
    assert (traffic, len(hub.requests), hub.downloads) == ([], looks, [])
    again = result(store, "pull", "again")
    assert {name: again[name] for name in ("dataset", "base_model", "rows", "revisions")} == {
        name: first[name] for name in ("dataset", "base_model", "rows", "revisions")
    }

    store.delete(f"{first['dataset']}/{DATASET_MANIFEST}")  # which makes it an upload that has not finished
    assert step("pull", source=places[0], run="whole", **settings) == 0
    assert f"{first['dataset']}/train.parquet" in traffic
    assert store.exists(f"{first['dataset']}/{DATASET_MANIFEST}")


def test_a_branch_that_moves_is_pulled_anew_and_its_commit_recorded(
    store: Store, corpus: Make, step: Callable[..., int], hub: Hub
) -> None:
    keys = set()
    for run, content in (("one", CLEAN), ("two", {**CLEAN, "train": CLEAN["train"][1:]})):
        commit = hub.commit("datasets/owner/corpus", corpus(content))
        assert step("pull", source="owner/corpus", run=run, **{"data.revision": "main"}) == 0
        pulled = result(store, "pull", run)
        assert pulled["revisions"] == {"dataset": commit, "base_model": None}
        assert store.get_json(f"{pulled['dataset']}/{DATASET_MANIFEST}")["revision"] == commit
        keys.add(pulled["dataset"])
    assert len(keys) == 2


def test_a_source_is_remembered_with_the_limits_that_it_was_pulled_with(
    store: Store, corpus: Make, step: Callable[..., int]
) -> None:
    source = corpus(CLEAN)
    for run, limit in (("all", None), ("some", 20), ("again", None)):
        assert step("pull", source=source, run=run, **{"data.max_train_rows": limit}) == 0
    rows = [result(store, "pull", run)["rows"]["train"] for run in ("all", "some", "again")]
    assert rows == [len(CLEAN["train"]), 20, len(CLEAN["train"])]


@pytest.mark.parametrize("writes", [0, 2, 3, 4, 8, 12, 13, 14])
def test_a_pull_that_was_interrupted_leaves_nothing_that_looks_complete_and_can_be_run_again(
    writes: int, store: Store, corpus: Make, step: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped after so many writes to the store: by the last, all data is there and only the result is missing."""
    source, done = corpus(CLEAN), 0
    assert step(source=source) == 0

    def stop_after(method: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done > writes:
                raise RetryableError("the power went out")
            return method(*arguments, **options)

        return write

    with monkeypatch.context() as patch:
        for name in ("upload", "put"):
            patch.setattr(Store, name, stop_after(getattr(Store, name)))
        assert step("pull") == 75
    for key in [stored.key for stored in store.list("datasets/")]:
        if key.endswith(DATASET_MANIFEST):  # then every file that it names is there
            artifacts.fetch(store, key.rsplit("/", 1)[0], tmp_path / "early", manifest_name=DATASET_MANIFEST)
    assert step("pull") == 0
    artifacts.fetch(store, result(store, "pull")["dataset"], tmp_path / "data", manifest_name=DATASET_MANIFEST)
    assert len(pd.read_parquet(tmp_path / "data" / "train.parquet")) == len(CLEAN["train"])


def test_limits_take_rows_from_all_over_the_corpus_and_always_the_same(
    store: Store, corpus: Make, step: Callable[..., int], tmp_path: Path
) -> None:
    for run in ("one", "two"):
        limits = {"data.max_train_rows": 20, "data.max_eval_rows": 5}
        assert step("pull", source=corpus(CLEAN), run=run, **limits) == 0
    first, second = (result(store, "pull", run) for run in ("one", "two"))
    assert first["dataset"] == second["dataset"]
    assert first["rows"] == {"train": 20, "validation": 5, "test": 5}
    artifacts.fetch(store, first["dataset"], tmp_path / "data", manifest_name=DATASET_MANIFEST)
    taken = pd.read_parquet(tmp_path / "data" / "train.parquet")["source"]
    assert taken.str.split().str[1].nunique() > 4


def without(split: str) -> dict[str, list[Pair]]:
    return {name: pairs for name, pairs in CLEAN.items() if name != split}


@pytest.mark.parametrize(
    ("content", "how", "settings", "sentence"),
    [
        (CLEAN, {}, {"data.pair": "en-fr"}, "data.pair: .* has no usable pair 'en-fr'"),
        (CLEAN, {"column": "text"}, {}, "the train split needs a column 'translation' with en and es, found"),
        (CLEAN, {"languages": "en-fr"}, {}, "the train split needs a column 'translation' with en and es, found"),
        ({**CLEAN, "test": []}, {}, {}, 'a split is empty: Instruction "test"'),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(
    content: dict[str, list[Pair]],
    how: dict[str, Any],
    settings: dict[str, Any],
    sentence: str,
    *,
    store: Store,
    corpus: Make,
    step: Callable[..., int],
    reason: Path,
) -> None:
    assert step("pull", source=corpus(content, **how), **settings) == 65
    assert re.search(sentence, reason.read_text())
    assert not list(store.list("datasets/"))


@pytest.mark.parametrize("fault", ["missing split", "unreadable file"])
def test_a_corpus_with_a_broken_file_is_refused(
    fault: str, store: Store, corpus: Make, step: Callable[..., int], reason: Path
) -> None:
    source = corpus(CLEAN)
    file = source / "en-es" / "test-00000-of-00001.parquet"
    if fault == "missing split":
        file.unlink()
    else:
        file.write_bytes(b"PAR1 this is no parquet")
    assert step("pull", source=source) == 65
    assert str(source) in reason.read_text()
    assert not list(store.list("datasets/"))


def promote(store: Store, inputs: str) -> None:
    """Put something into production that was trained from these inputs."""
    store.put_json("models/demo/versions/v/manifest.json", {"files": [], "lineage": {"inputs": inputs}})
    registry.move(store, "demo", "v", expected=None, who="another run", why="first")


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, False),
        ({"gate.min_bleu": 1, "evaluation.batch_size": 3}, False),
        ({"force": True}, True),
        ({"training.seed": 7}, True),
        ({"preprocessing.max_tokens": 32}, True),
        ({"validation.max_characters": 100}, True),
        ({"data.max_train_rows": 110}, True),
    ],
)
def test_a_run_goes_on_only_if_something_that_training_depends_on_has_changed(
    settings: dict[str, Any], changed: bool, *, bucket: Store, corpus: Make
) -> None:
    source = corpus(CLEAN)

    def pull(run: str, **settings: Any) -> dict[str, Any]:
        uri = f"s3://{bucket.bucket}/runs/{run}"
        changes = {"data.source": str(source), **settings}
        assignments = [f"--set={name}={json.dumps(value)}" for name, value in changes.items()]
        assert main(["configure", "--run", uri, "--pipeline", "config/demo.yaml", *assignments]) == 0
        assert main(["pull", "--run", uri]) == 0
        return result(bucket, "pull", run)

    first = pull("first")
    if not registry.read_pointer(bucket, "demo"):
        assert first["changed"]
        promote(bucket, first["inputs"])
    assert pull("second", **settings)["changed"] is changed


# validate and preprocess


def test_clean_data_passes_and_is_tokenised(
    store: Store, corpus: Make, step: Callable[..., int], tmp_path: Path
) -> None:
    assert step("pull", "validate", "preprocess", source=corpus(CLEAN)) == 0
    assert result(store, "validate")["usable"] == {split: len(pairs) for split, pairs in CLEAN.items()}
    page = store.get("runs/r/validation/docs/index.html").decode()
    assert "<html" in page
    prepared = result(store, "preprocess")
    assert prepared["rows"] == {split: len(pairs) for split, pairs in CLEAN.items()}
    assert sum(prepared["truncated"].values()) == 0
    rows = fetch_prepared(Run.at(f"s3://{store.bucket}/runs/r"), tmp_path).splits["train"]
    assert set(rows.column_names) == {"source", "target", "input_ids", "labels"}
    assert all(ids[-1] == 1 for column in ("input_ids", "labels") for ids in rows[column])


def test_bad_pairs_are_set_aside_with_reasons_and_never_trained_on(
    store: Store, corpus: Make, step: Callable[..., int], tmp_path: Path
) -> None:
    bad: list[Pair] = [
        (None, "nada"),
        ("<b>bold</b> words here", "palabras\u0007"),
        ("Madrid", "Madrid"),
        CLEAN["test"][0],
    ]
    mended = ("A&ntilde;o nuevo,  “vida” nueva.", "New Year, new life.")
    source = corpus({**CLEAN, "train": [*bad, *CLEAN["train"], mended]})
    assert step("pull", "validate", "preprocess", source=source) == 0
    store.download("runs/r/validation/quarantine.parquet", tmp_path / "q.parquet")
    table = pd.read_parquet(tmp_path / "q.parquet")
    assert table["split"].tolist() == ["train"] * 4
    assert table["row"].tolist() == [0, 1, 2, 3]
    assert table["reasons"].tolist() == ["blank", "markup, damaged", "identical", "leaked"]
    assert table["evidence"][1] == "markup: <b>; damaged: U+0007"
    page = store.get("runs/r/validation/index.html").decode()
    assert "The data is fit for training" in page
    assert "&lt;b&gt;bold&lt;/b&gt; words here" in page
    assert "<b>" not in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)  # needs no network
    assert table["source"][1:3].tolist() == ["<b>bold</b> words here", "Madrid"]
    rows = fetch_prepared(Run.at(f"s3://{store.bucket}/runs/r"), tmp_path).splits["train"]
    assert rows.num_rows == len(CLEAN["train"]) + 1
    assert rows["source"][-1] == 'Año nuevo, "vida" nueva.'
    assert result(store, "validate")["quarantined"]["entity"] == 1


def test_characters_that_the_tokenizer_lacks_get_spare_embedding_rows(
    store: Store, corpus: Make, step: Callable[..., int], tmp_path: Path
) -> None:
    model = tmp_path / "base"
    shutil.copytree(ROOT / "examples" / "demo" / "base-model", model)
    config = json.loads((model / "config.json").read_text())
    config["vocab_size"] += 2
    (model / "config.json").write_text(json.dumps(config))
    pairs = {split: [(source, f"ł{target}") for source, target in CLEAN[split]] for split in CLEAN}
    pairs["train"][:3] = [(source, f"δ{target}ж") for source, target in CLEAN["train"][:3]]
    pairs["train"][0] = ("ЯЯЯ", "ЯЯЯ")  # set aside: its characters do not count
    pairs["train"][5] = (CLEAN["train"][5][0], f"{CLEAN['train'][5][1]} Ω")
    source = corpus(pairs)
    assert step("pull", "validate", "preprocess", source=source, **{"base_model.source": str(model)}) == 0
    assert result(store, "validate")["characters"] == {"added": ["ł", "δ"], "left_out": {"ж": 2, "Ω": 1}}
    prepared = fetch_prepared(Run.at(f"s3://{store.bucket}/runs/r"), tmp_path)
    assert [(row["char"], row["id"]) for row in prepared.extension] == [("ł", 2400), ("δ", 2401)]
    tokenizer = load_tokenizer(prepared.tokenizer)
    for rows in prepared.splits.values():
        for labels, target in zip(rows["labels"][:], rows["target"][:], strict=True):
            decoded = tokenizer.decode(labels, skip_special_tokens=True)
            assert decoded == target or set(target) & {"ж", "Ω"}


def test_preprocessing_the_same_again_is_one_look_up(
    store: Store, corpus: Make, step: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = corpus(CLEAN)
    assert step("pull", "validate", "preprocess", source=source) == 0
    assert step("pull", "validate", source=source, run="again") == 0
    written: list[str] = []
    monkeypatch.setattr(Store, "upload", lambda _, path, key: written.append(key))
    assert step("preprocess", run="again") == 0
    assert written == []
    assert result(store, "preprocess", "again")["prepared"] == result(store, "preprocess")["prepared"]
    assert step("pull", source=source, run="short", **{"preprocessing.max_tokens": 12}) == 0


@pytest.mark.parametrize(
    ("splits", "settings", "sentence"),
    [
        ({}, {"validation.min_train_rows": 10_000}, "train: 120 usable pairs, at least 10,000 are needed"),
        ({}, {"validation.min_eval_rows": 10_000}, "validation: 110 usable pairs, at least 10,000 are needed"),
        (
            {"train": [*CLEAN["train"], *[(f"Madrid {n}", f"Madrid {n}") for n in range(40)]]},
            {"validation.max_quarantine": 0.5},
            "train: identical in 25% of the pairs, at most 5% may (both sides are the same text",
        ),
        (
            {"train": [*CLEAN["train"], *[(f"Madrid {n}", f"Madrid {n}") for n in range(40)]]},
            {"validation.mostly_by_rule": {"identical": 0.5}},
            "train: set_aside is 25%, at most 10% is allowed (few pairs may be set aside",
        ),
        (
            {"validation": [(source, f"{target} 漢字仮名漢字仮名") for source, target in CLEAN["validation"]]},
            {},
            "(what the tokenizer cannot express, no training can teach)",
        ),
        (
            {"test": [("The same question?", target) for _, target in CLEAN["test"]]},
            {},
            "test: conflicting is 100%, at most 50% is allowed (a source with several translations",
        ),
    ],
)
def test_a_corpus_that_is_not_fit_stops_the_run_and_says_why(
    splits: dict[str, list[Pair]],
    settings: dict[str, Any],
    sentence: str,
    *,
    store: Store,
    corpus: Make,
    step: Callable[..., int],
    reason: Path,
) -> None:
    assert step("pull", "validate", source=corpus({**CLEAN, **splits}), **settings) == 65
    assert sentence in reason.read_text()
    found = re.findall(r"(?:train|validation|test): (.*?) \(", reason.read_text())
    assert len(set(found)) == 1  # that, and no other
    assert f"s3://{store.bucket}/runs/r/validation/index.html" in reason.read_text()
    for name in ("index.html", "docs/index.html", "result.json", "quarantine.parquet"):
        assert store.exists(f"runs/r/validation/{name}")
    assert Run.at(f"s3://{store.bucket}/runs/r").find_result("validate") is None


def put_into_production(store: Store, dataset: str | None) -> None:
    """A version that was trained on a dataset."""
    lineage = {"inputs": "others", "dataset": dataset}
    store.put_json("models/demo/versions/v/manifest.json", {"files": [], "lineage": lineage})
    registry.move(store, "demo", "v", expected=None, who="another run", why="first")


def test_drift_from_production_is_always_reported_and_fails_beyond_its_limits(
    store: Store, corpus: Make, step: Callable[..., int], reason: Path
) -> None:
    assert step("pull", "validate", source=corpus(CLEAN)) == 0
    assert result(store, "validate")["drift"] is None  # nothing in production yet
    put_into_production(store, result(store, "pull")["dataset"])

    longer = corpus({**CLEAN, "train": [(f"{s} ({s})", f"{t} ({t})") for s, t in CLEAN["train"][1:]]})
    assert step("pull", "validate", source=longer, run="reported") == 0
    drift = result(store, "validate", "reported")["drift"]
    assert 0 < drift["rows"] < 0.01
    assert drift["lengths"] == 1
    assert step("pull", "validate", source=longer, run="limited", **{"validation.max_length_drift": 0.2}) == 65
    assert "train: drift_lengths is 1, at most 0.2 is allowed (the lengths must not be far" in reason.read_text()


def test_production_whose_dataset_is_gone_is_no_obstacle(store: Store, corpus: Make, step: Callable[..., int]) -> None:
    put_into_production(store, "datasets/corpus/en-es/gone")
    assert step("pull", "validate", source=corpus(CLEAN)) == 0
    assert result(store, "validate")["drift"] is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda table: table.rename(columns={"target": "es"}),
            "the columns are source, es; expected source, target",
        ),
        (lambda table: table.assign(extra=1), "the columns are source, target, extra; expected source, target"),
        (lambda table: table.assign(target=3), "target holds int64, expected text (a side is text)"),
        (lambda table: table.assign(source=b"bytes"), "source holds object, expected text (a side is text)"),
        (lambda table: table.iloc[:-1], "109 pairs, expected 110 (every pair that was pulled is looked at)"),
    ],
)
def test_a_dataset_that_is_not_as_pull_wrote_it_is_refused(
    change: Callable[[pd.DataFrame], pd.DataFrame],
    sentence: str,
    *,
    store: Store,
    corpus: Make,
    step: Callable[..., int],
    reason: Path,
    tmp_path: Path,
) -> None:
    assert step("pull", source=corpus(CLEAN)) == 0
    key = result(store, "pull")["dataset"]
    artifacts.fetch(store, key, tmp_path / "data", manifest_name=DATASET_MANIFEST)
    change(pd.read_parquet(tmp_path / "data" / "test.parquet")).to_parquet(
        tmp_path / "data" / "test.parquet", index=False
    )
    artifacts.publish(store, f"{key}-other", tmp_path / "data", {}, manifest_name=DATASET_MANIFEST)
    run = Run.at(f"s3://{store.bucket}/runs/r")
    run.save_result("pull", {**run.result("pull"), "dataset": f"{key}-other"})
    assert step("validate") == 65
    assert f"training: test: {sentence}" in reason.read_text()
    for name in ("index.html", "docs/index.html", "result.json", "quarantine.parquet"):
        assert store.exists(f"runs/r/validation/{name}")
    page = html.unescape(store.get("runs/r/validation/index.html").decode())
    assert sentence in page
    assert page.count(" fails</td>") == page.count('<p class="bad">')


def test_each_rule_has_a_limit_of_its_own(store: Store, corpus: Make, step: Callable[..., int], reason: Path) -> None:
    """One pair in a hundred is refused where the file says so, and all of them where preprocessing mends them."""
    composed = [(source, unicodedata.normalize("NFD", f"{target} ¿Qué?")) for source, target in CLEAN["test"]]
    source = corpus({**CLEAN, "test": composed, "train": [("Madrid", "Madrid"), *CLEAN["train"]]})
    assert step("pull", "validate", source=source) == 0
    assert result(store, "validate")["quarantined"]["not_composed"] == len(composed)
    limits = {"validation.mostly_by_rule": {"identical": 0.995, "not_composed": 0.5}}
    assert step("pull", "validate", source=source, run="strict", **limits) == 65
    assert "train: identical in 0.826% of the pairs, at most 0.5% may" in reason.read_text()
    assert "test: not_composed in 100% of the pairs, at most 50% may" in reason.read_text()
    assert result(store, "pull", "strict")["changed"]


def test_what_is_prepared_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    pairs = CLEAN["train"] * 50
    texts = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"source": [s for s, _ in pairs], "target": [t for _, t in pairs]}), texts)
    tokenizer = load_tokenizer(ROOT / "examples" / "demo" / "base-model").backend_tokenizer
    settings = Preprocessing(prompt="translate: ", max_tokens=16)
    outputs = [tmp_path / f"{processes}.arrow" for processes in (1, 2)]
    for processes, output in enumerate(outputs, 1):
        prepare(texts, np.array([3, 5]), output, tokenizer=tokenizer, settings=settings, processes=processes)
    assert len({output.read_bytes() for output in outputs}) == 1


def test_marks_do_not_depend_on_the_number_of_processes(corpus: Make, tmp_path: Path) -> None:
    directory = corpus({**CLEAN, "train": [*CLEAN["train"] * 2, *CLEAN["test"]]})
    files = {}
    for split in CLEAN:
        rows = pq.read_table(directory / "en-es" / f"{split}-00000-of-00001.parquet")["translation"].to_pylist()
        files[split] = tmp_path / f"{split}.parquet"
        pq.write_table(pa.table({"source": [r["en"] for r in rows], "target": [r["es"] for r in rows]}), files[split])
    settings = load(ROOT / "config" / "demo.yaml")
    one, two = (mark_splits(files, settings, processes) for processes in (1, 2))
    for split in CLEAN:
        pd.testing.assert_frame_equal(one[split], two[split])
    assert int(one["train"]["duplicate"].notna().sum()) == len(CLEAN["train"])
    assert int(one["train"]["leaked"].notna().sum()) == len(CLEAN["test"])


def test_long_sentences_are_cut_and_counted(
    store: Store, corpus: Make, step: Callable[..., int], tmp_path: Path
) -> None:
    assert step("pull", "validate", "preprocess", source=corpus(CLEAN), **{"preprocessing.max_tokens": 12}) == 0
    prepared = result(store, "preprocess")
    assert prepared["truncated"]["train"] > 0
    for rows in fetch_prepared(Run.at(f"s3://{store.bucket}/runs/r"), tmp_path).splits.values():
        assert max(map(len, rows["input_ids"])) == 12
        assert all(ids[-1] == 1 for ids in rows["input_ids"])
