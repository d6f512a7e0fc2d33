"""The training loop: it learns, repeats itself, leaves its best, stops when it should, on one device and on several."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import DataError
from tasks.model import load_model
from tasks.settings import Training, load
from tasks.train import transfer_distance
from tasks.training.devices import Devices, resolve_precision
from tasks.training.fit import Trainer, ahead, best_epoch, set_dropout
from tasks.training.freezing import freeze
from tasks.training.loss import loss_meter
from tasks.training.pairs import Pairs, Ragged

ROOT = Path(__file__).resolve().parents[2]


def trainer(model: Any, rows: Dataset, devices: Devices | None = None, **settings: Any) -> Trainer:
    training = Training(**{"epochs": 2, "batch_size": 2, "learning_rate": 0.01, "precision": "float32", **settings})
    pairs = Pairs.of(rows)
    learning = freeze(model, training)
    return Trainer(model, learning, train=pairs, validation=pairs, settings=training, devices=devices or Devices())


def test_training_lowers_the_loss_epoch_by_epoch(model: Any, rows: Dataset) -> None:
    table = trainer(model, rows).fit()
    assert [row["epoch"] for row in table] == [0, 1, 2]
    assert table[0]["training_loss"] is None
    assert table[2]["validation_loss"] < table[1]["validation_loss"] < table[0]["validation_loss"]
    assert loss_meter(model)(rows, 64) == pytest.approx(table[2]["validation_loss"], rel=1e-5)


def test_one_step_is_adam_on_the_mean_loss(model: Any, rows: Dataset) -> None:
    """Adam's first step is the learning rate times the gradient's sign: the gradient is that of independent code."""
    kernel = model.lm_head.kernel.numpy()
    trained = trainer(model, rows, epochs=1, batch_size=64)
    trained.fit()
    moved = model.lm_head.kernel.numpy() - kernel
    inputs, labels = rows["input_ids"][:], rows["labels"][:]
    scores, wanted = [], []
    for source, target in zip(inputs, labels, strict=True):  # one pair at a time, through the model's own head
        scores.append(model(input_ids=tf.constant([source]), decoder_input_ids=tf.constant([[0, *target[:-1]]]))[0][0])
        wanted += target
    # d_model ** -0.5 times the states is what a tied head would have; this model's has weights of its own.
    states = np.concatenate(
        [
            model.decoder(
                input_ids=tf.constant([[0, *target[:-1]]]),
                encoder_hidden_states=model.encoder(input_ids=tf.constant([source]))[0],
            )[0][0]
            for source, target in zip(inputs, labels, strict=True)
        ]
    ).astype(np.float64)
    logits = states @ kernel
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(wanted)), wanted] -= 1
    gradient = states.T @ error / len(wanted)
    clear = np.abs(gradient) > 1e-3  # far above Adam's epsilon
    assert clear.sum() > 100
    np.testing.assert_allclose(moved[clear], -0.01 * np.sign(gradient[clear]), rtol=1e-2)


@pytest.mark.parametrize("strategy", ["trunk", "none"])
def test_training_twice_gives_the_same_model(strategy: str, base: Path, rows: Dataset) -> None:
    """To the last bit; with dropout, too."""
    ends = []
    for _ in range(2):
        model = load_model(base)
        table = trainer(model, rows, freeze=strategy, seed=3).fit()
        ends.append((table, [weights.numpy() for weights in model.weights]))
    assert ends[0][0] == ends[1][0]
    for first, second in zip(ends[0][1], ends[1][1], strict=True):
        np.testing.assert_array_equal(first, second)


def test_another_seed_gives_other_dropout_and_another_order(base: Path, rows: Dataset) -> None:
    tables = [trainer(load_model(base), rows, freeze="none", epochs=1, seed=seed).fit() for seed in (1, 2)]
    assert tables[0][1] != tables[1][1]


def test_dropout_depends_on_the_step_and_on_the_place(model: Any) -> None:
    step = tf.Variable(0, dtype=tf.int64)
    set_dropout(model, 5, step)
    first, second = [part for part in model.submodules if isinstance(part, tf.keras.layers.Dropout)][:2]
    ones = tf.ones([50, 50])
    masks = [
        first(ones, training=True).numpy(),
        second(ones, training=True).numpy(),
        first(ones, training=True).numpy(),
    ]
    step.assign_add(1)
    masks.append(first(ones, training=True).numpy())
    np.testing.assert_array_equal(masks[0], masks[2])
    assert not np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[3])
    assert masks[0].mean() == pytest.approx(1, abs=0.05)


def test_the_best_epoch_is_left_in_the_model(model: Any, rows: Dataset) -> None:
    """Steps that are far too long make the loss go up and down."""
    table = trainer(model, rows, epochs=3, learning_rate=5).fit()
    best = best_epoch(table)
    assert best["validation_loss"] == min(row["validation_loss"] for row in table[1:])
    assert loss_meter(model)(rows, 64) == pytest.approx(best["validation_loss"], rel=1e-5)


def test_training_ends_when_nothing_gets_better(model: Any, rows: Dataset) -> None:
    table = trainer(model, rows, epochs=9, learning_rate=5, patience=2).fit()
    best = best_epoch(table)
    assert len(table) < 10
    assert table[-1]["epoch"] == best["epoch"] + 2
    assert loss_meter(model)(rows, 64) == pytest.approx(best["validation_loss"], rel=1e-5)


def test_the_learning_rate_rises_over_the_warm_up(model: Any, rows: Dataset) -> None:
    kernel = model.lm_head.kernel.numpy()
    trainer(model, rows, epochs=1, batch_size=64, warmup_steps=10).fit()  # one step, of 10 to warm up in
    assert np.abs(model.lm_head.kernel.numpy() - kernel).max() == pytest.approx(0.01 / 10, rel=1e-2)


def test_gradients_are_clipped_together(base: Path, rows: Dataset) -> None:
    """Adam's first moment after one step is a tenth of the gradient that it was given."""
    norms = []
    for clip_norm in (None, 0.001):
        trained = trainer(load_model(base), rows, epochs=1, batch_size=64, freeze="none", clip_norm=clip_norm)
        trained.fit()
        moments = trained.optimizer.variables()[1 : 1 + len(trained.learning.variables)]
        norms.append(10 * math.sqrt(sum(float(np.square(moment.numpy()).sum()) for moment in moments)))
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize(("fault", "reason"), [(np.nan, "the loss became nan in epoch 0"), (1e4, "the loss became")])
def test_a_loss_that_says_nothing_stops_the_training(fault: float, reason: str, model: Any, rows: Dataset) -> None:
    model.lm_head.kernel.assign(model.lm_head.kernel * fault)
    with pytest.raises(DataError, match=reason):
        trainer(model, rows).fit()


