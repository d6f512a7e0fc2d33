"""report: write one HTML page that explains the run, and one that follows the model from version to version.

    python -m tasks report --run s3://retrain/runs/RUN_ID

Reads    runs/RUN_ID/config.json and whatever the run's steps have left so far; the versions' manifests
Writes   runs/RUN_ID/report.html     self-contained: no network, light and dark, for screen, phone and paper
         models/NAME/trend.html      the same for every version: BLEU, loss, size, training time
Result   where they are

They are written for every run, also for one that stopped or failed: then with what is known.
"""

from __future__ import annotations

import difflib
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from markupsafe import Markup, escape

from tasks import registry
from tasks.__main__ import STEPS
from tasks.data.rules import RULES
from tasks.errors import StepError
from tasks.judging.metrics import SYSTEMS, TEST
from tasks.judging.scoring import chrf_of_total, chrf_statistics
from tasks.pages import TEMPLATES, plots
from tasks.run import Run
from tasks.settings import Settings
from tasks.storage import MissingObjectError, Store

log = logging.getLogger(__name__)

SHOWN = 20  # sentences on the page


def run(run: Run) -> dict[str, Any]:
    """Write both pages."""
    key = run.key("report.html")
    run.store.put(key, render(run).encode())
    trend_key = f"models/{run.settings.name}/trend.html"
    if trend := render_trend(run.store, run.settings.name):
        run.store.put(trend_key, trend.encode())
    return {"summary": f"s3://{run.store.bucket}/{key}", "report": key, "trend": trend_key if trend else None}


def render(run: Run) -> str:
    """The run's page. Everything that came from data or settings is escaped."""
    steps = {step: run.find_result(step) for step in STEPS if step != "report"}
    found = {step: run.find_failure(step) for step in steps if not steps[step]}
    failures = {step: failure for step, failure in found.items() if failure}
    metrics = evaluation(run) if steps["evaluate"] else None
    return TEMPLATES.get_template("report.html.j2").render(
        run=run,
        config=run.config,
        settings=yaml.safe_dump(run.config["settings"], sort_keys=False, allow_unicode=True),
        steps=steps,
        failures=failures,
        seconds=sum(result["seconds"] for result in steps.values() if result),
        costs=costs(run, steps),
        duration=duration,
        outcome=outcome(steps, failures, run.settings),
        gate=steps["gate"],
        metrics=metrics,
        rules=RULES,
        data_plots=data_plots(run, steps["validate"]),
        loss_plot=Markup(plots.loss_curve(steps["train"]["epochs"])) if steps["train"] else None,  # noqa: S704
        gain_plot=Markup(plots.gain_intervals(gains(metrics))) if metrics else None,  # noqa: S704
        compared=compared(run) if metrics else None,
        lineage=lineage(run, steps),
    )


def evaluation(run: Run) -> dict[str, Any] | None:
    """What evaluate measured; None where it cannot be read, which must not keep the rest from being reported."""
    try:
        return run.store.get_json(run.key("evaluation", "metrics.json"))
    except StepError as error:
        log.warning("the report is without metrics: %s", error)
        return None


def outcome(
    steps: dict[str, dict[str, Any] | None], failures: dict[str, dict[str, Any]], settings: Settings
) -> tuple[str, list[str]]:
    """The run in one word and a few sentences."""
    pulled, gate = steps["pull"], steps["gate"]
    if steps["promote"]:
        why = [result["summary"] + "." for result in (steps["evaluate"],) if result]
        return "promoted", [steps["promote"]["summary"] + ".", *why]
    if failures:
        step, failure = next(iter(failures.items()))
        return "failed", [f"The {step} step failed: {failure['reason']}", "Production stays where it was."]
    refusals = [check["sentence"] for check in gate["checks"] if not check["passed"]] if gate else []
    if steps["reject"]:  # perhaps by a person
        refusals = steps["reject"]["reasons"]
    if refusals:
        return "rejected", ["Production stays where it was.", *refusals]
    if gate and settings.approval == "human":
        return "waiting", ["Every check of the gate holds; a person has to approve the candidate."]
    if pulled and not pulled["changed"]:
        return "unchanged", ["Data, base model and settings are those that production was trained with."]
    missing = next(step for step in STEPS if not steps.get(step) and step != "reject")
    return "incomplete", [f"The run has no result of the {missing} step; the steps before it are shown below."]


def costs(run: Run, steps: dict[str, dict[str, Any] | None]) -> dict[str, float]:
    """What each step cost, where the settings say what an hour costs."""
    prices = run.settings.costs
    cost = {}
    for step, result in steps.items():
        hour = None if not result else prices.gpu_hour if result.get("gpus") else prices.cpu_hour
        if result and hour is not None:
            cost[step] = result["seconds"] / 3600 * hour
    return cost


