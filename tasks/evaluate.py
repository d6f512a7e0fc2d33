"""evaluate: let candidate and champion translate the same test split, and score both.

    python -m tasks evaluate --run s3://retrain/runs/RUN_ID
    python -m tasks evaluate --run s3://retrain/runs/RUN_ID --recompute     # the numbers only: no model is needed

Reads    runs/RUN_ID/candidate/, prepared/FINGERPRINT/, the production version (or else the base model)
Writes   runs/RUN_ID/evaluation/translations.parquet   each test sentence: texts and BLEU statistics
         runs/RUN_ID/evaluation/losses.parquet         each validation and test sentence: loss under both models
         runs/RUN_ID/evaluation/metrics.json           what the gate reads, made of these two
         evaluations/FINGERPRINT/...                   the champion's work, for the next run with the same test sets
Result   BLEU of both

The candidate is read back from the store, so what is judged is what would be published.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from tasks import artifacts, registry
from tasks.data.prepared import Prepared, fetch_prepared
from tasks.data.tokenizer import load_tokenizer
from tasks.errors import DataError
from tasks.judging import metrics, testsets
from tasks.judging.examine import Work, examine
from tasks.judging.metrics import SYSTEMS, TEST
from tasks.judging.scoring import bleu_statistics
from tasks.model import extend_vocabulary, load_model, save_model
from tasks.run import Run
from tasks.storage import MissingObjectError, to_json

log = logging.getLogger(__name__)

FORMAT = 2  # raised when a champion's work is kept in another form: what was kept before is then made again
TABLES = ("translations", "losses")
ABOUT = ("champion_version", "candidate_fingerprint", "trained_validation_loss", "engine")  # what no table says


def run(run: Run, *, recompute: bool = False) -> dict[str, Any]:
    """Translate, score, and keep every sentence, so that each number can be recomputed without a model."""
    if recompute:
        return keep(run, *read_tables(run), {name: run.result("evaluate")[name] for name in ABOUT})
    trained = run.result("train")
    champion = registry.champion_of(run.store, run.settings.name, run.id)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        prepared = fetch_prepared(run, scratch)
        pairs, sets = sentences_of(run, prepared, scratch)
        work = {"champion": work_of_champion(run, champion, prepared, pairs, sets)}
        candidate = artifacts.fetch(run.store, trained["candidate"], scratch / "candidate")
        work["candidate"] = examine("candidate", scratch / "candidate", sets["source"].tolist(), pairs, run.settings)
    about = {
        "champion_version": champion,
        "candidate_fingerprint": candidate.fingerprint,
        "trained_validation_loss": trained["validation_loss"],
        "engine": {system: work[system].engine for system in SYSTEMS},
    }
    return keep(run, *side_by_side(pairs, sets, work), about)


def sentences_of(run: Run, prepared: Prepared, scratch: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What both models read: pairs of the validation and the test split (`split`, `source`, `reference`); and every
    test set (`set`, `source`, `reference`), the test split first."""
    data = prepared.splits
    pairs = pd.concat(
        [
            pd.DataFrame({"split": split, "source": data[split]["source"][:], "reference": data[split]["target"][:]})
            for split in ("validation", TEST)
        ],
        ignore_index=True,
    )
    sets = [pairs[pairs["split"] == TEST].rename(columns={"split": "set"})]
    for name, source in run.settings.evaluation.extra_sets.items():
        extra = testsets.read(name, source, run.settings.data, scratch / "sets")
        log.info("extra test set %s: %s sentences", name, f"{len(extra):,}")
        sets.append(extra.assign(set=name))
    return pairs, pd.concat(sets, ignore_index=True)


