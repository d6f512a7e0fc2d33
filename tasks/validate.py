"""validate: prove that the corpus is fit to train on, and set aside the pairs that are not.

    python -m tasks validate --run s3://retrain/runs/RUN_ID

Reads    datasets/NAME/PAIR/FINGERPRINT/*.parquet, the base model's tokenizer, the dataset behind production
Writes   runs/RUN_ID/validation/result.json          what Great Expectations found, split by split
         runs/RUN_ID/validation/index.html           the same for people, with examples; needs no network
         runs/RUN_ID/validation/docs/index.html      the same as Great Expectations' Data Docs
         runs/RUN_ID/validation/quarantine.parquet   the pairs set aside: split, row, source, target, reasons, evidence
         runs/RUN_ID/validation/shape.json           counts of lengths and length ratios, for the report's plots
Result   rows, usable and quarantined pairs of each split, and how many for which reason; `unknown_rate`; `conflicting`;
         `drift` against production; `characters`: those of the target language that the tokenizer lacks, `added` in
         spare embedding rows or `left_out` for want of rows

A pair that breaks a rule is set aside, unless preprocessing mends it. What is wrong with a split as a whole fails the
step: too few usable pairs, too many set aside or for one reason, too many tokens that the tokenizer cannot express, too
far from what production was trained on. What is expected is written down in `suite_of_columns`, `suite_of_pairs` and
`suite_of_split`.

Nothing here holds the corpus in memory: texts go through in batches, and only the marks of all pairs are kept.
"""

from __future__ import annotations

import functools
import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import great_expectations as gx
import great_expectations.expectations as gxe
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tasks import artifacts, registry
from tasks.data import drift
from tasks.data.encoding import Encoder
from tasks.data.parallel import in_order, processes_for
from tasks.data.rules import COLUMNS, RULES, Judged, Pair, Rule, mark_batch, mark_repeated, pairs_in, reasons
from tasks.data.text import normalise
from tasks.data.tokenizer import Choice, choose, embedding_rows, extend, fetch_tokenizer, load_tokenizer
from tasks.errors import DataError
from tasks.pages import TEMPLATES
from tasks.pull import DATASET_MANIFEST, SCHEMA, SPLITS
from tasks.run import Run
from tasks.settings import Settings, Validation
from tasks.storage import MissingObjectError, Store, to_json

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 10_000
EXAMPLES = 8  # pairs on the page for each reason
RESULT, QUARANTINE, SHAPE = "result.json", "quarantine.parquet", "shape.json"
ASIDE = pa.schema(
    [
        ("split", pa.string()),
        ("row", pa.int64()),
        *((name, pa.string()) for name in ("source", "target", "reasons", "evidence")),
    ]
)


def run(run: Run) -> dict[str, Any]:
    """Validate every split. Raises `DataError` with the worst findings when the corpus is not fit for training."""
    pulled = run.result("pull")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        artifacts.fetch(run.store, pulled["dataset"], scratch / "data", manifest_name=DATASET_MANIFEST)
        files = {split: scratch / "data" / f"{split}.parquet" for split in SPLITS}
        judge = Judge(scratch / "docs")
        for split, path in files.items():
            judge.check(split, "columns", first_rows(path), suite_of_columns())
        # Without the right columns there are no pairs to look at.
        found = {} if judge.findings else examine(run, files, judge, scratch)
        show(run, judge, scratch)
    if judge.findings:
        worst = "; ".join(judge.findings[:3])
        raise DataError(f"the corpus is not fit for training: {worst}. See {run.uri}/validation/index.html")
    return found


