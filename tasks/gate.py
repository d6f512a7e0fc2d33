"""gate: decide, on evidence, whether the candidate is better than the champion.

    python -m tasks gate --run s3://retrain/runs/RUN_ID
    python -m tasks gate --run s3://retrain/runs/RUN_ID --dry-run --set gate.min_bleu=25    # only show the checks

Reads    runs/RUN_ID/evaluation/metrics.json, translations.parquet, losses.parquet; candidate/; result of validate
Writes   runs/RUN_ID/gate.json   decision, and for each check: name, observed, required, passed, sentence
Result   the same

Every check must pass. A metric that is missing or not a number refuses, and so does a limit that nobody set. Numbers
are computed again from the sentences that evaluate kept; the stored candidate must translate some of them as it did.
"""

from __future__ import annotations

import logging
import math
import operator
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tasks import artifacts
from tasks.data.tokenizer import load_tokenizer
from tasks.errors import DataError
from tasks.evaluate import read_tables
from tasks.judging import ctranslate, metrics
from tasks.judging.examine import AGREEMENT, agreement, spread
from tasks.judging.metrics import SYSTEMS, TEST
from tasks.judging.translation import decode, encode, generate
from tasks.model import load_model
from tasks.run import Run
from tasks.settings import Gate, Settings
from tasks.storage import MissingObjectError

log = logging.getLogger(__name__)

REPRODUCED_WITHIN = 1e-3  # relative: the loss of the artefact read back from the store, against the trained model's
MIN_SENTENCES = 100  # fewer cannot tell two systems apart, whatever a resampling of them says
MIN_COMPARABLE = 0.5  # the share of sentences that both tokenizers write alike, on which losses are compared
SAMPLE = 16  # sentences that the stored candidate translates again


@dataclass(frozen=True)
class Check:
    """One condition for promotion, what was seen, and a sentence that a person can read."""

    name: str
    observed: float | None
    required: str
    passed: bool
    sentence: str


def run(run: Run, *, settings: Settings | None = None, dry: bool = False) -> dict[str, Any]:
    """Check the candidate and record the decision: `promote` or `reject`.

    A dry run, perhaps with other settings, records nothing. Raises `DataError` when the evaluation is damaged.
    """
    evaluated, settings = run.result("evaluate"), settings or run.settings
    found, translations = read_evaluation(run, settings)
    checks = check_all(
        found,
        settings,
        evaluated=evaluated,
        data_valid=run.find_result("validate") is not None,
        reproduced=reproduced(run, translations, evaluated),
    )
    refused = [check for check in checks if not check.passed]
    outcome = {
        "decision": "reject" if refused else "promote",
        "champion_version": evaluated["champion_version"],
        "candidate_fingerprint": evaluated["candidate_fingerprint"],
        "checks": [asdict(check) for check in checks],
    }
    if not dry:
        run.store.put_json(run.key("gate.json"), outcome)
    reasons = " ".join(check.sentence for check in refused) or f"all {len(checks)} checks hold"
    return {"summary": f"{outcome['decision']}: {reasons}", **outcome}


def read_evaluation(run: Run, settings: Settings) -> tuple[dict[str, Any], pd.DataFrame]:
    """What evaluate found, and the translations that it is made of.

    Every number is computed again. Raises `DataError` when a file is damaged, or metrics.json says something else.
    """
    where = f"{run.uri}/evaluation/metrics.json"
    try:
        stored = run.store.get_json(run.key("evaluation", "metrics.json"))
    except MissingObjectError as error:
        raise DataError(f"{error}: run the evaluate step again") from error
    tables = read_tables(run)
    try:
        found = metrics.measure(*tables, run.settings.gate)
        stored_numbers = {name: stored[name] for name in found}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where} or a table beside it is damaged ({error!r}): run the evaluate step again") from error
    if other := next(differences(stored_numbers, found), None):
        raise DataError(f"{where} is not what the translations beside it give ({other}): run the evaluate step again")
    if settings.gate != run.settings.gate:
        found = metrics.measure(*tables, settings.gate)
    return {**stored, **found}, tables[0]


def differences(stored: Any, found: Any, name: str = "") -> Iterator[str]:
    """Where two trees of metrics differ by more than rounding, in words."""
    if isinstance(stored, dict) and isinstance(found, dict):
        for key in sorted({*stored, *found}, key=str):
            yield from differences(stored.get(key), found.get(key), f"{name}.{key}" if name else key)
    elif isinstance(stored, float | int) and isinstance(found, float | int):
        if not math.isclose(stored, found, rel_tol=1e-6, abs_tol=1e-9):
            yield f"{name}: {stored} instead of {found}"
    elif stored != found:
        yield f"{name}: {stored!r} instead of {found!r}"


