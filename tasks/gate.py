"""gate: decide, on evidence, whether the candidate is better than the champion.

    python -m tasks gate --run s3://retrain/runs/RUN_ID

Reads    runs/RUN_ID/evaluation/metrics.json, translations.parquet; results of validate
Writes   runs/RUN_ID/gate.json   decision, and for each check: name, observed, required, passed, sentence
Result   the same

Every check must pass. A metric that is missing or not a number refuses, and so does a limit that nobody set.
"""

from __future__ import annotations

import math
import operator
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tasks.errors import DataError
from tasks.run import Run
from tasks.scoring import bootstrap_gains
from tasks.settings import Gate

REPRODUCED_WITHIN = 1e-3  # relative: the loss of the artefact read back from the store, against the trained model's


@dataclass(frozen=True)
class Check:
    """One condition for promotion, what was seen, and a sentence that a person can read."""

    name: str
    observed: float | None
    required: str
    passed: bool
    sentence: str


def run(run: Run) -> dict[str, Any]:
    """Check the candidate and record the decision: `promote` or `reject`."""
    run.result("evaluate")
    metrics, bleu = read_evaluation(run)
    checks = check_all(metrics, bleu, run.settings.gate, data_valid=run.find_result("validate") is not None)
    refused = [check for check in checks if not check.passed]
    decision = "reject" if refused else "promote"
    outcome = {
        "decision": decision,
        "champion_version": metrics["champion_version"],
        "checks": [asdict(check) for check in checks],
    }
    run.store.put_json(run.key("gate.json"), outcome)
    reasons = "; ".join(check.sentence for check in refused)
    return {"summary": f"{decision}: {reasons or f'all {len(checks)} checks hold'}", **outcome}