def examine(run: Run, files: dict[str, Path], judge: Judge, scratch: Path) -> dict[str, Any]:
    """Mark every pair, set aside what breaks a rule, and let pairs and splits be judged; returns the step's result."""
    settings, pulled = run.settings, run.result("pull")
    limits = settings.validation
    marks = mark_splits(files, settings)
    aside = set_aside(files, marks, scratch / QUARANTINE)
    base = fetch_tokenizer(run.store, pulled["base_model"], scratch)
    seen = count_characters(files["train"], marks["train"])
    characters = choose(base, seen, embedding_rows(run.store, pulled["base_model"]))
    say_what_is_left_out(characters, seen.total())
    extend(base, characters.added, scratch / "extended")
    tokenizer = load_tokenizer(scratch / "extended")
    wholes = {split: describe(marks[split], unknown_rate(tokenizer, files[split], marks[split])) for split in SPLITS}
    wholes["train"]["drift"] = compare(run, pulled["dataset"], files["train"], scratch / "production")
    for split in SPLITS:
        pairs = marks[split][["row", *COLUMNS]]
        judge.check(split, "pair by pair", pairs, suite_of_pairs(limits, pulled["rows"][split]))
        judge.check(split, "as a whole", one_row(wholes[split]), suite_of_split(split, limits))
    run.store.put(run.key("validation", SHAPE), to_json(shape(marks["train"])))
    usable = {split: whole["usable"] for split, whole in wholes.items()}
    return {
        "summary": f"valid: {sum(usable.values()):,} usable pairs, {aside:,} set aside",
        "rows": {split: len(table) for split, table in marks.items()},
        "usable": usable,
        "quarantined": {name: sum(int(table[name].notna().sum()) for table in marks.values()) for name in COLUMNS},
        "unknown_rate": {split: round(whole["unknown_rate"], 6) for split, whole in wholes.items()},
        "conflicting": {split: round(whole["conflicting"], 6) for split, whole in wholes.items()},
        "drift": wholes["train"]["drift"],
        "characters": characters._asdict(),
    }


def show(run: Run, judge: Judge, scratch: Path) -> None:
    """Upload the page, the full results, the Data Docs and the pairs that were set aside."""
    if not (scratch / QUARANTINE).exists():
        pq.write_table(ASIDE.empty_table(), scratch / QUARANTINE)
    page = render(run.uri, run.result("pull")["dataset"], judge, scratch / QUARANTINE)
    run.store.put(run.key("validation", "index.html"), page.encode())
    run.store.put(run.key("validation", RESULT), to_json(judge.results))
    run.store.upload(scratch / QUARANTINE, run.key("validation", QUARANTINE))
    pages = {p.relative_to(judge.docs).as_posix(): p for p in judge.docs.rglob("*") if p.is_file()}
    run.store.upload_all({run.key("validation", "docs", name): path for name, path in pages.items()})


def first_rows(path: Path) -> pd.DataFrame:
    """A file's first rows, which have the columns and types of all."""
    file = pq.ParquetFile(path)
    return pa.Table.from_batches(itertools.islice(file.iter_batches(100), 1), file.schema_arrow).to_pandas()


def texts_of(path: Path) -> Iterator[pa.RecordBatch]:
    """A split's texts with their rows, some thousands at once."""
    first = 0
    for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
        rows = pa.array(np.arange(first, first + batch.num_rows))
        yield pa.RecordBatch.from_arrays([rows, batch["source"], batch["target"]], Pair._fields)
        first += batch.num_rows


def batches(path: Path) -> Iterator[list[Pair]]:
    """A split's pairs, some thousands at once."""
    return map(pairs_in, texts_of(path))


def mark_splits(files: dict[str, Path], settings: Settings, processes: int | None = None) -> dict[str, pd.DataFrame]:
    """The marks of every split: which rules each pair breaks, and the evidence (see `tasks.data.rules.mark`)."""
    marks: dict[str, pd.DataFrame] = {}
    judged: dict[str, list[Pair]] = {}
    for split in reversed(SPLITS):  # test first: what it holds may stand in neither of the others
        function = functools.partial(
            mark_batch,
            limits=settings.validation,
            languages=settings.data.languages,
            judged=Judged(judged, settings.validation.near_duplicate),
        )
        rows = pq.ParquetFile(files[split]).metadata.num_rows
        found = in_order(function, texts_of(files[split]), processes or processes_for(rows))
        table = pa.Table.from_batches(found).to_pandas(self_destruct=True)
        mark_repeated(table)
        log.info("%s: %s pairs, %s usable", split, f"{rows:,}", f"{int(table['usable'].sum()):,}")
        if split != "train":
            judged[split] = [pair for batch in batches(files[split]) for pair in batch]
        marks[split] = table
    return {split: marks[split] for split in SPLITS}


