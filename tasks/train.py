"""train: fine-tune the base model.

    python -m tasks train --run s3://retrain/runs/RUN_ID

Reads    prepared/FINGERPRINT/, base-models/NAME/FINGERPRINT/; decoder-states/..., what earlier runs have computed
Writes   runs/RUN_ID/candidate/     a from_pretrained directory that PyTorch and TensorFlow load; README.md, the model
                                    card; training.json (loss per epoch, parameters); loss.svg; manifest.json last
         runs/RUN_ID/checkpoints/   see `tasks.training.checkpoints`
         runs/RUN_ID/tensorboard/   event files
         decoder-states/...         see `tasks.training.decoder_states`
Result   the loss per epoch, the best one, and how far the weights moved

Loss is cross-entropy per target token; padding is not counted. The candidate is the best epoch, not the last. Killed
at any moment and run again, the step goes on from its last checkpoint and ends with the same candidate; SIGTERM makes
it write one and end with exit code 75.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from safetensors import SafetensorError

from tasks import artifacts
from tasks.data.prepared import Prepared, fetch_prepared
from tasks.data.tokenizer import load_tokenizer
from tasks.errors import RetryableError, SettingsError
from tasks.model import extend_vocabulary, load_model, save_model
from tasks.pages import plots
from tasks.pull import DATASET_MANIFEST
from tasks.run import Run
from tasks.storage import to_json
from tasks.training.checkpoints import Checkpoints
from tasks.training.decoder_states import Keep, with_states
from tasks.training.devices import Devices, resolve_precision
from tasks.training.events import Events
from tasks.training.fit import Trainer, best_epoch
from tasks.training.freezing import freeze, log_parameters, parameter_table
from tasks.training.loss import loss_meter
from tasks.training.model_card import model_card
from tasks.training.pairs import Pairs
from tasks.training.stopping import Stopping

log = logging.getLogger(__name__)

CANDIDATE = "candidate"
FORMAT = 2  # raised when this code makes something else of the same input: no older checkpoint is gone on from


def run(run: Run) -> dict[str, Any]:
    """Train the run's candidate.

    Raises `DataError` when the loss is no number any more, `StoppedError` on SIGTERM, `SettingsError` when memory does
    not suffice, `RetryableError` when the disk does not.
    """
    settings = run.settings.training
    pulled = run.result("pull")
    precision = resolve_precision(settings.precision)
    with Stopping() as stopping, resources(), tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        prepared = fetch_prepared(run, scratch)
        base = artifacts.fetch(run.store, pulled["base_model"], scratch / "base").metadata
        devices = Devices()
        with devices.strategy.scope():
            model = load_model(scratch / "base", precision)
            extend_vocabulary(model, prepared.extension)
            learning = freeze(model, settings, [entry["id"] for entry in prepared.extension])
        table = parameter_table(model, learning)
        log_parameters(table)
        log.info("precision %s, %s device(s)%s", precision, devices.count, ", compiled by XLA" if devices.xla else "")
        before = [variable.numpy() for variable in learning.changed]
        trainer = Trainer(
            model,
            learning,
            **splits(run, model, prepared, scratch, devices=devices, precision=precision),
            settings=settings,
            devices=devices,
        )
        epochs = trainer.fit(
            Checkpoints(run.store, run.key("checkpoints"), identity(run, precision), settings.checkpoint_minutes),
            stopping,
            Events(scratch / "tensorboard", run.store, run.key("tensorboard")),
        )
        learning.merge()
        moved = transfer_distance(before, [variable.numpy() for variable in learning.changed])
        candidate = scratch / CANDIDATE
        save_model(model, load_tokenizer(prepared.tokenizer), candidate, learning.changed)
        best = best_epoch(epochs)
        loss = best["validation_loss"]
        if precision != "float32":  # as others will measure it
            loss = loss_meter(load_model(candidate))(prepared.splits["validation"], settings.batch_size)
        summary = {
            "epochs": epochs,
            "best_epoch": best["epoch"],
            "validation_loss": loss,
            "parameters": table,
            "weight_change": moved,
            "precision": precision,
        }
        data = artifacts.read_manifest(run.store, pulled["dataset"], manifest_name=DATASET_MANIFEST).metadata
        rows = {split: prepared.splits[split].num_rows for split in data["rows"]}
        aside = sum(data["rows"].values()) - sum(rows.values())
        card = model_card(run.settings, base, {**data, "rows": rows}, aside, summary)
        (candidate / "README.md").write_text(card, encoding="utf-8")
        (candidate / "training.json").write_bytes(to_json(summary))
        (candidate / "loss.svg").write_text(plots.loss_curve(epochs), encoding="utf-8")
        artifacts.publish(run.store, run.key(CANDIDATE), candidate, {"run": run.id})
    return {
        "summary": f"validation loss {epochs[0]['validation_loss']:.4f} -> {loss:.4f} "
        f"(epoch {best['epoch']} of {settings.epochs})",
        "candidate": run.key(CANDIDATE),
        **summary,
    }


def splits(
    run: Run, model: Any, prepared: Prepared, scratch: Path, *, devices: Devices, precision: str
) -> dict[str, Pairs]:
    """What is trained on and what measures it, with the decoder's states where those are computed once."""
    settings = run.settings.training
    pairs = {split: Pairs.of(prepared.splits[split]) for split in ("train", "validation")}
    if settings.freeze != "trunk" or settings.decoder_states == "off":
        return pairs
    keep = Keep.of(run.store, run.result("pull")["base_model"], precision)
    return dict(
        with_states(
            model,
            pairs,
            scratch / "states",
            devices,
            precision=precision,
            batch_size=settings.batch_size,
            like={entry["id"]: entry["like"] for entry in prepared.extension},
            keep=keep if settings.decoder_states == "store" else None,
        )
    )


def identity(run: Run, precision: str) -> str:
    """A hash of everything on which the training depends: a checkpoint of another is of no use."""
    inputs = {
        "format": FORMAT,
        "prepared": run.result("preprocess")["prepared"],
        "base_model": run.result("pull")["base_model"],
        "training": run.settings.training.decisive,
        "precision": precision,
    }
    return hashlib.sha256(to_json(inputs)).hexdigest()


def transfer_distance(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    """How far training moved what it trained: ||new - old|| / ||new||, over all trained weights together."""
    change = math.sqrt(sum(float(np.square(a - b).sum()) for a, b in zip(after, before, strict=True)))
    return change / math.sqrt(sum(float(np.square(a).sum()) for a in after))


@contextlib.contextmanager
def resources() -> Iterator[None]:
    """Say in a sentence what was too little: memory or disk."""
    try:
        yield
    except (MemoryError, tf.errors.ResourceExhaustedError) as error:
        raise SettingsError(
            "training needed more memory than there is: lower training.batch_size, or give the step more"
        ) from error
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) not in {errno.ENOSPC, errno.EDQUOT} and "No space left" not in str(error):
            raise
        raise RetryableError(
            f"the disk of {tempfile.gettempdir()} is full: give the step more disk ({error})"
        ) from error