def work_of_champion(
    run: Run, champion: str | None, prepared: Prepared, pairs: pd.DataFrame, sets: pd.DataFrame
) -> Work:
    """The champion's translations and losses: kept from an earlier run with the same sentences, or made now.

    Where nothing has been promoted the base model stands in, with the vocabulary that the run's data asks for.
    """
    settings, store = run.settings, run.store
    base_model, extension = run.result("pull")["base_model"], [] if champion else prepared.extension
    if champion:
        manifest = registry.manifest(store, settings.name, champion)
    else:
        manifest = artifacts.read_manifest(store, base_model)
    depends_on = {
        "format": FORMAT,
        "model": manifest.fingerprint,
        "extension": extension,
        "sentences": hashlib.sha256(to_json([pairs.to_dict("list"), sets.to_dict("list")])).hexdigest(),
        "settings": settings.model_dump(include={"preprocessing": {"prompt", "max_tokens"}, "evaluation": True}),
        "libraries": {name: version(name) for name in ("tensorflow", "transformers", "ctranslate2")},
    }
    key = f"evaluations/{hashlib.sha256(to_json(depends_on)).hexdigest()[:32]}"
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        directory, kept = scratch / "champion", scratch / "kept"
        try:
            engine = artifacts.fetch(store, key, kept).metadata["engine"]
            log.info("the champion has translated these sentences before: %s", key)
            translations, losses = (pd.read_parquet(kept / f"{table}.parquet") for table in TABLES)
            return Work(translations, losses, engine)
        except (MissingObjectError, DataError) as error:
            log.info("the champion translates: %s", error)
        if champion:
            registry.pull(store, settings.name, champion, directory)
        else:
            artifacts.fetch(store, base_model, directory)
        if extension:
            model = load_model(directory)
            extend_vocabulary(model, extension)
            directory = scratch / "extended"
            save_model(model, load_tokenizer(prepared.tokenizer), directory)
        work = examine("champion", directory, sets["source"].tolist(), pairs, settings)
        kept.mkdir(exist_ok=True)
        for table in TABLES:
            getattr(work, table).to_parquet(kept / f"{table}.parquet", index=False)
        artifacts.publish(store, key, kept, {"engine": work.engine, "champion": champion or base_model})
    return work


def side_by_side(pairs: pd.DataFrame, sets: pd.DataFrame, work: dict[str, Work]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both models' work as the two tables that tasks/judging/metrics.py reads."""
    translations, losses = sets.copy(), pairs[["split"]].copy()
    for system in SYSTEMS:
        made = work[system]
        translations[system] = made.translations["text"].to_numpy()
        translations[f"{system}_statistics"] = list(bleu_statistics(translations[system], translations["reference"]))
        for column in ("tokens", "unknown"):
            translations[f"{system}_{column}"] = made.translations[column].to_numpy()
        for column in ("loss", "tokens"):
            losses[f"{system}_{column}"] = made.losses[column].to_numpy()
    # By pieces, not by ids: a character that both have added may have another row in each.
    one, other = (work[system].losses["pieces"] for system in SYSTEMS)
    losses["comparable"] = [list(mine) == list(theirs) for mine, theirs in zip(one, other, strict=True)]
    return translations, losses


def keep(run: Run, translations: pd.DataFrame, losses: pd.DataFrame, about: dict[str, Any]) -> dict[str, Any]:
    """Score, write everything, and say what came out."""
    found = {**about, **metrics.measure(translations, losses, run.settings.gate)}
    with tempfile.TemporaryDirectory() as scratch:
        for name, table in zip(TABLES, (translations, losses), strict=True):
            table.to_parquet(Path(scratch) / f"{name}.parquet", index=False)
            run.store.upload(Path(scratch) / f"{name}.parquet", run.key("evaluation", f"{name}.parquet"))
    run.store.put_json(run.key("evaluation", "metrics.json"), found)
    bleu = {system: found[system]["bleu"]["score"] for system in SYSTEMS}
    against = f"version {about['champion_version']}" if about["champion_version"] else "the base model"
    return {
        "summary": f"BLEU {bleu['candidate']:.2f} against {bleu['champion']:.2f} of {against}, "
        f"{found['sentences']:,} sentences",
        "champion": about["champion_version"],
        "bleu": bleu,
        "validation_loss": {system: found[system]["validation_loss"] for system in SYSTEMS},
        "test_fingerprint": found["fingerprint"],
        **about,
    }


def read_tables(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The sentences that evaluate kept: translations and losses. Raises `DataError` when they are damaged."""
    tables = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in TABLES:
            path = Path(scratch) / f"{name}.parquet"
            try:
                run.store.download(run.key("evaluation", f"{name}.parquet"), path)
                tables.append(pd.read_parquet(path))
            except (MissingObjectError, ValueError, OSError) as error:
                raise DataError(
                    f"{run.uri}/evaluation/{name}.parquet cannot be read ({error}): run the evaluate step again"
                ) from error
    return tables[0], tables[1]
