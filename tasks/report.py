"""report: write one HTML page that explains the run, and one that follows the model from version to version.

    python -m tasks report --run s3://retrain/runs/RUN_ID

Reads    runs/RUN_ID/config.json and whatever the run's steps have left so far; the versions' manifests
Writes   runs/RUN_ID/report.html     self-contained: no network, light and dark, for screen, phone and paper
         models/NAME/trend.html      the same for every version: BLEU, loss, size, training time
Result   where they are

They are written for every run, also for one that stopped or failed, and for what older code left: with what is known.
"""

from __future__ import annotations

import difflib
import logging
import tempfile
from collections.abc import Callable
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
from tasks.judging.metrics import SYSTEMS, TEST, difference
from tasks.judging.scoring import chrf_of_total, chrf_statistics
from tasks.pages import TOLERANT, plots
from tasks.run import Run
from tasks.storage import Store

log = logging.getLogger(__name__)

SHOWN = 20  # sentences on the page


def run(run: Run) -> dict[str, Any]:
    """Write both pages."""
    key = run.key("report.html")
    run.store.put(key, render(run).encode())
    model = run.config["settings"]["name"]
    trend_key = f"models/{model}/trend.html"
    if trend := render_trend(run.store, model):
        run.store.put(trend_key, trend.encode())
    return {"summary": f"s3://{run.store.bucket}/{key}", "report": key, "trend": trend_key if trend else None}


