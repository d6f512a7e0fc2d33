"""How fast the data steps are, how much memory they take, and how both grow, beside what one would write otherwise.

    .venv/bin/python benchmarks/data.py --corpus ../shared/data/opus-100 --rows 10000 100000 1000000

The corpus is repeated, with a number put into every repetition's sentences, until it has the rows. Each measurement is
a process of its own; its resident memory, with that of its helpers, is looked at twenty times a second.
For each size the alternatives take turns. CPU seconds, of all processes together, are what a busy machine changes
least.

    pull                 tasks.pull: hub layout to parquet, with the fingerprint
    validate             tasks.validate: marks, quarantine, unknown tokens, Great Expectations
    ... on one frame     all texts in one pandas frame, native expectations only: lengths, nulls, patterns, duplicates
    preprocess           tasks.preprocess
    ... notebook's way   Dataset.map, batched, one process, padded to 128
"""

# ruff: noqa: PLC0415  what a measurement does not need it does not import: it would count as its memory

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "examples" / "demo" / "base-model"
PROMPT = "translate English to Spanish: "
SPLITS = ("train", "validation", "test")


def enlarge(corpus: Path, rows: int, directory: Path) -> None:
    """Write the corpus in the hub's layout with so many training pairs."""
    (directory / "en-es").mkdir(parents=True)
    (directory / "README.md").write_text((corpus / "README.md").read_text())
    for split in SPLITS:
        table = pq.read_table(corpus / "en-es" / f"{split}-00000-of-00001.parquet")
        if split == "train":
            pairs = table["translation"].to_pylist()
            with pq.ParquetWriter(directory / "en-es" / f"{split}-00000-of-00001.parquet", table.schema) as writer:
                for first in range(0, rows, 50_000):
                    chosen = [
                        {side: f"{text} {number // len(pairs)}" for side, text in pairs[number % len(pairs)].items()}
                        if number >= len(pairs)
                        else pairs[number]
                        for number in range(first, min(first + 50_000, rows))
                    ]
                    writer.write_table(pa.table({"translation": chosen}, table.schema))
        else:
            pq.write_table(table, directory / "en-es" / f"{split}-00000-of-00001.parquet")


def settings_of(corpus: Path) -> Any:
    """The demo's settings for this corpus."""
    from tasks import settings

    return settings.load(ROOT / "config" / "demo.yaml", {"data.source": str(corpus), "preprocessing.max_tokens": 128})


def pull(corpus: Path, files: Path, scratch: Path) -> None:
    """What `pull` does, but for the upload."""
    from tasks.pull import read_splits, write_split

    data = settings_of(corpus).data
    splits = read_splits(data, corpus, scratch / "cache")
    files.mkdir()
    for split in SPLITS:
        write_split(splits[split], data, split, files / f"{split}.parquet")


def validate(corpus: Path, files: Path, scratch: Path) -> None:
    """What `validate` does, but for the store."""
    from tasks import validate as step
    from tasks.data.tokenizer import load_tokenizer

    settings = settings_of(corpus)
    paths = {split: files / f"{split}.parquet" for split in SPLITS}
    marks = step.mark_splits(paths, settings)
    step.set_aside(paths, marks, scratch / "quarantine.parquet")
    step.count_characters(paths["train"], marks["train"])
    tokenizer = load_tokenizer(BASE)
    wholes = {s: step.describe(marks[s], step.unknown_rate(tokenizer, paths[s], marks[s])) for s in SPLITS}
    judge, limits = step.Judge(scratch / "docs"), settings.validation
    for split in SPLITS:
        pairs = marks[split][["row", *step.COLUMNS]]
        judge.check(split, "columns", step.first_rows(paths[split]), step.suite_of_columns())
        judge.check(split, "pair by pair", pairs, step.suite_of_pairs(limits, len(pairs)))
        judge.check(split, "as a whole", step.one_row(wholes[split]), step.suite_of_split(split, limits))