def reproduced(run: Run, translations: pd.DataFrame, evaluated: dict[str, Any]) -> float | None:
    """The share of a sample that the stored candidate, downloaded now, translates as in the evaluation.

    The engine that translated then does so again: two engines agree only almost. None when there is nothing to
    compare: the candidate is not there, is damaged, or is another than was evaluated.
    """
    test = translations[translations["set"] == TEST]
    rows = test.iloc[spread(test["source"].str.len().tolist(), SAMPLE)]
    prepared = run.settings.preprocessing
    search = run.settings.evaluation.model_dump(include={"max_new_tokens", "batch_size", "beams"})
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "candidate"
        try:
            manifest = artifacts.fetch(run.store, run.result("train")["candidate"], directory)
            if manifest.fingerprint != evaluated["candidate_fingerprint"]:
                log.warning("the candidate has changed since it was evaluated")
                return None
            tokenizer = load_tokenizer(directory)
            sources = encode(tokenizer, rows["source"].tolist(), prepared.prompt, prepared.max_tokens)
            if evaluated["engine"]["candidate"].startswith("ctranslate2"):
                again = ctranslate.generate(ctranslate.load(directory, tokenizer), tokenizer, sources, **search)
            else:
                again = generate(load_model(directory), sources, **search)
        except (MissingObjectError, DataError) as error:
            log.warning("the candidate cannot be read back: %s", error)
            return None
    return agreement(decode(tokenizer, again), rows["candidate"].tolist())


def check_all(
    found: dict[str, Any],
    settings: Settings,
    *,
    evaluated: dict[str, Any],
    data_valid: bool,
    reproduced: float | None,
) -> list[Check]:
    """Every check, in the order in which a person would ask.

    `found` is what `metrics.measure` gives, and what evaluate says of itself; `evaluated` is evaluate's result.
    """
    limits = settings.gate
    return [
        *sound(found, evaluated, data_valid=data_valid),
        *good(found, limits),
        *better(found, limits),
        *nothing_hidden(found, limits),
        *on_extra_sets(found, settings),
        *same_model(found, reproduced),
    ]


def sound(found: dict[str, Any], evaluated: dict[str, Any], *, data_valid: bool) -> list[Check]:
    """Whether there is something to judge by: valid data, enough sentences, both systems scored the same way."""
    expected = metrics.signatures()
    scored = [found.get(system, {}).get(name, {}).get("signature") for system in SYSTEMS for name in expected]
    same_scores = scored == [*expected.values()] * len(SYSTEMS)
    same_test = found.get("fingerprint") is not None and found["fingerprint"] == evaluated.get("test_fingerprint")
    return [
        yes_or_no("data valid", data_valid, "The data passed validation.", "The data has not passed validation."),
        yes_or_no(
            "scored alike",
            same_scores,
            "Both systems were scored with this version's sacrebleu signatures.",
            f"The scores do not all have this version's signatures: expected {expected}, found {scored}.",
        ),
        yes_or_no(
            "same test split",
            same_test,
            "The translations are of the test split that was evaluated.",
            "The translations are not of the test split that was evaluated: run the evaluate step again.",
        ),
        at_least(
            "enough sentences",
            found.get("sentences"),
            MIN_SENTENCES,
            "The test split has {observed:,} sentences, {verdict} the {required:g} that can tell two systems apart.",
        ),
        at_least(
            "comparable tokenizers",
            found.get("comparable"),
            MIN_COMPARABLE,
            "Both tokenizers write {observed:.0%} of the references alike, {verdict} the {required:.0%} on which the "
            "losses can be compared.",
        ),
    ]


def good(found: dict[str, Any], limits: Gate) -> list[Check]:
    """Absolute limits."""
    candidate = found.get("candidate", {})
    return [
        at_most(
            "validation loss",
            candidate.get("validation_loss"),
            limits.max_validation_loss,
            "The loss per target token is {observed:.4f}, {verdict} the limit of {required:g}.",
        ),
        at_least(
            "BLEU",
            candidate.get("bleu", {}).get("score"),
            limits.min_bleu,
            "BLEU is {observed:.2f}, {verdict} the floor of {required:g}.",
        ),
    ]


