"""The gate: every check can refuse alone, and nothing that is missing passes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gate import Check, check_all, differences
from tasks.judging import metrics
from tasks.settings import Settings, load

DEMO = load(Path(__file__).resolve().parents[2] / "config" / "demo.yaml").model_dump()
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
    "max_repeating": 0.01,
    "max_unknown": 0.001,
    "max_slice_loss": 2,
    "max_leak": 0.05,
    "extra_min_bleu": {"talks": 15},
}
SIGNED = {name: {"signature": signature, "score": 30.0} for name, signature in metrics.signatures().items()}
EVALUATED = {"test_fingerprint": "abc"}
GOOD: dict[str, Any] = {
    "trained_validation_loss": 1.5,
    "sentences": 500,
    "fingerprint": "abc",
    "comparable": 1.0,
    "candidate": {
        **copy.deepcopy(SIGNED), "validation_loss": 1.5, "length_ratio": 1.0, "empty": 0.0, "copied": 0.0,
        "repeating": 0.0, "unknown": 0.0,
    },
    "champion": copy.deepcopy(SIGNED),
    "gain": {"bleu": {"low": 1.0}, "validation_loss": {"observed": -0.1}},
    "chance": 0.001,
    "leak": {"low": -0.02},
    "slices": {"short": {"high": 6.5}, "long": {"high": 0.5}},
    "extra": {"talks": {"candidate": {"bleu": {"score": 18.0}}}},
    "reproduced": 1.0,
}  # fmt: skip
# The value that each check observes, the limit it is held against, and a value that alone must refuse.
CHECKS: dict[str, tuple[str, float]] = {
    "enough sentences": ("sentences", 99),
    "comparable tokenizers": ("comparable", 0.4),
    "validation loss": ("candidate.validation_loss", 2.001),
    "validation loss against champion": ("gain.validation_loss.observed", 0.051),
    "BLEU": ("candidate.bleu.score", 19.99),
    "BLEU gain over champion": ("gain.bleu.low", 0.49),
    "BLEU gain not by chance": ("chance", 0.041),
    "outputs long enough": ("candidate.length_ratio", 0.79),
    "outputs short enough": ("candidate.length_ratio", 1.21),
    "empty outputs": ("candidate.empty", 0.011),
    "copied outputs": ("candidate.copied", 0.021),
    "repeating outputs": ("candidate.repeating", 0.011),
    "unknown tokens": ("candidate.unknown", 0.0011),
    "worst slice": ("slices.long.high", -2.1),
    "no leak of the test split": ("leak.low", 0.051),
    "BLEU on talks": ("extra.talks.candidate.bleu.score", 14.9),
    "stored model reproduces its loss": ("trained_validation_loss", 1.51),
    "stored model reproduces its translations": ("reproduced", 0.8),
}


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


def judge(found: dict[str, Any], limits: dict[str, Any] | None = None, *, data_valid: bool = True) -> list[Check]:
    demo = copy.deepcopy(DEMO)
    demo["evaluation"]["extra_sets"] = {"talks": "talks.tsv"}
    demo["gate"] = limits or LIMITS
    return check_all(
        found,
        Settings.model_validate(demo),
        evaluated=EVALUATED,
        data_valid=data_valid,
        reproduced=found.get("reproduced"),
    )


def test_a_better_candidate_passes_every_check() -> None:
    checks = judge(GOOD)
    assert refused(checks) == set()
    assert len(checks) == 22
    assert all(check.sentence.endswith(".") for check in checks)


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_refuses_alone_and_says_why(name: str) -> None:
    found = changed(*CHECKS[name])
    if name == "validation loss":  # nothing but the absolute limit is to be broken
        found["trained_validation_loss"] = 2.001
    checks = judge(found)
    assert refused(checks) == {name}
    (check,) = [check for check in checks if not check.passed]
    assert "above" in check.sentence or "below" in check.sentence


def test_a_candidate_that_is_not_surely_better_is_refused_where_a_gain_is_asked_for() -> None:
    same = changed("gain.bleu.low", 0.0)
    assert refused(judge(same)) == {"BLEU gain over champion"}
    assert refused(judge(same, {**LIMITS, "min_gain": None})) == set()


def test_a_worse_candidate_is_refused_whether_a_gain_is_asked_for_or_not() -> None:
    worse = changed("gain.bleu.low", -0.31)
    assert refused(judge(worse, {**LIMITS, "min_gain": None})) == {"BLEU not worse than champion"}


def test_data_that_was_not_validated_refuses() -> None:
    assert refused(judge(GOOD, data_valid=False)) == {"data valid"}


@pytest.mark.parametrize("path", ["candidate.bleu.signature", "champion.chrf.signature"])
def test_another_signature_refuses(path: str) -> None:
    assert refused(judge(changed(path, "nrefs:1|case:lc|eff:no|tok:none|smooth:exp|version:2.6.0"))) == {"scored alike"}


@pytest.mark.parametrize("value", ["other", None])
def test_another_test_split_refuses(value: str | None) -> None:
    assert refused(judge(changed("fingerprint", value))) == {"same test split"}


@pytest.mark.parametrize("name", sorted(LIMITS.keys() - {"min_gain", "extra_min_bleu"}))
def test_a_limit_that_nobody_set_refuses(name: str) -> None:
    refusals = [check for check in judge(GOOD, {**LIMITS, name: None}) if not check.passed]
    assert len(refusals) == 1
    assert refusals[0].required == "not set"
    assert refusals[0].sentence.startswith("No limit is set for")


def test_an_extra_test_set_without_a_floor_refuses() -> None:
    assert refused(judge(GOOD, {**LIMITS, "extra_min_bleu": {}})) == {"BLEU on talks"}


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", CHECKS)
def test_a_value_that_is_missing_or_no_number_refuses(name: str, value: float | None) -> None:
    assert name in refused(judge(changed(CHECKS[name][0], value)))


@pytest.mark.parametrize("part", GOOD)
def test_metrics_without_a_part_refuse(part: str) -> None:
    assert refused(judge({name: value for name, value in GOOD.items() if name != part}))


@settings(max_examples=50)
@given(st.sampled_from(sorted(CHECKS)), st.floats(0, 1))
def test_no_good_value_makes_up_for_a_bad_one(name: str, how_much: float) -> None:
    found = changed(*CHECKS[name])
    if name != "BLEU":
        found["candidate"]["bleu"]["score"] = 30 + 70 * how_much
    assert name in refused(judge(found))


def test_any_number_that_was_changed_is_found() -> None:
    tree = {"candidate": {"bleu": {"score": 30.0}, "loss": None}, "slices": {}}
    assert not list(differences(tree, copy.deepcopy(tree)))
    better = changed("candidate.bleu.score", 30.1)
    assert list(differences(better, GOOD)) == ["candidate.bleu.score: 30.1 instead of 30.0"]
    assert list(differences({}, {"chance": 0.5})) == ["chance: None instead of 0.5"]