def test_a_loss_that_becomes_no_number_stops_the_training(model: Any, rows: Dataset) -> None:
    trained = trainer(model, rows, freeze="none", learning_rate=10, epochs=50, batch_size=1)
    kernel = model.lm_head.kernel
    trained.validation_loss = lambda: kernel.assign(kernel * np.inf) is None or 1.0  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"epoch 1, step 0: lower training\.learning_rate"):
        trained.fit()


def test_bfloat16_learns_as_float32_does(base: Path, rows: Dataset) -> None:
    tables = [trainer(load_model(base, precision), rows).fit() for precision in ("float32", "bfloat16")]
    for exact, rounded in zip(*tables, strict=True):
        assert rounded["validation_loss"] == pytest.approx(exact["validation_loss"], abs=0.05)


def test_float16_is_refused_with_the_reason() -> None:
    with pytest.raises(Exception, match="T5 overflows in float16 and gives NaN: use bfloat16 or float32"):
        load(ROOT / "config" / "demo.yaml", {"training.precision": "float16"})


def test_precision_is_what_was_asked_for_or_what_the_hardware_has() -> None:
    assert resolve_precision("float32") == "float32"
    assert resolve_precision("bfloat16") == "bfloat16"
    assert resolve_precision("auto") in {"float32", "bfloat16"}


def test_xla_computes_the_same(base: Path, rows: Dataset) -> None:
    """As on a GPU: compiled, with fixed shapes."""
    settings = {"freeze": "all_but_last_n", "last_blocks": 1, "epochs": 1, "batch_size": 4}
    tables = []
    for xla in (False, True):
        model = load_model(base)
        model.config.dropout_rate = 0
        for part in model.submodules:
            if isinstance(part, tf.keras.layers.Dropout):
                part.rate = 0  # its masks depend on the shape
        tables.append(trainer(model, rows, Devices(xla=xla), **settings).fit())
    for plain, compiled in zip(*tables, strict=True):
        assert compiled["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-4)


def test_two_devices_learn_as_one_does() -> None:
    """In a process of its own: how many devices there are has to be said before TensorFlow looks."""
    script = ROOT / "tests" / "unit" / "two_devices.py"
    ended = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    one, two = (eval(line) for line in ended.stdout.splitlines()[-2:])  # noqa: S307 - two lists of numbers
    assert len(one) == len(two) == 3
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_distance_is_relative_to_the_new_weights() -> None:
    assert transfer_distance([np.array([3.0, 0.0])], [np.array([3.0, 4.0])]) == pytest.approx(4 / 5)


def pairs_of(lengths: list[int]) -> Pairs:
    values = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    ones = np.ones(len(lengths), int)
    return Pairs(Ragged(values, np.array(lengths)), Ragged(np.arange(len(lengths), dtype=np.int32), ones))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3))
def test_every_row_is_seen_once_an_epoch(lengths: list[int], batch_size: int, seed: int) -> None:
    pairs = pairs_of(lengths)
    seen = [int(row) for batch in pairs.shuffled(batch_size, seed) for row in batch]
    assert sorted(seen) == list(range(len(lengths)))
    assert seen == [int(row) for batch in pairs.shuffled(batch_size, seed) for row in batch]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=9))
def test_flat_arrays_hold_what_the_lists_held(lists: list[list[int]]) -> None:
    rows = Dataset.from_dict({"ids": [[0], *lists]}).select(range(1, len(lists) + 1))
    column = Ragged.column(rows, "ids")
    assert [column[row].tolist() for row in range(len(column))] == lists


def test_what_fails_ahead_fails_here() -> None:
    def items() -> Any:
        yield from (1, 2)
        raise OSError("no more")

    seen = []
    with pytest.raises(OSError, match="no more"):
        seen.extend(item for item in ahead(items()))
    assert list(ahead(iter([1, 2, 3]))) == [1, 2, 3]
