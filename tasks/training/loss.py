"""Cross-entropy per target token, without ever holding the logits of all positions.

Padding is counted nowhere: states and targets come as the flat list of the positions that have a target.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tasks.model import BATCH, NO_TARGET, Batch, label_states
from tasks.training.pairs import Pairs

CHUNK = 512  # positions whose logits exist at once: 66 MB for T5's vocabulary; more would be no faster


def cross_entropy(
    states: tf.Tensor, targets: tf.Tensor, kernel: tf.Tensor, *, smoothing: float = 0.0, states_learn: bool = True
) -> tf.Tensor:
    """The sum of the targets' cross-entropy, differentiable in `kernel` and, if they learn, in `states`.

    `states` (positions, d_model) decide in which precision products are computed; `targets` (positions,) are token ids
    or `NO_TARGET`; `kernel` (d_model, vocabulary) is the head's. With `smoothing` e, a target is 1 - e of itself and e
    spread over the vocabulary. Both gradients are computed along with the loss, so the logits are computed once.
    """

    @tf.custom_gradient
    def total(states: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[Any, Any]]]:
        loss, of_states, of_kernel = _loss_and_gradients(states, targets, kernel, smoothing, states_learn)

        def gradient(upstream: tf.Tensor) -> tuple[Any, Any]:
            scaled = tf.cast(upstream, states.dtype) * of_states if states_learn else None
            return scaled, upstream * of_kernel

        return loss, gradient

    return total(states, tf.convert_to_tensor(kernel))


def cross_entropy_value(states: tf.Tensor, targets: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The same sum without smoothing and without gradients: for measuring."""
    product = tf.cast(tf.convert_to_tensor(kernel), states.dtype)

    def work(start: tf.Tensor, end: tf.Tensor) -> tuple[tf.Tensor]:
        losses, _ = _chunk(states[start:end], targets[start:end], product, 0.0)
        return (tf.reduce_sum(losses),)

    return _over_chunks(states, work, lambda so_far, more: (so_far[0] + more[0],))[0]


def _loss_and_gradients(
    states: tf.Tensor, targets: tf.Tensor, kernel: tf.Tensor, smoothing: float, states_learn: bool
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The sum of the losses, and its gradients for states and kernel (float32)."""
    product = tf.cast(kernel, states.dtype)
    vocabulary = tf.cast(tf.shape(kernel)[1], tf.float32)

    def work(start: tf.Tensor, end: tf.Tensor) -> tuple[tf.Tensor, ...]:
        here, wanted = states[start:end], targets[start:end]
        losses, error = _chunk(here, wanted, product, smoothing)
        # The loss's gradient for the logits: what the model says, less what it should have said.
        if smoothing:
            error -= tf.cast(smoothing / vocabulary, error.dtype)
        count = tf.size(wanted)
        places = tf.stack([tf.range(count), tf.maximum(wanted, 0)], axis=1)
        error = tf.tensor_scatter_nd_sub(error, places, tf.fill([count], tf.cast(1 - smoothing, error.dtype)))
        real = tf.cast(wanted != NO_TARGET, error.dtype)[:, None]  # multiplied on the narrow side, where it is cheap
        of_kernel = tf.cast(tf.matmul(here * real, error, transpose_a=True), tf.float32)
        of_states = tf.matmul(error, product, transpose_b=True) * real if states_learn else here[:0]
        return tf.reduce_sum(losses), of_states, of_kernel

    def join(so_far: Any, more: Any) -> tuple[tf.Tensor, ...]:
        return so_far[0] + more[0], tf.concat([so_far[1], more[1]], axis=0), so_far[2] + more[2]

    return _over_chunks(states, work, join)


def _chunk(states: tf.Tensor, targets: tf.Tensor, kernel: tf.Tensor, smoothing: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Each position's loss (float32), and the probabilities that the model gives to every token there."""
    logits = tf.cast(tf.matmul(states, kernel), tf.float32)
    probabilities = tf.nn.softmax(logits)
    # log(sum(exp(logits))), from the largest logit and its probability: TensorFlow's own op takes several times longer.
    normaliser = tf.reduce_max(logits, axis=1) - tf.math.log(tf.reduce_max(probabilities, axis=1))
    losses = normaliser - tf.gather(logits, tf.maximum(targets, 0), batch_dims=1)
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (normaliser - tf.reduce_mean(logits, axis=1))
    return losses * tf.cast(targets != NO_TARGET, tf.float32), tf.cast(probabilities, states.dtype)


def _over_chunks(states: tf.Tensor, work: Callable[..., Any], join: Callable[..., Any]) -> Any:
    """Do `work(start, end)` for one chunk of positions after the other, and `join(so_far, more)` what comes of it."""
    if states.shape[0] is not None:  # as XLA needs it
        pieces = [work(at, min(at + CHUNK, states.shape[0])) for at in range(0, states.shape[0], CHUNK)]
        return functools.reduce(join, pieces) if pieces else work(0, 0)
    length = tf.shape(states)[0]
    first = work(tf.constant(0), tf.minimum(CHUNK, length))
    growing = [tf.TensorShape([None, *value.shape[1:]]) if value.shape.rank else value.shape for value in first]
    return tf.while_loop(
        lambda start, *so_far: start < length,
        lambda start, *so_far: (start + CHUNK, *join(so_far, work(start, tf.minimum(start + CHUNK, length)))),
        (tf.constant(CHUNK), *first),
        shape_invariants=(tf.TensorShape([]), *growing),
        parallel_iterations=1,  # or else the logits of two chunks could exist at once
    )[1:]


def loss_meter(model: Any) -> Callable[[Any, int], float]:
    """A function that measures a model's loss over tokenised rows, compiled once and used every epoch.

    It takes rows (`input_ids`, `labels`) and a batch size, and returns the cross-entropy per target token; padding is
    not counted, and dropout is off.
    """

    @tf.function(input_signature=[BATCH], autograph=False)
    def batch_loss(batch: Batch) -> tf.Tensor:
        states = label_states(model, batch, training=False)
        return cross_entropy_value(states, batch.targets, model.lm_head.kernel)

    def measure(rows: Any, batch_size: int) -> float:
        pairs = Pairs.of(rows)
        batches = (pairs.batch(model, chosen, None) for chosen in pairs.in_order(batch_size))
        return sum(float(batch_loss(batch)) for batch in batches) / int(pairs.labels.lengths.sum())

    return measure
