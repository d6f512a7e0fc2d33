"""train: fine-tune the base model.

    python -m tasks train --run s3://retrain/runs/RUN_ID

Reads    prepared/FINGERPRINT/, base-models/NAME/FINGERPRINT/
Writes   runs/RUN_ID/candidate/   a from_pretrained directory that PyTorch and TensorFlow load, training.json (loss per
                                  epoch, parameters), loss.svg; manifest.json last
Result   the loss per epoch, the best one, and how far the weights moved

Loss is cross-entropy per target token; padding is not counted. The candidate is the best epoch, not the last.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from datasets import Dataset

from tasks import artifacts, plots
from tasks.errors import DataError
from tasks.model import (
    decoder_states,
    freeze_trunk,
    length_batches,
    load_model,
    loss_meter,
    make_batch,
    parameter_table,
    save_model,
    token_losses,
)
from tasks.prepared import fetch_prepared
from tasks.progress import Progress
from tasks.run import Run
from tasks.settings import Training
from tasks.storage import to_json
from tasks.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

CANDIDATE = "candidate"


def run(run: Run) -> dict[str, Any]:
    """Train the run's candidate. Raises `DataError` when the loss is no longer a number."""
    settings = run.settings.training
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data = fetch_prepared(run, scratch).splits
        artifacts.fetch(run.store, run.result("pull")["base_model"], scratch / "base")
        model, tokenizer = load_model(scratch / "base"), load_tokenizer(scratch / "base")
        freeze_trunk(model)
        table = parameter_table(model)
        log_parameters(table)
        before = [variable.numpy() for variable in model.trainable_variables]
        epochs = fit(model, data["train"], data["validation"], settings)
        best = best_epoch(epochs)
        moved = transfer_distance(before, [variable.numpy() for variable in model.trainable_variables])
        candidate = scratch / CANDIDATE
        save_model(model, tokenizer, candidate)
        summary = {"epochs": epochs, "best_epoch": best["epoch"], "parameters": table, "weight_change": moved}
        (candidate / "training.json").write_bytes(to_json(summary))
        (candidate / "loss.svg").write_text(plots.loss_curve(epochs), encoding="utf-8")
        artifacts.publish(run.store, run.key(CANDIDATE), candidate, {"run": run.id})
    return {
        "summary": f"validation loss {epochs[0]['validation_loss']:.4f} -> {best['validation_loss']:.4f} "
        f"(epoch {best['epoch']} of {settings.epochs})",
        "candidate": run.key(CANDIDATE),
        "validation_loss": best["validation_loss"],
        **summary,
    }


def fit(model: Any, train: Dataset, validation: Dataset, settings: Training) -> list[dict[str, Any]]:
    """Train the model's trainable variables and leave it at its best epoch.

    Returns a row an epoch, epoch 0 being the untrained model: `epoch`, `training_loss` (None for epoch 0),
    `validation_loss`, both per target token. Frozen layers run without dropout.
    """
    tf.keras.utils.set_random_seed(settings.seed)
    optimizer = tf.keras.optimizers.Adam(settings.learning_rate)
    variables = model.trainable_variables
    measure = loss_meter(model)

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)] * 3)
    def train_step(input_ids: tf.Tensor, attention_mask: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            states = decoder_states(model, input_ids, attention_mask, labels, training=False)
            losses = token_losses(model, states, labels)
            loss = tf.reduce_mean(losses)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return tf.reduce_sum(losses), tf.size(losses)

    def row(epoch: int, training_loss: float | None, started: float) -> dict[str, Any]:
        validation_loss = measure(validation, settings.batch_size)
        if not math.isfinite(validation_loss):
            raise DataError(f"the loss became {validation_loss} in epoch {epoch}: lower training.learning_rate")
        seconds = round(time.monotonic() - started, 1)
        shown = "   -  " if training_loss is None else f"{training_loss:.4f}"
        log.info("epoch %s: training loss %s, validation loss %.4f, %.1f s", epoch, shown, validation_loss, seconds)
        # No times here: the same training must give the same files, and so the same version.
        return {"epoch": epoch, "training_loss": training_loss, "validation_loss": validation_loss}

    rows = [row(0, None, time.monotonic())]
    for epoch in range(1, settings.epochs + 1):
        started = time.monotonic()
        total, count = 0.0, 0
        with Progress(f"epoch {epoch}/{settings.epochs}", total=train.num_rows, unit="pairs") as progress:
            for inputs, labels in shuffled_batches(train, settings.batch_size, seed=settings.seed + epoch):
                batch_sum, batch_count = train_step(*make_batch(model, inputs, labels))
                total += float(batch_sum)
                count += int(batch_count)
                progress.advance(len(inputs), loss=total / count)
        rows.append(row(epoch, total / count, started))
        if best_epoch(rows) is rows[-1]:
            best = [variable.numpy() for variable in variables]
    for variable, value in zip(variables, best, strict=True):
        variable.assign(value)
    return rows


def best_epoch(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The trained epoch with the lowest validation loss. Epoch 0 is the base model, which is not a candidate."""
    return min(epochs[1:], key=lambda epoch: epoch["validation_loss"])


def shuffled_batches(rows: Dataset, batch_size: int, seed: int) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Every row once, in batches of similar length whose order, and whose members among equals, the seed decides."""
    random = np.random.default_rng(seed)
    inputs, labels = rows["input_ids"][:], rows["labels"][:]
    order = random.permutation(len(inputs))
    batches = length_batches([len(inputs[i]) + len(labels[i]) for i in order], batch_size)
    for batch in random.permutation(len(batches)):
        chosen = order[batches[batch]]
        yield [inputs[i] for i in chosen], [labels[i] for i in chosen]


def transfer_distance(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    """How far training moved what it trained: ||new - old|| / ||new||, over all trained weights together."""
    change = math.sqrt(sum(float(np.square(a - b).sum()) for a, b in zip(after, before, strict=True)))
    return change / math.sqrt(sum(float(np.square(a).sum()) for a in after))


def log_parameters(table: list[dict[str, Any]]) -> None:
    """Show what is frozen and what learns, layer by layer."""
    log.info("%-12s %14s %14s %14s", "layer", "parameters", "frozen", "trainable")
    total = {
        "layer": "total",
        "parameters": sum(row["parameters"] for row in table),
        "trainable": sum(row["trainable"] for row in table),
    }
    for row in [*table, total]:
        frozen = row["parameters"] - row["trainable"]
        log.info("%-12s %14s %14s %14s", row["layer"], f"{row['parameters']:,}", f"{frozen:,}", f"{row['trainable']:,}")
