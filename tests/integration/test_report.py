"""The report: written whatever became of the run, from whatever there is, and nothing from the data is markup."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from tasks import report, settings
from tasks.run import Run
from tasks.storage import Store

EVIL = "<script>alert('x')</script>"
METRIC = {"score": 20.0, "signature": f"nrefs:1|{EVIL}"}


@pytest.fixture
def run(store: Store) -> Run:
    """A run that has been configured, with markup wherever a person could put some."""
    from pathlib import Path

    content = yaml.safe_load((Path(__file__).resolve().parents[2] / "config" / "demo.yaml").read_text())
    content["description"] = content["preprocessing"]["prompt"] = EVIL
    run = Run.at(f"s3://{store.bucket}/runs/r")
    store.put_json(
        run.key("config.json"),
        {
            "settings": settings.Settings.model_validate(content).model_dump(mode="json"),
            "created": "2026-11-24T00:00:00+00:00",
            "pipeline": "demo.yaml",
            "requested": {"preprocessing.prompt": EVIL},
            "code_version": "c0ffee",
            "libraries": {"python": "3.11"},
        },
    )
    run.save_result("configure", {"summary": "demo.yaml is valid", "seconds": 0.1})
    return run


def page(run: Run) -> str:
    """The report's HTML, after a look at what must hold for every one of them."""
    report.run(run)
    html = run.store.get(run.key("report.html")).decode()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", html), "a page must not load anything"
    return html


def pulled(run: Run, *, changed: bool) -> None:
    run.save_result(
        "pull", {"summary": "pulled", "dataset": "d", "base_model": "b", "changed": changed, "seconds": 1.0}
    )


def judged(run: Run, decision: str) -> None:
    """Results and files of every step up to the gate's."""
    pulled(run, changed=True)
    columns = [rule.column for rule in report.RULES]
    run.save_result(
        "validate",
        {
            "summary": "valid",
            "seconds": 1.0,
            "quarantined": dict.fromkeys(columns, 3),
            "rows": {"train": 9},
            "usable": {"train": 8},
            "unknown_rate": {"train": 0.25},
            "conflicting": {"train": 0.5},
            "characters": {"added": ["í", "<"], "left_out": {"ж": 2}},
            "drift": {"rows": 0.5},
        },
    )
    histogram = {
        "length_edges": [0, 10],
        "source": [1, 2],
        "target": [2, 1],
        "ratio_edges": [0.5, 1, 2],
        "ratios": [1, 2],
    }
    run.store.put_json(run.key("validation", "shape.json"), histogram)
    run.save_result("preprocess", {"summary": "tokenised", "seconds": 1.0})
    epochs: list[dict[str, Any]] = [
        {"epoch": 0, "training_loss": None, "validation_loss": 2.0},
        {"epoch": 1, "training_loss": 1.5, "validation_loss": 1.0},
    ]
    run.save_result("train", {"summary": "trained", "seconds": 1.0, "epochs": epochs})
    system = {
        "bleu": METRIC, "chrf": METRIC, "validation_loss": 1.0, "length_ratio": 1.0, "empty": 0.0, "copied": 0.0
    }  # fmt: skip
    run.store.put_json(
        run.key("evaluation", "metrics.json"),
        {
            "champion_version": None,
            "sentences": 1,
            "champion": system,
            "candidate": system,
            "slices": {"short": {"sentences": 30, "champion": 1.0, "candidate": 2.0}},
        },
    )
    statistics = [np.zeros(10, int)]
    table = {
        "source": [f"Hello {EVIL}"],
        "reference": [EVIL],
        "champion": [f"uno {EVIL}"],
        "candidate": ["dos &amp; 3"],
    }
    frame = pd.DataFrame({**table, "champion_statistics": statistics, "candidate_statistics": statistics})
    run.store.put(run.key("evaluation", "translations.parquet"), frame.to_parquet())
    run.save_result("evaluate", {"summary": "evaluated", "seconds": 1.0})
    check = {"name": "BLEU", "observed": None, "required": ">= 30", "passed": False, "sentence": "BLEU is too low."}
    run.save_result(
        "gate",
        {
            "summary": decision,
            "decision": decision,
            "seconds": 1.0,
            "checks": [{**check, "passed": decision == "promote"}],
        },
    )


def test_a_run_that_stopped_early_is_reported_with_what_is_known(run: Run) -> None:
    html = page(run)
    assert '<h1 class="bad">Incomplete</h1>' in html
    assert "The run has no result of the pull step" in html


def test_a_run_that_found_nothing_new_says_so(run: Run) -> None:
    pulled(run, changed=False)
    assert ">Unchanged</h1>" in page(run)


def test_a_refusal_begins_with_its_reasons(run: Run) -> None:
    judged(run, "reject")
    html = page(run)
    assert html.index(">Rejected</h1>") < html.index("BLEU is too low.") < html.index("Candidate against champion")
    assert html.count("<svg") == 5  # scores, loss, and three of the data
    assert "í &lt;, now in spare embedding rows" in html


def test_a_promotion_shows_where_the_two_differ(run: Run) -> None:
    judged(run, "promote")
    run.save_result("promote", {"summary": "demo v1 is in production", "version": "v1", "seconds": 1.0})
    html = page(run)
    assert ">Promoted</h1>" in html
    assert "demo v1 is in production" in html
    assert "<mark>uno &lt;script&gt;" in html
    assert "<mark>dos &amp;amp; 3</mark>" in html


def test_the_same_run_gives_the_same_page(run: Run) -> None:
    judged(run, "promote")
    assert page(run) == page(run)