def render(run: Run) -> str:
    """The run's page. Everything that came from data or settings is escaped."""
    steps = {step: run.find_result(step) for step in STEPS if step != "report"}
    found = {step: run.find_failure(step) for step in steps if not steps[step]}
    failures = {step: failure for step, failure in found.items() if failure}
    metrics = evaluation(run) if steps["evaluate"] else None
    parts = parts_of(metrics) if metrics else {}
    gains = bounds(metrics, parts) if metrics else {}
    return TOLERANT.get_template("report.html.j2").render(
        run=run,
        config=run.config,
        settings=yaml.safe_dump(run.config["settings"], sort_keys=False, allow_unicode=True),
        steps=steps,
        failures=failures,
        seconds=sum(result.get("seconds", 0) for result in steps.values() if result),
        costs=costs(run, steps),
        outcome=outcome(steps, failures, run.config["settings"]),
        gate=steps["gate"],
        metrics=metrics,
        rules=RULES,
        data_plots=data_plots(run, steps["validate"]),
        loss_plot=drawn(plots.loss_curve, (steps["train"] or {}).get("epochs")),
        gain_plot=drawn(plots.gain_intervals, gains) if gains else None,
        parts=parts,
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
    steps: dict[str, dict[str, Any] | None], failures: dict[str, dict[str, Any]], settings: dict[str, Any]
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
    stays = "Production stays where it was."
    if steps["reject"]:  # perhaps by a person
        refusals, production = steps["reject"].get("reasons", refusals), steps["reject"].get("production")
        stays = f"Production stays at version {production}." if production else "Nothing is in production yet."
    if refusals:
        return "rejected", [stays, *refusals]
    if gate and settings.get("approval") == "human":
        return "waiting", ["Every check of the gate holds; a person has to approve the candidate."]
    if pulled and not pulled.get("changed", True):
        return "unchanged", ["Data, base model and settings are those that production was trained with."]
    missing = next(step for step in STEPS if not steps.get(step) and step != "reject")
    return "incomplete", [f"The run has no result of the {missing} step; the steps before it are shown below."]


def costs(run: Run, steps: dict[str, dict[str, Any] | None]) -> dict[str, float]:
    """What each step cost, where the settings say what an hour costs."""
    prices = run.config["settings"].get("costs", {})
    cost = {}
    for step, result in steps.items():
        hour = prices.get("gpu_hour" if result and result.get("gpus") else "cpu_hour")
        if result and "seconds" in result and hour is not None:
            cost[step] = result["seconds"] / 3600 * hour
    return cost


def lineage(run: Run, steps: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """What the candidate is made of and was judged by."""
    pulled, prepared, evaluated = (steps[name] or {} for name in ("pull", "preprocess", "evaluate"))
    settings, revisions = run.config["settings"], pulled.get("revisions", {})
    return {
        "dataset": pulled.get("dataset"),
        "dataset's source": with_revision(settings["data"], revisions.get("dataset")),
        "prepared data": prepared.get("prepared"),
        "base model": pulled.get("base_model"),
        "base model's source": with_revision(settings["base_model"], revisions.get("base_model")),
        "champion": evaluated.get("champion"),
        "candidate (SHA-256)": evaluated.get("candidate_fingerprint"),
        "version": (steps["promote"] or {}).get("version"),
        "test split (SHA-256)": evaluated.get("test_fingerprint"),
        "code": run.config.get("code_version"),
        "image": run.config.get("image"),
        **run.config.get("libraries", {}),
    }


def data_plots(run: Run, validated: dict[str, Any] | None) -> dict[str, Markup]:
    """What the training pairs are like, by caption; of validation that failed there is the shape alone."""
    try:
        shape = run.store.get_json(run.key("validation", "shape.json"))
    except StepError as error:
        log.warning("the report is without plots of the data: %s", error)
        return {}
    found = {name: count for name, count in (validated or {}).get("quarantined", {}).items() if count}
    lengths, ratios = (shape.get(edges) for edges in ("length_edges", "ratio_edges"))
    sides = {side: shape.get(side) for side in ("source", "target")}
    wanted = {
        "Length of the usable training sentences": drawn(plots.histogram, lengths, sides, "characters"),
        "How much longer or shorter the translations are": drawn(
            plots.histogram, ratios, {"pairs": shape.get("ratios")}, "target length / source length"
        ),
        "Pairs with a fault, by rule": drawn(plots.count_bars, found, "pairs") if found else None,
    }
    return {caption: plot for caption, plot in wanted.items() if plot}


def drawn(plot: Callable[..., str], *figures: Any) -> Markup | None:
    """A plot for the page; None where figures that it shows are missing."""
    try:
        return Markup(plot(*figures))  # noqa: S704
    except (KeyError, TypeError, ValueError) as error:
        plots.plt.close()  # what was begun
        log.warning("the report is without a plot (%s): %r", plot.__name__, error)
        return None


def with_revision(source: dict[str, Any], commit: str | None) -> str:
    """Where something was pulled from, with its commit; before it was pulled, the revision that is to be pulled."""
    revision = commit or source.get("revision")
    return f"{source['source']} at {revision}" if revision else source["source"]


def parts_of(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """BLEU of both systems and its change on each part of the test split, and on each extra test set."""
    parts = {
        name: {**part, "observed": difference(part.get("candidate"), part.get("champion"))}
        for name, part in metrics.get("slices", {}).items()
    }
    for name, extra in metrics.get("extra", {}).items():
        scores = {system: extra.get(system, {}).get("bleu", {}).get("score") for system in SYSTEMS}
        gain = extra.get("gain", {}).get("bleu", {})
        parts[f"of the extra set {name}"] = {"sentences": extra.get("sentences"), **scores, **gain}
    return parts


def bounds(metrics: dict[str, Any], parts: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """What the plot shows: the BLEU gained, over everything and on each part, with its bounds, where all are known."""
    gains = {"all sentences": metrics.get("gain", {}).get("bleu", {}), **parts}
    found = {name: tuple(gain.get(bound) for bound in ("observed", "low", "high")) for name, gain in gains.items()}
    return {name: gain for name, gain in found.items() if None not in gain}


def compared(run: Run) -> dict[str, Any] | None:
    """On how many test sentences the candidate does better and worse, and those on which the two differ most.

    None where the translations cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "translations.parquet"
        try:
            run.store.download(run.key("evaluation", "translations.parquet"), path)
            table = pd.read_parquet(path, columns=["set", "source", "reference", *SYSTEMS])
        except (StepError, ValueError, OSError) as error:
            log.warning("the report is without translations: %s", error)
            return None
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
    rows = [version_row(store, model, version) for version in registry.versions(store, model)]
    if not rows:
        return None
    pointer = registry.read_pointer(store, model)
    minutes = [None if row["seconds"] is None else row["seconds"] / 60 for row in rows]
    shown = {
        "BLEU on the test split": [row["bleu"] for row in rows],
        "Validation loss per target token": [row["loss"] for row in rows],
        "Size in MB": [row["megabytes"] for row in rows],
        "Training time in minutes": minutes,
    }
    return TOLERANT.get_template("trend.html.j2").render(
        model=model,
        rows=rows,
        production=pointer.version if pointer else None,
        plots={caption: drawn(plots.trend, values) for caption, values in shown.items()},
    )


def version_row(store: Store, model: str, version: str) -> dict[str, Any]:
    """What the page says of a version; None for what its manifest lacks."""
    manifest = registry.manifest(store, model, version)
    about, bleu = manifest.metadata, manifest.metadata.get("metrics", {})
    return {
        "version": version,
        "run": about.get("run"),
        "bleu": bleu.get("candidate"),
        "gain": difference(bleu.get("candidate"), bleu.get("champion")),
        "loss": about.get("validation_loss"),
        "megabytes": manifest.size / 1e6,
        "seconds": about.get("seconds", {}).get("train"),
    }


def mark_words(text: str, other: str) -> Markup:
    """The text with the words that the other lacks in `<mark>`."""
    words, theirs = text.split(), other.split()
    parts = []
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, words, theirs, autojunk=False).get_opcodes():
        part = escape(" ".join(words[start:end]))
        if part:
            parts.append(part if kind == "equal" else Markup("<mark>{}</mark>").format(part))
    return Markup(" ").join(parts)
