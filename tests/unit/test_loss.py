"""Cross-entropy and its gradients, held against an independent computation in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.model import NO_TARGET, label_states, make_batch
from tasks.training import loss
from tasks.training.loss import cross_entropy, cross_entropy_value, loss_meter

WIDTH, VOCABULARY = 5, 11


def by_hand(states: np.ndarray, targets: np.ndarray, kernel: np.ndarray, smoothing: float = 0.0) -> float:
    """The sum over real targets of -sum(wanted * log softmax(states @ kernel)), in float64."""
    total = 0.0
    for state, target in zip(states.astype(np.float64), targets, strict=True):
        if target == NO_TARGET:
            continue
        scores = state @ kernel.astype(np.float64)
        log_probabilities = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        wanted = np.full(kernel.shape[1], smoothing / kernel.shape[1])
        wanted[target] += 1 - smoothing
        total -= float(wanted @ log_probabilities)
    return total


def example(positions: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    targets = random.integers(-1, VOCABULARY, positions).astype(np.int32)  # -1 is NO_TARGET
    states, kernel = random.normal(size=(positions, WIDTH)), random.normal(size=(WIDTH, VOCABULARY))
    return states.astype(np.float32), targets, kernel.astype(np.float32)


@pytest.fixture(params=["shapes known", "shapes unknown"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loss and its gradients as a graph: as XLA has it, with known shapes, and as a CPU has it."""
    monkeypatch.setattr(loss, "CHUNK", 3)

    def compute(states: Any, targets: Any, kernel: Any, smoothing: float) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch([states, kernel])
            total = cross_entropy(states, targets, kernel, smoothing=smoothing)
        return total, tape.gradient(total, [states, kernel])

    return compute, request.param == "shapes known"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("positions", [1, 3, 7])
def test_loss_and_gradients_are_those_of_the_definition(compiled: Any, positions: int, smoothing: float) -> None:
    """Gradients against central differences of the definition, at every place, in one chunk and in several."""
    compute, known = compiled
    states, targets, kernel = example(positions, seed=positions)
    signature = [tf.TensorSpec([None, WIDTH]), tf.TensorSpec([None], tf.int32), tf.TensorSpec([WIDTH, VOCABULARY])]
    graph = tf.function(
        lambda *arrays: compute(*arrays, smoothing), jit_compile=known, input_signature=None if known else signature
    )
    total, gradients = graph(tf.constant(states), tf.constant(targets), tf.constant(kernel))
    assert float(total) == pytest.approx(by_hand(states, targets, kernel, smoothing), rel=1e-5, abs=1e-6)
    for array, gradient in zip((states, kernel), gradients, strict=True):
        for place in np.ndindex(array.shape):
            ends = []
            for step in (1e-3, -1e-3):
                moved = {id(a): a.astype(np.float64) for a in (states, kernel)}
                moved[id(array)][place] += step
                ends.append(by_hand(moved[id(states)], targets, moved[id(kernel)], smoothing))
            assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3, abs=1e-4)


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_measuring_is_the_loss_without_smoothing(positions: int, seed: int) -> None:
    states, targets, kernel = example(positions, seed)
    assert float(cross_entropy_value(tf.constant(states), targets, kernel)) == pytest.approx(
        by_hand(states, targets, kernel), rel=1e-4, abs=1e-5
    )


def test_certain_and_hopeless_predictions_have_a_finite_loss() -> None:
    states = tf.constant([[300.0], [300.0]])
    kernel = tf.constant([[1.0, -1.0]])
    assert float(cross_entropy(states, tf.constant([0, 1]), kernel)) == pytest.approx(600, rel=1e-6)


def test_loss_is_per_target_token_without_padding(model: Any, rows: Dataset) -> None:
    batch = make_batch(model, rows["input_ids"][:], rows["labels"][:])
    states = label_states(model, batch, training=False).numpy()
    wanted = np.array([token for row in rows["labels"][:] for token in row])
    expected = by_hand(states, wanted, model.lm_head.kernel.numpy()) / len(wanted)
    assert loss_meter(model)(rows, 64) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_loss_does_not_depend_on_batches_or_padding(batch_size: int, model: Any, rows: Dataset) -> None:
    measure = loss_meter(model)
    assert measure(rows, batch_size) == pytest.approx(measure(rows, 64), rel=1e-5)
    backwards = rows.select(range(len(rows) - 1, -1, -1))
    assert measure(backwards, batch_size) == pytest.approx(measure(rows, batch_size), rel=1e-5)