def lineage(run: Run, steps: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """What the candidate is made of and was judged by."""
    pulled, prepared, evaluated = (steps[name] or {} for name in ("pull", "preprocess", "evaluate"))
    settings = run.config["settings"]
    return {
        "dataset": pulled.get("dataset"),
        "dataset's source": with_revision(settings["data"]),
        "prepared data": prepared.get("prepared"),
        "base model": pulled.get("base_model"),
        "base model's source": with_revision(settings["base_model"]),
        "champion": evaluated.get("champion"),
        "candidate (SHA-256)": evaluated.get("candidate_fingerprint"),
        "version": (steps["promote"] or {}).get("version"),
        "test split (SHA-256)": evaluated.get("test_fingerprint"),
        "code": run.config["code_version"],
        "image": run.config.get("image"),
        **run.config["libraries"],
    }


def data_plots(run: Run, validated: dict[str, Any] | None) -> dict[str, Markup]:
    """What the training pairs are like, by caption; of validation that failed there is the shape alone."""
    plots_by_caption: dict[str, str] = {}
    try:
        shape = run.store.get_json(run.key("validation", "shape.json"))
    except MissingObjectError:
        return {}
    lengths = {side: shape[side] for side in ("source", "target")}
    plots_by_caption["Length of the usable training sentences"] = plots.histogram(
        shape["length_edges"], lengths, "characters"
    )
    plots_by_caption["How much longer or shorter the translations are"] = plots.histogram(
        shape["ratio_edges"], {"pairs": shape["ratios"]}, "target length / source length"
    )
    found = {name: count for name, count in (validated or {}).get("quarantined", {}).items() if count}
    if found:
        plots_by_caption["Pairs with a fault, by rule"] = plots.count_bars(found, "pairs")
    return {caption: Markup(svg) for caption, svg in plots_by_caption.items()}  # noqa: S704


def with_revision(source: dict[str, Any]) -> str:
    """Where something was pulled from, with its commit."""
    return f"{source['source']} at {source['revision']}" if source["revision"] else source["source"]


def duration(seconds: float) -> str:
    """A time that people can read."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def gains(metrics: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """What the plot shows: the BLEU gained, over everything and on each part and extra set, with its bounds."""
    extra = {f"extra: {name}": part["gain"]["bleu"] for name, part in metrics["extra"].items()}
    parts = {
        name: {**part, "observed": part["candidate"] - part["champion"]} for name, part in metrics["slices"].items()
    }
    found = {"all sentences": metrics["gain"]["bleu"], **parts, **extra}
    return {name: (gain["observed"], gain["low"], gain["high"]) for name, gain in found.items()}


def compared(run: Run) -> dict[str, Any]:
    """On how many test sentences the candidate does better and worse, and those on which the two differ most."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "translations.parquet"
        run.store.download(run.key("evaluation", "translations.parquet"), path)
        table = pd.read_parquet(path, columns=["set", "source", "reference", *SYSTEMS])
    table = table[table["set"] == TEST]
    scores = {
        system: np.array([chrf_of_total(row) for row in chrf_statistics(table[system], table["reference"])])
        for system in SYSTEMS
    }
    gained = scores["candidate"] - scores["champion"]
    most = table.assign(
        champion_score=scores["champion"],
        candidate_score=scores["candidate"],
        distance=np.abs(gained) + (table["champion"] != table["candidate"]),  # what differs comes before what does not
    )
    return {
        "better": int((gained > 0).sum()),
        "worse": int((gained < 0).sum()),
        "alike": int((gained == 0).sum()),
        "most": [
            {
                **row,
                "champion": mark_words(row["champion"], row["candidate"]),
                "candidate": mark_words(row["candidate"], row["champion"]),
            }
            for row in most.query("distance > 0").nlargest(SHOWN, "distance").to_dict("records")
        ],
    }


def render_trend(store: Store, model: str) -> str | None:
    """The page of every version, or None where there is none."""
    rows = []
    for version in registry.versions(store, model):
        manifest = registry.manifest(store, model, version)
        about = manifest.metadata
        bleu = about["metrics"]
        rows.append(
            {
                "version": version,
                "run": about["run"],
                "bleu": bleu["candidate"],
                "gain": bleu["candidate"] - bleu["champion"],
                "loss": about.get("validation_loss"),
                "size": manifest.size,
                "seconds": about.get("seconds", {}).get("train"),
            }
        )
    if not rows:
        return None
    pointer = registry.read_pointer(store, model)
    shown = {
        "BLEU on the test split": [row["bleu"] for row in rows],
        "Validation loss per target token": [row["loss"] for row in rows],
        "Size in MB": [row["size"] / 1e6 for row in rows],
        "Training time in minutes": [None if row["seconds"] is None else row["seconds"] / 60 for row in rows],
    }
    return TEMPLATES.get_template("trend.html.j2").render(
        model=model,
        rows=rows,
        production=pointer.version if pointer else None,
        plots={caption: Markup(plots.trend(values)) for caption, values in shown.items()},  # noqa: S704
        duration=duration,
    )


def mark_words(text: str, other: str) -> Markup:
    """The text with the words that the other lacks in `<mark>`."""
    words, theirs = text.split(), other.split()
    parts = []
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, words, theirs, autojunk=False).get_opcodes():
        part = escape(" ".join(words[start:end]))
        if part:
            parts.append(part if kind == "equal" else Markup("<mark>{}</mark>").format(part))
    return Markup(" ").join(parts)