def set_aside(files: dict[str, Path], marks: dict[str, pd.DataFrame], path: Path) -> int:
    """Write the pairs that are not usable, with the reasons, and return how many they are."""
    total = 0
    with pq.ParquetWriter(path, ASIDE, compression="zstd") as writer:
        for split, table in marks.items():
            why = iter(reasons(table).to_dict("records"))
            usable = table["usable"].to_numpy()
            for batch in batches(files[split]):
                rows = [{**pair._asdict(), **next(why), "split": split} for pair in batch if not usable[pair.row]]
                writer.write_table(pa.Table.from_pylist(rows, ASIDE))
                total += len(rows)
    return total


def usable_targets(path: Path, marks: pd.DataFrame) -> Iterator[list[str]]:
    """The usable target sentences as `preprocess` will have them, some thousands at once."""
    usable = marks["usable"].to_numpy()
    for batch in batches(path):
        yield [normalise(pair.target or "") for pair in batch if usable[pair.row]]


def count_characters(path: Path, marks: pd.DataFrame) -> Counter[str]:
    """How often each character occurs in the usable targets."""
    counts: Counter[str] = Counter()
    for texts in usable_targets(path, marks):
        counts.update("".join(texts))
    return counts


def say_what_is_left_out(characters: Choice, total: int) -> None:
    """Warn of characters that the tokenizer lacks and for which the embedding has no spare row."""
    if characters.left_out:
        missing, share = len(characters.left_out), sum(characters.left_out.values()) / total
        log.warning(
            "the embedding has too few spare rows: %s more are needed for %s, which stay unknown: %.4f%% of the "
            "target's characters",
            *(missing, "".join([*characters.left_out][:30]) + ("..." if missing > 30 else ""), 100 * share),
        )


def unknown_rate(tokenizer: Any, path: Path, marks: pd.DataFrame) -> float:
    """The share of the usable targets' tokens that are the unknown token."""
    encoder = Encoder(tokenizer.backend_tokenizer)
    unknown = tokens = 0
    for texts in usable_targets(path, marks):
        ids = encoder(pa.array(texts, pa.string())).values.to_numpy()
        unknown += int(np.count_nonzero(ids == tokenizer.unk_token_id))
        tokens += len(ids)
    return unknown / max(1, tokens)


def describe(marks: pd.DataFrame, unknown: float) -> dict[str, Any]:
    """A split as a whole, as `suite_of_split` judges it."""
    usable = int(marks["usable"].sum())
    return {
        "usable": usable,
        "set_aside": 1 - usable / max(1, len(marks)),
        "unknown_rate": unknown,
        "conflicting": float(marks["conflicting"].sum()) / max(1, usable),
        "drift": None,
    }


