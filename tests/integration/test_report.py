"""The report: written whatever became of the run, from whatever there is, and nothing from the data is markup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hypothesis
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tasks import registry, report, settings
from tasks.errors import DataError
from tasks.run import Run
from tasks.storage import Store

EVIL = "<script>alert('x')</script>"
METRIC = {"score": 20.0, "low": 19.0, "high": 21.0, "signature": f"nrefs:1|{EVIL}"}
EPOCHS: list[dict[str, Any]] = [
    {"epoch": 0, "training_loss": None, "validation_loss": 2.0},
    {"epoch": 1, "training_loss": 1.5, "validation_loss": 1.0},
]
GAIN = {"observed": 1.0, "low": -0.5, "high": 2.5}


@pytest.fixture
def run(store: Store) -> Run:
    """A run in each kind of store."""
    return configured(store)


def configured(store: Store) -> Run:
    """A run that has been configured, with markup wherever a person could put some."""
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
    run.save_result("train", {"summary": "trained", "seconds": 1.0, "epochs": EPOCHS, "weight_change": 0.125})
    system = {
        "bleu": METRIC, "chrf": METRIC, "validation_loss": 1.0, "test_loss": None, "length_ratio": 1.0, "empty": 0.0,
        "copied": 0.0, "repeating": 0.0, "unknown": 0.0,
    }  # fmt: skip
    both = {"champion": system, "candidate": system, "gain": {"bleu": GAIN, "chrf": GAIN, "validation_loss": GAIN}}
    run.store.put_json(
        run.key("evaluation", "metrics.json"),
        {
            "champion_version": None,
            "sentences": 1,
            "chance": 0.2,
            "engine": {"candidate": EVIL},
            "slices": {"short": {"sentences": 30, "champion": 1.0, "candidate": 2.0, "low": 0.5, "high": 1.5}},
            "extra": {"talks": {"sentences": 9, **both}},
            **both,
        },
    )
    table = {
        "set": ["test"],
        "source": [f"Hello {EVIL}"],
        "reference": [EVIL],
        "champion": [f"uno {EVIL}"],
        "candidate": ["dos &amp; 3"],
    }
    run.store.put(run.key("evaluation", "translations.parquet"), pd.DataFrame(table).to_parquet())
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
    run.save_result("reject", {"summary": "refused", "reasons": ["BLEU is too low."], "production": "v7", "seconds": 1})
    html = page(run)
    assert "Production stays at version v7." in html
    assert html.index(">Rejected</h1>") < html.index("BLEU is too low.") < html.index("Candidate against champion")
    assert html.count("<svg") == 5  # scores, loss, and three of the data
    assert "í &lt;, now in spare embedding rows" in html


def test_a_promotion_shows_where_the_two_differ(run: Run) -> None:
    judged(run, "promote")
    run.save_result("promote", {"summary": "demo v1 is in production", "version": "v1", "seconds": 1.0})
    html = page(run)
    assert ">Promoted</h1>" in html
    assert "demo v1 is in production" in html
    assert "The trained weights moved by 0.1250 of their length" in html
    assert "<mark>uno &lt;script&gt;" in html
    assert "<mark>dos &amp;amp; 3</mark>" in html


def test_the_same_run_gives_the_same_page(run: Run) -> None:
    judged(run, "promote")
    assert page(run) == page(run)


def test_a_failed_run_says_which_step_and_why(run: Run) -> None:
    pulled(run, changed=True)
    run.save_failure("validate", DataError(f"the corpus is not fit: {EVIL}"))
    run.save_failure("pull", DataError("before it was tried again"))
    html = page(run)
    assert '<h1 class="bad">Failed</h1>' in html
    assert "The validate step failed: the corpus is not fit: &lt;script&gt;" in html
    assert "before it was tried again" not in html


def test_metrics_that_cannot_be_read_do_not_keep_the_rest_from_being_reported(run: Run) -> None:
    judged(run, "reject")
    run.store.put(run.key("evaluation", "metrics.json"), b'{"half')
    html = page(run)
    assert "BLEU is too low." in html
    assert "Candidate against champion" not in html


OLD_METRICS = {
    "champion_version": None,
    "sentences": 400,
    "candidate": {"bleu": {"score": 21.5}, "validation_loss": 1.25},
    "champion": {"bleu": {"score": 20.0}},
    "gain": {"bleu": {"low": 0.5}},
    "slices": {"short": {"candidate": 5.0}, "long": {"candidate": 7.0, "champion": 6.0}},
}


def test_what_older_code_left_is_reported_and_what_it_lacks_reads_as_a_dash(run: Run, caplog: Any) -> None:
    judged(run, "reject")
    run.store.put_json(run.key("evaluation", "metrics.json"), OLD_METRICS)
    run.store.put(run.key("evaluation", "translations.parquet"), pd.DataFrame({"source": ["Hello"]}).to_parquet())
    run.store.put_json(run.key("validation", "shape.json"), {"source": [1]})
    run.save_result("validate", {"summary": "valid", "rows": {"train": 9}})
    run.save_result("train", {"summary": "trained", "seconds": 1.0, "epochs": [{"epoch": 1, "loss": 1.0}]})
    html = page(Run.at(run.uri))
    assert "21.50" in html
    assert '<td class="number">5.00</td><td class="number">– <span' in html  # of the slice without a champion
    assert '<td class="number">7.00</td><td class="number">+1.00 <span' in html
    assert '<td>train</td><td class="number">9</td><td class="number">–</td>' in html
    assert html.count("<svg") == 0
    assert "without translations" in caplog.text


@given(st.data())
@hypothesis.settings(max_examples=6, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
def test_no_figure_is_needed_for_the_page_to_be_written(bucket: Store, data: st.DataObject) -> None:
    run = configured(bucket)
    judged(run, "reject")

    def without_some(tree: Any, keep: frozenset[str] = frozenset()) -> Any:
        if not isinstance(tree, dict):
            return tree
        left_out = data.draw(st.sets(st.sampled_from(sorted(tree)), max_size=5)) if tree else set()
        return {name: without_some(value) for name, value in tree.items() if name in keep or name not in left_out}

    always = frozenset({"summary", "decision", "checks"})  # every version of the code has written these
    for step in ("pull", "validate", "preprocess", "train", "evaluate", "gate"):
        run.store.put_json(run.key("results", f"{step}.json"), without_some(run.result(step), always))
    for name in (("evaluation", "metrics.json"), ("validation", "shape.json")):
        run.store.put_json(run.key(*name), without_some(run.store.get_json(run.key(*name))))
    assert "BLEU is too low." in page(Run.at(run.uri))


def test_a_price_gives_the_cost_of_each_step(run: Run) -> None:
    content = run.store.get_json(run.key("config.json"))
    content["settings"]["costs"] = {"cpu_hour": 1.8, "gpu_hour": 36.0}
    run.store.put_json(run.key("config.json"), content)
    run = Run.at(run.uri)
    pulled(run, changed=True)
    run.save_result(
        "train", {**run.result("configure"), "seconds": 100.0, "gpus": 1, "epochs": EPOCHS, "weight_change": 0.125}
    )
    run.save_result("pull", {**run.result("pull"), "seconds": 1000.0, "gpus": 0})
    html = page(run)
    assert '<td class="number">1 min 40 s, GPU</td>' in html
    assert '<td class="number">1.00</td>' in html
    assert '<td class="number">0.50</td>' in html
    assert "moved by 0.1250 of their length" in html


def test_every_version_is_on_the_trend_page(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    for number in (1, 2):
        (tmp_path / "config.json").write_text(str(number))
        about: dict[str, Any] = {"run": EVIL, "metrics": {"candidate": 20.0 + number, "champion": 20.0}}
        about = {} if number == 1 else about | {"validation_loss": 1.5, "seconds": {"train": 90.0}}
        registry.publish(run.store, "demo", f"2026-11-0{number}-aaaa", tmp_path, about)
    registry.move(run.store, "demo", "2026-11-02-aaaa", expected=None, who="x", why="y")
    page(run)
    html = run.store.get("models/demo/trend.html").decode()
    assert "<script" not in html
    assert html.index("2026-11-01-aaaa") < html.index("2026-11-02-aaaa") < html.index(">production<")
    assert "1 min 30 s" in html
    assert "22.00" in html
    assert html.count(">–</td>") == 4  # the first version is of older code, which left no figures
    assert html.count("<svg") == 4
