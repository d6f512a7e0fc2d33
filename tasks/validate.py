"""validate: prove that the corpus is fit to train on, and set aside the pairs that are not.

    python -m tasks validate --run s3://retrain/runs/RUN_ID

Reads    datasets/NAME/PAIR/FINGERPRINT/*.parquet, the base model's tokenizer
Writes   runs/RUN_ID/validation/result.json          what Great Expectations found, split by split
         runs/RUN_ID/validation/docs/index.html      the same as Data Docs, for people
         runs/RUN_ID/validation/quarantine.parquet   the pairs set aside: split, row, source, target, reasons
Result   rows, usable and quarantined pairs of each split, and how many for which reason; `characters`: those of the
         target language that the tokenizer lacks, `added` in spare embedding rows or `left_out` for want of rows

A pair that breaks a rule about pairs is set aside. A split with too few usable pairs, too many set aside, or too many
tokens that the tokenizer cannot express fails the step.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas as pd

from tasks import artifacts
from tasks.errors import DataError
from tasks.preprocess import normalise
from tasks.pull import DATASET_MANIFEST, SPLITS
from tasks.rules import RULES, mark, quarantine
from tasks.run import Run
from tasks.settings import Validation
from tasks.storage import to_json
from tasks.tokenizer import choose, embedding_rows, extend, fetch_tokenizer, load_tokenizer

log = logging.getLogger(__name__)


def run(run: Run) -> dict[str, Any]:
    """Validate every split. Raises `DataError` with the worst findings when the corpus is not fit for training."""
    settings = run.settings
    pulled = run.result("pull")
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        artifacts.fetch(run.store, pulled["dataset"], data, manifest_name=DATASET_MANIFEST)
        tokenizer = fetch_tokenizer(run.store, pulled["base_model"], Path(scratch))
        frames = {split: pd.read_parquet(data / f"{split}.parquet") for split in SPLITS}
        mark(frames, settings.validation)
        seen = count_characters(frames["train"])
        characters = choose(tokenizer, seen, embedding_rows(run.store, pulled["base_model"]))
        extend(tokenizer, characters.added, Path(scratch) / "extended")
        extended = load_tokenizer(Path(scratch) / "extended")
        for frame in frames.values():
            frame["unknown_share"] = unknown_shares(extended, frame["target"].fillna("").tolist())
        docs = Path(scratch) / "docs"
        result = judge(frames, settings.validation, docs)
        quarantined = quarantine(frames)
        quarantined.to_parquet(Path(scratch) / "quarantine.parquet", index=False)
        run.store.put(run.key("validation", "result.json"), to_json(result["splits"]))
        run.store.upload(Path(scratch) / "quarantine.parquet", run.key("validation", "quarantine.parquet"))
        pages = {
            run.key("validation", "docs", p.relative_to(docs).as_posix()): p for p in docs.rglob("*") if p.is_file()
        }
        run.store.upload_all(pages)
    if result["failures"]:
        worst = "; ".join(result["failures"][:3])
        raise DataError(f"the corpus is not fit for training: {worst}. See {run.uri}/validation/docs/index.html")
    counts = {split: int(frame["usable"].sum()) for split, frame in frames.items()}
    return {
        "summary": f"valid: {sum(counts.values()):,} usable pairs, {len(quarantined):,} set aside",
        "rows": {split: len(frame) for split, frame in frames.items()},
        "usable": counts,
        "quarantined": {rule.column: sum(int(frame[rule.column].sum()) for frame in frames.values()) for rule in RULES},
        "unknown_rate": {split: round(float(frame["unknown_share"].mean()), 5) for split, frame in frames.items()},
        "characters": characters._asdict(),
    }


def count_characters(train: pd.DataFrame) -> Counter[str]:
    """How often each character occurs in the usable targets, as `preprocess` will have them."""
    return Counter(char for text in train.loc[train["usable"], "target"] for char in normalise(text))


def unknown_shares(tokenizer: Any, texts: list[str]) -> list[float]:
    """For each text, the share of its tokens that are the unknown token."""
    if not texts:
        return []
    unk = tokenizer.unk_token_id
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [row.count(unk) / max(1, len(row)) for row in ids]


def suite_for(split: str, limits: Validation) -> gx.ExpectationSuite:
    """What is expected of a split: the one place where it is written down."""
    min_rows = limits.min_train_rows if split == "train" else limits.min_eval_rows
    reason = {rule.column: rule.reason for rule in RULES}
    return gx.ExpectationSuite(
        name=split,
        expectations=[
            gxe.ExpectColumnValuesToBeOfType(column="source", type_="str", notes="sentences are text"),
            gxe.ExpectColumnValuesToBeOfType(column="target", type_="str", notes="sentences are text"),
            *(
                gxe.ExpectColumnValuesToBeInSet(
                    column=column, value_set=[False], mostly=1 - limits.max_quarantine, notes=text
                )
                for column, text in reason.items()
            ),
            gxe.ExpectColumnMeanToBeBetween(
                column="usable", min_value=1 - limits.max_quarantine, notes="few pairs may be set aside"
            ),
            gxe.ExpectColumnSumToBeBetween(
                column="usable", min_value=min_rows, notes="enough pairs must be left to train or to judge on"
            ),
            gxe.ExpectColumnMeanToBeBetween(
                column="unknown_share",
                max_value=limits.max_unknown_rate,
                notes="what the tokenizer cannot express, no training can teach",
            ),
        ],
    )


def judge(frames: dict[str, pd.DataFrame], limits: Validation, docs: Path) -> dict[str, Any]:
    """Let Great Expectations check every split and write its Data Docs to `docs`.

    Returns `splits`, each split's full result, and `failures`, a sentence for each expectation not met.
    """
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    context.add_data_docs_site(
        "local",
        {
            "class_name": "SiteBuilder",
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        },
    )
    source = context.data_sources.add_pandas("corpus")
    splits, failures = {}, []
    for split, frame in frames.items():
        batch = source.add_dataframe_asset(split).add_batch_definition_whole_dataframe("whole")
        definition = context.validation_definitions.add(
            gx.ValidationDefinition(name=split, data=batch, suite=context.suites.add(suite_for(split, limits)))
        )
        checkpoint = gx.Checkpoint(
            name=split,
            validation_definitions=[definition],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=["local"])],
            result_format={
                "result_format": "SUMMARY",
                "unexpected_index_column_names": ["row", "source", "target"],
                "partial_unexpected_count": 20,
            },
        )
        outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": frame})
        (found,) = outcome.run_results.values()
        splits[split] = found.to_json_dict()
        failures += [_sentence(split, frame, result) for result in found.results if not result.success]
    return {"splits": splits, "failures": failures}


def _sentence(split: str, frame: pd.DataFrame, result: Any) -> str:
    expectation = result.expectation_config
    column = expectation.kwargs["column"]
    found = result.result
    if "unexpected_percent" in found:
        seen = f"{found['unexpected_percent']:.1f}% of pairs"
    elif expectation.type == "expect_column_mean_to_be_between" and column == "usable":
        seen = f"{1 - found['observed_value']:.1%} of pairs set aside"
    else:
        seen = f"{column} is {found.get('observed_value')}"
    return f"{split}: {seen} ({expectation.notes})"