def compare(run: Run, dataset: str, train: Path, scratch: Path) -> dict[str, float] | None:
    """How far the training pairs are from those behind production; None when there is nothing to compare with."""
    champion = registry.champion_of(run.store, run.settings.name, run.id)
    if not champion:
        log.info("drift: nothing is in production yet to compare with")
        return None
    before = registry.manifest(run.store, run.settings.name, champion).metadata["lineage"].get("dataset")
    try:
        found = drift.distances(drift.profile(train), drift.profile(_production_train(run.store, before, scratch)))
    except MissingObjectError as error:
        log.warning(
            "drift: production's dataset is no longer in the store, so there is none to compare with: %s", error
        )
        return None
    log.info("drift from %s: %s", before, ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return {name: round(value, 6) for name, value in found.items()}


def _production_train(store: Store, dataset: str | None, scratch: Path) -> Path:
    if not dataset:
        raise MissingObjectError("the production version's manifest names no dataset")
    wanted = "train.parquet"
    artifacts.fetch(store, dataset, scratch, manifest_name=DATASET_MANIFEST, wanted=lambda path: path == wanted)
    return scratch / wanted


def shape(marks: pd.DataFrame) -> dict[str, Any]:
    """Counts for the report's plots: pairs by length of each side, and by target length over source length."""
    edges = [0, 10, 20, 40, 60, 80, 100, 150, 200, 300, 500, 1000]
    ratios = [round(2 ** (step / 4), 2) for step in range(-8, 9)]
    usable = marks[marks["usable"]]
    relative = usable["target_length"] / usable["source_length"].clip(lower=1)
    return {
        "length_edges": edges,
        **{side: np.histogram(usable[f"{side}_length"], [*edges, np.inf])[0].tolist() for side in ("source", "target")},
        "ratio_edges": ratios,
        "ratios": np.histogram(relative.clip(ratios[0], ratios[-1]), ratios)[0].tolist(),
    }


def suite_of_columns() -> list[Any]:
    """What is expected of a split's file: the columns that `pull` writes, and text in them."""
    return [
        gxe.ExpectTableColumnsToMatchOrderedList(column_list=SCHEMA.names, notes="the columns are those of a pair"),
        *(gxe.ExpectColumnValuesToBeOfType(column=name, type_="str", notes="a side is text") for name in SCHEMA.names),
    ]


def suite_of_pairs(limits: Validation, rows: int) -> list[Any]:
    """What is expected of pairs: all that were pulled, and mostly no evidence against each.

    The few others are set aside or mended; of what is mended any number may be there, if the settings do not say more.
    """

    def mostly(rule: Rule) -> float:
        return limits.mostly_by_rule.get(rule.column, 0 if rule.mended else limits.mostly)

    return [
        gxe.ExpectTableRowCountToEqual(value=rows, notes="every pair that was pulled is looked at"),
        *(gxe.ExpectColumnValuesToBeNull(column=r.column, mostly=mostly(r), notes=r.reason) for r in RULES),
    ]


def suite_of_split(split: str, limits: Validation) -> list[Any]:
    """What is expected of a split as a whole."""
    min_rows = limits.min_train_rows if split == "train" else limits.min_eval_rows

    def at_most(column: str, limit: float, reason: str) -> Any:
        return gxe.ExpectColumnValuesToBeBetween(column=column, max_value=limit, mostly=1.0, notes=reason)

    expectations = [
        gxe.ExpectColumnValuesToBeBetween(
            column="usable", min_value=min_rows, mostly=1.0, notes="enough pairs must be left to train or to judge on"
        ),
        at_most("set_aside", limits.max_quarantine, "few pairs may be set aside, for whatever reasons"),
        at_most("unknown_rate", limits.max_unknown_rate, "what the tokenizer cannot express, no training can teach"),
        at_most("conflicting", limits.max_conflicting, "a source with several translations teaches none of them well"),
    ]
    if split == "train":
        expectations += [
            at_most(f"drift_{name}", limit, f"the {name} must not be far from those that production was trained on")
            for name, limit in limits.drift_limits.items()
            if limit is not None
        ]
    return expectations


class Judge:
    """Great Expectations: checks tables one by one, and keeps the full results by name, and the same in words.

    Its Data Docs are written to `docs`.
    """

    def __init__(self, docs: Path) -> None:
        self.docs = docs
        self.results: dict[str, Any] = {}
        self.said: list[Said] = []
        self._context = gx.get_context(mode="ephemeral")
        self._context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
        self._context.add_data_docs_site(
            "local",
            {
                "class_name": "SiteBuilder",
                "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
                "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            },
        )
        self._source = self._context.data_sources.add_pandas("corpus")

    @property
    def findings(self) -> list[str]:
        """What is not as expected, in sentences, the worst first."""
        unmet = sorted((said for said in self.said if not said.success), key=lambda said: -said.severity)
        return [f"{said.split}: {said.sentence} ({said.reason})" for said in unmet]

    def check(self, split: str, part: str, frame: pd.DataFrame, expectations: list[Any]) -> None:
        """Check a table that is a part of what there is to know of a split."""
        name = f"{split}, {part}"
        suite = self._context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
        batch = self._source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("whole")
        definition = gx.ValidationDefinition(name=name, data=batch, suite=suite)
        checkpoint = gx.Checkpoint(
            name=name,
            validation_definitions=[self._context.validation_definitions.add(definition)],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=["local"])],
            result_format={
                "result_format": "SUMMARY",
                "partial_unexpected_count": 20,
                **({"unexpected_index_column_names": ["row"]} if "row" in frame else {}),
            },
        )
        outcome = self._context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": frame})
        (found,) = outcome.run_results.values()
        self.results[name] = found.to_json_dict()
        self.said += [in_words(split, part, frame, result) for result in self.results[name]["results"]]


