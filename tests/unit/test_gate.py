"""The gate: every check can refuse alone, and nothing that is missing passes."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gate import Check, check_all
from tasks.scoring import STATISTICS
from tasks.settings import Gate

LIMITS: dict[str, Any] = {
    "max_validation_loss": 2.0,
    "validation_loss_margin": 0.05,
    "min_bleu": 20,
    "non_inferiority_margin": 0.3,
    "min_gain": 0.5,
    "min_length_ratio": 0.8,
    "max_length_ratio": 1.2,
    "max_empty": 0.01,
    "max_copied": 0.02,
    "max_slice_loss": 2,
    "bootstrap_samples": 100,
}
GOOD: dict[str, Any] = {
    "trained_validation_loss": 1.5,
    "candidate": {"validation_loss": 1.5, "bleu": {"score": 30.0}, "length_ratio": 1.0, "empty": 0.0, "copied": 0.0},
    "champion": {"validation_loss": 1.6},
    "slices": {"short": {"champion": 20.0, "candidate": 25.0}, "long": {"champion": 20.0, "candidate": 19.0}},
}
# The value that each check observes, the limit it is held against, and a value that alone must refuse.
CHECKS: dict[str, tuple[str, str, float]] = {
    "validation loss": ("candidate.validation_loss", "max_validation_loss", 2.001),
    "validation loss against champion": ("champion.validation_loss", "validation_loss_margin", 1.4),
    "BLEU": ("candidate.bleu.score", "min_bleu", 19.99),
    "outputs long enough": ("candidate.length_ratio", "min_length_ratio", 0.79),
    "outputs short enough": ("candidate.length_ratio", "max_length_ratio", 1.21),
    "empty outputs": ("candidate.empty", "max_empty", 0.011),
    "copied outputs": ("candidate.copied", "max_copied", 0.021),
    "worst slice": ("slices.long.candidate", "max_slice_loss", 17.9),
    "stored model reproduces its loss": ("trained_validation_loss", "", 1.51),
}


def statistics(matched: int) -> np.ndarray:
    """A system's statistics over 100 sentences of ten words, so many of them matched."""
    row = [matched, matched - 1, matched - 2, matched - 3, 10, 9, 8, 7, 10, 10]
    assert len(row) == STATISTICS
    return np.tile(np.array(row), (100, 1))


BETTER = {"champion": statistics(5), "candidate": statistics(7)}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good metrics with one value in another's place."""
    metrics = copy.deepcopy(GOOD)
    *parents, leaf = path.split(".")
    target = metrics
    for parent in parents:
        target = target[parent]
    target[leaf] = value
    return metrics


def refused(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def judge(metrics: dict[str, Any], limits: dict[str, Any] | None = None, **kwargs: Any) -> list[Check]:
    bleu = kwargs.pop("bleu", BETTER)
    return check_all(metrics, bleu, Gate(**(limits or LIMITS)), data_valid=kwargs.pop("data_valid", True))


def test_a_better_candidate_passes_every_check() -> None:
    checks = judge(GOOD)
    assert refused(checks) == set()
    assert len(checks) == 12
    assert all(check.sentence.endswith(".") for check in checks)


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_refuses_alone_and_says_why(name: str) -> None:
    path, _, bad = CHECKS[name]
    metrics = changed(path, bad)
    if name == "validation loss":  # nothing but the absolute limit is to be broken
        metrics["champion"]["validation_loss"] = metrics["trained_validation_loss"] = bad
    checks = judge(metrics)
    assert refused(checks) == {name}
    (check,) = [check for check in checks if not check.passed]
    assert "above" in check.sentence or "below" in check.sentence


def test_a_candidate_that_is_not_surely_better_is_refused_where_a_gain_is_asked_for() -> None:
    same = {"champion": statistics(6), "candidate": statistics(6)}
    assert refused(judge(GOOD, bleu=same)) == {"BLEU gain over champion"}
    assert refused(judge(GOOD, {**LIMITS, "min_gain": None}, bleu=same)) == set()


def test_a_worse_candidate_is_refused_whether_a_gain_is_asked_for_or_not() -> None:
    worse = {"champion": statistics(7), "candidate": statistics(6)}
    assert refused(judge(GOOD, {**LIMITS, "min_gain": None}, bleu=worse)) == {"BLEU not worse than champion"}


def test_data_that_was_not_validated_refuses() -> None:
    assert refused(judge(GOOD, data_valid=False)) == {"data valid"}


@pytest.mark.parametrize("name", sorted(LIMITS.keys() - {"min_gain", "bootstrap_samples"}))
def test_a_limit_that_nobody_set_refuses(name: str) -> None:
    checks = judge(GOOD, {**LIMITS, name: None})
    (check,) = [check for check in checks if not check.passed]
    assert check.required == "not set"
    assert check.sentence.startswith("No limit is set for")


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", CHECKS)
def test_a_value_that_is_missing_or_no_number_refuses(name: str, value: float | None) -> None:
    assert name in refused(judge(changed(CHECKS[name][0], value)))


@pytest.mark.parametrize("part", ["candidate", "champion", "slices", "trained_validation_loss"])
def test_metrics_without_a_part_refuse(part: str) -> None:
    assert refused(judge({name: value for name, value in GOOD.items() if name != part}))


@settings(max_examples=50)
@given(st.sampled_from(sorted(CHECKS)), st.floats(0, 1))
def test_no_good_value_makes_up_for_a_bad_one(name: str, how_much: float) -> None:
    path, _, bad = CHECKS[name]
    metrics = changed(path, bad)
    metrics["candidate"]["bleu"] = {"score": 30 + 70 * how_much} if name != "BLEU" else metrics["candidate"]["bleu"]
    assert name in refused(judge(metrics))
