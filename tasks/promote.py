"""promote: publish the candidate as a version, and point production at it.

    python -m tasks promote --run s3://retrain/runs/RUN_ID

Reads    runs/RUN_ID/gate.json, candidate/; for the int8 copy also evaluation/translations.parquet
Writes   models/NAME/files/SHA256                    what no earlier version has
         models/NAME/versions/VERSION/manifest.json  with metrics and lineage
         models/NAME/history/NUMBER.json             the event
         models/NAME/production.json                 the pointer, moved only if it is where evaluate found it
Result   the version

A version is named by the run's date and the candidate's content, so promoting the same run again is the same version.

Where `promotion.int8_margin` is set, a copy of the candidate in int8, for CTranslate2, translates the test split on the
CPU. If it loses no more BLEU than the margin it is part of the version, in `ctranslate2/`; otherwise the version is
published without it. The manifest has the copy's BLEU either way.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from tasks import artifacts, registry
from tasks.errors import DataError
from tasks.registry import ProductionMovedError
from tasks.run import Run

TIMED = ("pull", "validate", "preprocess", "train", "evaluate", "gate")


def run(run: Run) -> dict[str, Any]:
    """Publish the candidate. Raises `DataError` when the gate did not let it through or production has moved."""
    gate = run.result("gate")
    if gate["decision"] != "promote":
        raise DataError(f"the gate of {run.uri} decided {gate['decision']!r}: nothing to promote")
    if run.settings.approval == "human" and not (run.find_result("approval") or {}).get("approved"):
        raise DataError(f"{run.settings.name} is promoted only with a person's approval, and {run.uri} has none")
    name = run.settings.name
    with tempfile.TemporaryDirectory() as scratch:
        candidate = Path(scratch) / "candidate"
        fingerprint = artifacts.fetch(run.store, run.result("train")["candidate"], candidate).fingerprint
        if fingerprint != gate["candidate_fingerprint"]:
            raise DataError(f"the candidate of {run.uri} is not the one that the gate let through: evaluate it first")
        version = f"{run.config['created'][:10]}-{fingerprint[:10]}"
        refuse_to_undo_a_rollback(run, version)
        if version not in registry.versions(run.store, name):  # else an earlier try was cut off after its manifest
            about = {"version": version, **describe(run), **add_int8(run, candidate, Path(scratch) / "int8")}
            registry.publish(run.store, name, version, candidate, about)
    event = registry.move(
        run.store,
        name,
        version,
        expected=gate["champion_version"],
        who=run.id,
        why=gate["summary"],
        gate={check["name"]: check["observed"] for check in gate["checks"]},
    )
    before = f"instead of {event.before}" if event.before else "as its first version"
    manifest = registry.manifest(run.store, name, version)
    summary = f"{name} {version} is in production {before}"
    if int8 := manifest.metadata.get("int8"):
        summary += f", {'with' if int8['published'] else 'without'} its int8 copy, of BLEU {int8['bleu']:.2f}"
    return {"summary": summary, "version": version, "event": event.number, "bytes": manifest.size}


def add_int8(run: Run, candidate: Path, scratch: Path) -> dict[str, Any]:
    """Put an int8 copy that is wanted and good enough into the candidate's directory; what the manifest says of it."""
    margin = run.settings.promotion.int8_margin
    if margin is None:
        return {}
    bleu = importlib.import_module("tasks.judging.int8").make(run, candidate, scratch)  # which imports TensorFlow
    fits = run.result("evaluate")["bleu"]["candidate"] - bleu <= margin
    if fits:
        scratch.rename(candidate / registry.CTRANSLATE2)
    return {"int8": {"bleu": bleu, "margin": margin, "published": fits}}


def refuse_to_undo_a_rollback(run: Run, version: str) -> None:
    """Raise `ProductionMovedError` when this run has promoted this version before, and production has left it since."""
    pointer = registry.read_pointer(run.store, run.settings.name)
    if pointer is None or pointer.version == version:
        return
    for event in registry.history(run.store, run.settings.name):
        if (event.who, event.version) == (run.id, version) and event.number <= pointer.event:
            raise ProductionMovedError(
                f"{run.id} promoted {version} at {event.time}, and production has moved to {pointer.version} since: "
                f"to bring it back, use `python -m tasks models rollback`"
            )


def describe(run: Run) -> dict[str, Any]:
    """What a version's manifest says besides its files: where it comes from and how it was judged."""
    pulled, evaluated = run.result("pull"), run.result("evaluate")
    return {
        "model": run.settings.name,
        "run": run.id,
        "metrics": {system: evaluated["bleu"][system] for system in ("candidate", "champion")},
        "validation_loss": evaluated["validation_loss"]["candidate"],
        "seconds": {step: result["seconds"] for step in TIMED if (result := run.find_result(step))},
        "lineage": {
            "inputs": pulled["inputs"],
            "dataset": pulled["dataset"],
            "base_model": pulled["base_model"],
            "champion": evaluated["champion"],
            "code_version": run.config["code_version"],
            "image": run.config.get("image"),
            "settings": run.config["settings"],
        },
    }