def validate_one_frame(corpus: Path, files: Path, scratch: Path) -> None:
    """Great Expectations on a frame of all texts, with expectations that it has ready: a part of what is checked."""
    import great_expectations as gx
    import great_expectations.expectations as gxe
    import pandas as pd

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    frame = pd.read_parquet(files / "train.parquet")
    expectations = [gxe.ExpectCompoundColumnsToBeUnique(column_list=["source", "target"], mostly=0.9)]
    for column in ("source", "target"):
        expectations += [
            gxe.ExpectColumnValuesToNotBeNull(column=column, mostly=0.9),
            gxe.ExpectColumnValueLengthsToBeBetween(column=column, min_value=1, max_value=2000, mostly=0.9),
            gxe.ExpectColumnValuesToNotMatchRegex(column=column, regex=r"</?[A-Za-z][^<>]*>", mostly=0.9),
            gxe.ExpectColumnValuesToNotMatchRegex(column=column, regex="[\ufffd\ue000-\uf8ff]", mostly=0.9),
        ]
    batch = context.data_sources.add_pandas("c").add_dataframe_asset("train").add_batch_definition_whole_dataframe("w")
    suite = context.suites.add(gx.ExpectationSuite(name="train", expectations=expectations))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="train", data=batch, suite=suite))
    definition.run(batch_parameters={"dataframe": frame})


def preprocess(corpus: Path, files: Path, scratch: Path) -> None:
    """What `preprocess` does, but for the store."""
    from tasks.data.tokenizer import load_tokenizer
    from tasks.preprocess import prepare

    tokenizer, settings = load_tokenizer(BASE).backend_tokenizer, settings_of(corpus).preprocessing
    for split in SPLITS:
        output = scratch / f"{split}.arrow"
        prepare(files / f"{split}.parquet", np.array([], int), output, tokenizer=tokenizer, settings=settings)
    print(f"{sum(path.stat().st_size for path in scratch.glob('*.arrow')):,} bytes", file=sys.stderr)


def preprocess_notebook(corpus: Path, files: Path, scratch: Path) -> None:
    """The reference notebook's way."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    how = {"padding": "max_length", "max_length": 128, "truncation": True}

    def encode(rows: dict[str, list[Any]]) -> Any:
        inputs = tokenizer([PROMPT + text for text in rows["source"]], **how)
        inputs["labels"] = tokenizer(rows["target"], **how)["input_ids"]
        return inputs

    paths = {split: str(files / f"{split}.parquet") for split in SPLITS}
    load_dataset("parquet", data_files=paths, cache_dir=str(scratch)).map(encode, batched=True)
    print(f"{sum(path.stat().st_size for path in scratch.rglob('cache-*.arrow')):,} bytes", file=sys.stderr)


MEASURED: dict[str, Callable[[Path, Path, Path], None]] = {
    "pull": pull,
    "validate": validate,
    "validate, GX on one frame": validate_one_frame,
    "preprocess": preprocess,
    "preprocess, notebook's way": preprocess_notebook,
}


def measure(name: str, corpus: Path, files: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak resident GiB, of one step in a process of its own with its helpers."""
    read, write = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_measured, args=(name, corpus, files, write))
    process.start()
    write.close()
    peak = 0
    while not read.poll(0.05):
        peak = max(peak, resident(psutil.Process(process.pid)))
        if not process.is_alive() and not read.poll():
            raise SystemExit(f"{name} died with {process.exitcode}, at {peak / 2**30:.2f} GiB")
    seconds, cpu = read.recv()
    process.join()
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak / 2**30}


def resident(process: psutil.Process) -> int:
    """Resident bytes of a process and its helpers; what they share counts for each."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss
    return total


def _measured(name: str, corpus: Path, files: Path, answer: Any) -> None:
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        MEASURED[name](corpus, files, Path(scratch))
        seconds = time.monotonic() - started
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    answer.send((seconds, sum(usage.ru_utime + usage.ru_stime for usage in usages)))


def main() -> None:
    """Measure, and print a table for docs/data.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a corpus in the layout of Helsinki-NLP/opus-100")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--steps", nargs="+", choices=MEASURED, default=list(MEASURED), help="after pull")
    parser.add_argument("--compare-up-to", type=int, default=100_000, help="leave the alternatives out beyond")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON too")
    arguments = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))}-core {platform.machine()}, Python {platform.python_version()}\n")
    print("| step | pairs | seconds | CPU seconds | pairs / CPU second | peak GiB |\n|---|---:|---:|---:|---:|---:|")
    numbers = []
    with tempfile.TemporaryDirectory() as name:
        for rows in arguments.rows:
            corpus, files = Path(name) / f"{rows}", Path(name) / f"{rows}-files"
            enlarge(arguments.corpus, rows, corpus)
            for step in dict.fromkeys(("pull", *arguments.steps)):
                if "," in step and rows > arguments.compare_up_to:
                    continue
                found = measure(step, corpus, files)
                numbers.append({"step": step, "rows": rows, **found})
                seconds, cpu, peak = found.values()
                print(f"| {step} | {rows:,} | {seconds:.1f} | {cpu:.1f} | {rows / cpu:,.0f} | {peak:.2f} |", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