def read_evaluation(run: Run) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What evaluate left: its metrics, and each system's BLEU statistics (sentences, STATISTICS).

    Raises `DataError` when one of the files is damaged, or they are not of the same test split.
    """
    folder = f"{run.uri}/evaluation"
    try:
        metrics = run.store.get_json(run.key("evaluation", "metrics.json"))
        sentences = metrics["sentences"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/metrics.json is damaged ({error!r}): run the evaluate step again") from error
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "translations.parquet"
        run.store.download(run.key("evaluation", "translations.parquet"), path)
        try:
            table = pd.read_parquet(path)
            bleu = {system: np.stack(table[f"{system}_statistics"].tolist()) for system in ("champion", "candidate")}
        except (ValueError, KeyError, OSError) as error:
            raise DataError(f"{folder}/translations.parquet is damaged ({error}): run evaluate again") from error
    if len(table) != sentences:
        raise DataError(
            f"{folder}: metrics.json is about {sentences} sentences, translations.parquet has {len(table)}: "
            f"run the evaluate step again"
        )
    return metrics, bleu


def check_all(metrics: dict[str, Any], bleu: dict[str, np.ndarray], limits: Gate, *, data_valid: bool) -> list[Check]:
    """Every check, in the order in which a person would ask.

    `metrics` is what evaluate wrote, `bleu` the sentence statistics of `champion` and `candidate`.
    """
    candidate, champion = metrics.get("candidate", {}), metrics.get("champion", {})
    gains = bootstrap_gains(bleu["candidate"], bleu["champion"], limits.bootstrap_samples)
    surely = float(np.quantile(gains, 1 - limits.confidence))
    with_confidence = f"With {100 * limits.confidence:g}% confidence BLEU changes by {{observed:+.3f}} or better"
    checks = [
        Check(
            name="data valid",
            observed=float(data_valid),
            required="valid",
            passed=data_valid,
            sentence="The data passed validation." if data_valid else "The data has not passed validation.",
        ),
        at_most(
            "validation loss",
            candidate.get("validation_loss"),
            limits.max_validation_loss,
            "The loss per target token is {observed:.4f}, {verdict} the limit of {required:g}.",
        ),
        at_most(
            "validation loss against champion",
            difference(candidate.get("validation_loss"), champion.get("validation_loss")),
            limits.validation_loss_margin,
            "The loss differs from the champion's by {observed:+.4f}, {verdict} the margin of {required:+g}.",
        ),
        at_least(
            "BLEU",
            candidate.get("bleu", {}).get("score"),
            limits.min_bleu,
            "BLEU is {observed:.2f}, {verdict} the floor of {required:g}.",
        ),
        at_least(
            "BLEU not worse than champion",
            surely,
            negative(limits.non_inferiority_margin),
            with_confidence + ", {verdict} the {required:+g} allowed.",
        ),
    ]
    if limits.min_gain is not None:
        checks.append(
            at_least(
                "BLEU gain over champion",
                surely,
                limits.min_gain,
                with_confidence + ", {verdict} the {required:+g} asked for.",
            )
        )
    worst, change = worst_slice(metrics)
    return [
        *checks,
        at_least(
            "outputs long enough",
            candidate.get("length_ratio"),
            limits.min_length_ratio,
            "Outputs are {observed:.2f} times as long as the references, {verdict} {required:g}.",
        ),
        at_most(
            "outputs short enough",
            candidate.get("length_ratio"),
            limits.max_length_ratio,
            "Outputs are {observed:.2f} times as long as the references, {verdict} {required:g}.",
        ),
        at_most(
            "empty outputs",
            candidate.get("empty"),
            limits.max_empty,
            "{observed:.1%} of the outputs are empty, {verdict} {required:.1%}.",
        ),
        at_most(
            "copied outputs",
            candidate.get("copied"),
            limits.max_copied,
            "{observed:.1%} of the outputs repeat the source, {verdict} {required:.1%}.",
        ),
        at_least(
            "worst slice",
            change,
            negative(limits.max_slice_loss),
            f"Sentences {worst} fare worst: BLEU changes by "
            "{observed:+.2f}, {verdict} the {required:+g} allowed.",
        ),
        at_most(
            "stored model reproduces its loss",
            relative_difference(candidate.get("validation_loss"), metrics.get("trained_validation_loss")),
            REPRODUCED_WITHIN,
            "Read back from the store, the model's loss differs by {observed:.1e} of itself, {verdict} {required:g}.",
        ),
    ]


def at_most(name: str, observed: float | None, limit: float | None, sentence: str) -> Check:
    """A check that holds when the observed value is not above its limit."""
    return _compare(name, observed, limit, sentence, sign="<=", holds=operator.le, verdicts=("within", "above"))


def at_least(name: str, observed: float | None, limit: float | None, sentence: str) -> Check:
    """A check that holds when the observed value is not below its limit."""
    return _compare(name, observed, limit, sentence, sign=">=", holds=operator.ge, verdicts=("at least", "below"))


def _compare(
    name: str,
    observed: float | None,
    limit: float | None,
    sentence: str,
    *,
    sign: str,
    holds: Callable[[float, float], bool],
    verdicts: tuple[str, str],
) -> Check:
    known = observed is not None and math.isfinite(observed)
    if limit is None:
        return Check(name, observed if known else None, "not set", False, f"No limit is set for {name!r}.")
    required = f"{sign} {limit:g}"
    if observed is None or not known:
        return Check(name, None, required, False, f"There is no value for {name!r}.")
    passed = holds(observed, limit)
    verdict = verdicts[0] if passed else verdicts[1]
    said = sentence.format(observed=observed, required=limit, verdict=verdict)
    return Check(name, observed, required, passed, said)


def difference(candidate: float | None, champion: float | None) -> float | None:
    """How far the candidate is above the champion, where both are known."""
    return None if candidate is None or champion is None else candidate - champion


def relative_difference(value: float | None, expected: float | None) -> float | None:
    """How far a value is from the expected one, as a share of it, where both are known."""
    return None if value is None or not expected else abs(value - expected) / abs(expected)


def negative(value: float | None) -> float | None:
    """What may be lost, as a lower limit of a change."""
    return None if value is None else -value


def worst_slice(metrics: dict[str, Any]) -> tuple[str, float | None]:
    """The slice of the test split on which BLEU changes most for the worse, and the change."""
    slices = metrics.get("slices") or {}
    changes = {name: difference(part.get("candidate"), part.get("champion")) for name, part in slices.items()}
    worst, least = "of every slice", math.inf
    for name, change in changes.items():
        if change is None or not math.isfinite(change):
            return name, None
        if change < least:
            worst, least = name, change
    return worst, least if changes else None
