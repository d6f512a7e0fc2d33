"""evaluate: let candidate and champion translate the same test split, and score both.

    python -m tasks evaluate --run s3://retrain/runs/RUN_ID

Reads    runs/RUN_ID/candidate/, prepared/FINGERPRINT/, the production version (or else the base model)
Writes   runs/RUN_ID/evaluation/translations.parquet   each sentence: texts and BLEU statistics
         runs/RUN_ID/evaluation/metrics.json           what the gate reads
Result   BLEU of both

The candidate is read back from the store, so what is judged is what would be published.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import DatasetDict

from tasks import artifacts, registry
from tasks.loss import loss_meter
from tasks.model import load_model
from tasks.prepared import fetch_prepared
from tasks.run import Run
from tasks.scoring import bleu_from, bleu_statistics, corpus_scores
from tasks.settings import Settings
from tasks.tokenizer import load_tokenizer
from tasks.translation import translate

log = logging.getLogger(__name__)

SYSTEMS = ("champion", "candidate")
MIN_SLICE = 30  # fewer sentences say nothing about a slice


def run(run: Run) -> dict[str, Any]:
    """Translate, score, and keep every sentence, so that each number can be recomputed without a model."""
    settings = run.settings
    trained = run.result("train")
    champion = registry.champion_of(run.store, settings.name, run.id)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data = fetch_prepared(run, scratch).splits
        if champion:
            registry.pull(run.store, settings.name, champion, scratch / "champion")
        else:
            artifacts.fetch(run.store, run.result("pull")["base_model"], scratch / "champion")
        artifacts.fetch(run.store, trained["candidate"], scratch / "candidate")

        table = pd.DataFrame({"source": data["test"]["source"][:], "reference": data["test"]["target"][:]})
        losses = {}
        for system in SYSTEMS:
            losses[system], table[system] = try_system(system, scratch / system, data, settings)
        for system in SYSTEMS:
            table[f"{system}_statistics"] = list(bleu_statistics(table[system], table["reference"]))
        metrics = {
            "champion_version": champion,
            "test_fingerprint": fingerprint(table),
            "sentences": len(table),
            "trained_validation_loss": trained["validation_loss"],
            **{system: {"validation_loss": losses[system], **score(table, system)} for system in SYSTEMS},
            "slices": slice_scores(table),
        }
        table.to_parquet(scratch / "translations.parquet", index=False)
        run.store.upload(scratch / "translations.parquet", run.key("evaluation", "translations.parquet"))
        run.store.put_json(run.key("evaluation", "metrics.json"), metrics)
    bleu = {system: metrics[system]["bleu"]["score"] for system in SYSTEMS}
    against = f"version {champion}" if champion else "the base model"
    gained = f"BLEU {bleu['candidate']:.2f} against {bleu['champion']:.2f} of {against}"
    return {
        "summary": f"{gained}, {len(table):,} sentences",
        "champion": champion,
        "bleu": bleu,
        "validation_loss": losses,
    }


def try_system(name: str, directory: Path, data: DatasetDict, settings: Settings) -> tuple[float, list[str]]:
    """One model's validation loss per target token, and its translations of the test split."""
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    loss = loss_meter(model)(data["validation"], settings.evaluation.batch_size)
    log.info("%s: validation loss %.4f", name, loss)
    translations = translate(
        model,
        tokenizer,
        data["test"]["source"][:],
        prompt=settings.preprocessing.prompt,
        max_tokens=settings.preprocessing.max_tokens,
        max_new_tokens=settings.evaluation.max_new_tokens,
        batch_size=settings.evaluation.batch_size,
        label=f"{name} translates",
    )
    return loss, translations


def score(table: pd.DataFrame, system: str) -> dict[str, Any]:
    """A system's scores over the whole test split, and what averages hide: lengths, empty and copied outputs."""
    outputs, references, sources = table[system], table["reference"], table["source"]
    return {
        **corpus_scores(outputs, references),
        "length_ratio": float(outputs.str.len().sum() / max(1, references.str.len().sum())),
        "empty": float((outputs.str.strip() == "").mean()),
        "copied": float((outputs.str.strip().str.casefold() == sources.str.strip().str.casefold()).mean()),
    }


def slice_scores(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """BLEU of both systems on parts of the test split: `sentences`, `champion`, `candidate` for each."""
    words = table["reference"].str.split().str.len()
    slices = {
        "1-6 words": words <= 6,
        "7-12 words": (words > 6) & (words <= 12),
        "13-24 words": (words > 12) & (words <= 24),
        "over 24 words": words > 24,
        "with a number": table["source"].map(lambda text: bool(re.search(r"\d", text))),
        "with accents": table["reference"].map(lambda text: bool(re.search(r"[áéíóúüñ¿¡]", text, re.IGNORECASE))),
    }
    scores = {}
    for name, members in slices.items():
        if members.sum() >= MIN_SLICE:
            part = {
                system: bleu_from(np.stack(table.loc[members, f"{system}_statistics"].tolist())) for system in SYSTEMS
            }
            scores[name] = {"sentences": int(members.sum()), **part}
    return scores


def fingerprint(table: pd.DataFrame) -> str:
    """What the test split is, whoever translates it."""
    pairs = json.dumps(table[["source", "reference"]].to_numpy().tolist(), ensure_ascii=False)
    return hashlib.sha256(pairs.encode()).hexdigest()