def better(found: dict[str, Any], limits: Gate) -> list[Check]:
    """Against the champion: not worse; and better, where a gain is asked for."""
    gain = found.get("gain", {})
    surely = gain.get("bleu", {}).get("low")
    with_confidence = f"With {100 * limits.confidence:g}% confidence BLEU changes by {{observed:+.3f}} or better"
    checks = [
        at_most(
            "validation loss against champion",
            gain.get("validation_loss", {}).get("observed"),
            limits.validation_loss_margin,
            "The loss differs from the champion's by {observed:+.4f}, {verdict} the margin of {required:+g}.",
        ),
        at_least(
            "BLEU not worse than champion",
            surely,
            negative(limits.non_inferiority_margin),
            with_confidence + ", {verdict} the {required:+g} allowed.",
        ),
    ]
    if limits.min_gain is None:
        return checks
    return [
        *checks,
        at_least(
            "BLEU gain over champion",
            surely,
            limits.min_gain,
            with_confidence + ", {verdict} the {required:+g} asked for.",
        ),
        at_most(
            "BLEU gain not by chance",
            found.get("chance"),
            round(1 - limits.confidence, 9),
            "Were the two the same, BLEU would differ as much in {observed:.1%} of cases, {verdict} {required:.1%}.",
        ),
    ]


def nothing_hidden(found: dict[str, Any], limits: Gate) -> list[Check]:
    """What averages hide: degenerate outputs, a slice that suffers, a test split that was learnt by heart."""
    candidate, (worst, change) = found.get("candidate", {}), worst_slice(found)
    as_long = "Outputs are {observed:.2f} times as long as the references, {verdict} {required:g}."
    return [
        at_least("outputs long enough", candidate.get("length_ratio"), limits.min_length_ratio, as_long),
        at_most("outputs short enough", candidate.get("length_ratio"), limits.max_length_ratio, as_long),
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
        at_most(
            "repeating outputs",
            candidate.get("repeating"),
            limits.max_repeating,
            "{observed:.1%} of the outputs repeat a phrase over and over, {verdict} {required:.1%}.",
        ),
        at_most(
            "unknown tokens",
            candidate.get("unknown"),
            limits.max_unknown,
            "{observed:.2%} of the output's tokens stand for no text, {verdict} {required:.2%}.",
        ),
        at_least(
            "worst slice",
            change,
            negative(limits.max_slice_loss),
            f"On sentences {worst} BLEU changes, with {100 * limits.confidence:g}% confidence, by at most "
            "{observed:+.2f}, {verdict} the {required:+g} allowed.",
        ),
        at_most(
            "no leak of the test split",
            found.get("leak", {}).get("low"),
            limits.max_leak,
            f"With {100 * limits.confidence:g}% confidence the loss fell by {{observed:+.3f}} or more further on the "
            "test split than on the validation split, {verdict} the {required:g} allowed.",
        ),
    ]


def on_extra_sets(found: dict[str, Any], settings: Settings) -> list[Check]:
    """A floor for each extra test set."""
    scores = found.get("extra", {})
    return [
        at_least(
            f"BLEU on {name}",
            scores.get(name, {}).get("candidate", {}).get("bleu", {}).get("score"),
            settings.gate.extra_min_bleu.get(name),
            f"BLEU on {name} is {{observed:.2f}}, {{verdict}} the floor of {{required:g}}.",
        )
        for name in settings.evaluation.extra_sets
    ]


def same_model(found: dict[str, Any], reproduced: float | None) -> list[Check]:
    """Whether what lies in the store is what was trained, and what was evaluated."""
    return [
        at_most(
            "stored model reproduces its loss",
            relative_difference(
                found.get("candidate", {}).get("validation_loss"), found.get("trained_validation_loss")
            ),
            REPRODUCED_WITHIN,
            "Read back from the store, the model's loss differs by {observed:.1e} of itself, {verdict} {required:g}.",
        ),
        at_least(
            "stored model reproduces its translations",
            reproduced,
            AGREEMENT,
            "Read back from the store once more, the model translates {observed:.0%} of a sample as in the evaluation, "
            "{verdict} {required:.0%}.",
        ),
    ]


def yes_or_no(name: str, holds: bool, so: str, not_so: str) -> Check:
    """A check of a fact."""
    return Check(name, float(holds), "yes", holds, so if holds else not_so)


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


def relative_difference(value: float | None, expected: float | None) -> float | None:
    """How far a value is from the expected one, as a share of it, where both are known."""
    return None if value is None or not expected else abs(value - expected) / abs(expected)


def negative(value: float | None) -> float | None:
    """What may be lost, as a lower limit of a change."""
    return None if value is None else -value


def worst_slice(metrics: dict[str, Any]) -> tuple[str, float | None]:
    """The slice of the test split that surely loses most, and the change of BLEU that it surely does not exceed."""
    worst, least = "of every slice", math.inf
    for name, part in (metrics.get("slices") or {}).items():
        high = part.get("high")
        if high is None or not math.isfinite(high):
            return name, None
        if high < least:
            worst, least = name, high
    return worst, least