class Said(NamedTuple):
    """An expectation's result in words."""

    split: str
    part: str
    about: str  # the rule, the measure or the column
    reason: str
    success: bool
    expected: str
    observed: str
    severity: float  # observed over allowed, or the other way round: how far it is from being met
    sentence: str


def in_words(split: str, part: str, frame: pd.DataFrame, result: dict[str, Any]) -> Said:
    """What an expectation of the suites above found."""
    config, seen = result["expectation_config"], result["result"]
    kind, kwargs = config["type"], config["kwargs"]
    about = kwargs.get("column", "rows" if "row_count" in kind else "columns")
    severity = np.inf
    if kind == "expect_table_columns_to_match_ordered_list":
        expected, observed = (", ".join(names) for names in (kwargs["column_list"], seen["observed_value"]))
        sentence = f"the columns are {observed}; expected {expected}"
    elif kind == "expect_column_values_to_be_of_type":
        found = seen.get("observed_value") or str(frame.dtypes.get(about, "nothing"))
        expected, observed = "text", "text" if found == kwargs["type_"] else found
        sentence = f"{about} holds {observed}, expected text"
    elif kind == "expect_table_row_count_to_equal":
        expected, observed = f"{kwargs['value']:,}", f"{seen['observed_value']:,}"
        sentence = f"{observed} pairs, expected {expected}"
    elif kind == "expect_column_values_to_be_null":
        count, limit = seen["unexpected_count"], 1 - kwargs["mostly"]
        share = count / max(1, seen["element_count"])
        expected = f"≤ {percent(limit)}" if limit < 1 else "any"
        observed = f"{count:,} ({percent(share)})" if count else "0"
        severity = share / max(limit, 1e-9)
        sentence = f"{about} in {percent(share)} of the pairs, at most {percent(limit)} may"
    elif kwargs.get("min_value") is not None:  # of one row, whose value the library does not always report
        value, limit = frame[about].iloc[0], kwargs["min_value"]
        expected, observed, severity = f"≥ {limit:,.0f}", f"{value:,}", limit / max(value, 1e-9)
        sentence = f"{observed} {about} pairs, at least {limit:,.0f} are needed"
    else:
        value, limit = frame[about].iloc[0], kwargs["max_value"]
        form = "{:.3g}".format if about.startswith("drift") else percent
        expected, observed, severity = f"≤ {form(limit)}", form(value), value / max(limit, 1e-9)
        sentence = f"{about} is {observed}, at most {form(limit)} is allowed"
    return Said(split, part, about, config["notes"], result["success"], expected, observed, severity, sentence)


def percent(share: float) -> str:
    """A share for people: 25%, 1.31%, 0.0393%."""
    return f"{100 * share:.3g}%"


def render(run: str, dataset: str, judge: Judge, quarantine: Path) -> str:
    """The page that shows a person what was expected and found. Everything that came from data is escaped."""
    aside = pd.read_parquet(quarantine).fillna("")
    reasons_of = aside["reasons"].str.split(", ")
    examples = {}
    for rule in RULES:
        having = aside[[rule.column in names for names in reasons_of]]
        if len(having):
            pairs = having.sample(min(EXAMPLES, len(having)), random_state=0).to_dict("records")
            examples[rule.column] = {"total": len(having), "pairs": pairs}
    parts: dict[str, dict[tuple[str, str], dict[str, Said]]] = {}
    for said in judge.said:
        parts.setdefault(said.part, {}).setdefault((said.about, said.reason), {})[said.split] = said
    return TEMPLATES.get_template("validation.html.j2").render(
        run=run, dataset=dataset, findings=judge.findings, parts=parts, splits=SPLITS, examples=examples
    )


def one_row(whole: dict[str, Any]) -> pd.DataFrame:
    """A split as a whole, as Great Expectations reads it: a table of one row; no drift is nowhere too far."""
    measures = {name: value for name, value in whole.items() if name != "drift"}
    distances = whole["drift"] or dict.fromkeys(drift.MEASURES, 0.0)
    return pd.DataFrame([{"row": 0, **measures, **{f"drift_{name}": value for name, value in distances.items()}}])
