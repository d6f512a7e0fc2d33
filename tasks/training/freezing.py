"""What of a model learns and what stays as it is: the named strategies of `training.freeze`.

| strategy | stays | learns |
|---|---|---|
| trunk | embedding, encoder, decoder | head |
| encoder | embedding, encoder | decoder, head |
| all_but_last_n | embedding, encoder, all but the last n decoder blocks | those blocks, the decoder's last norm, head |
| none | nothing | everything |
| lora | everything | a low-rank change of each attention's query and value projection |

What stays gets no gradient and no dropout. The head's rows of characters that the tokenizer was extended by learn
whatever the strategy: nobody has trained them before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tasks.errors import DataError, SettingsError
from tasks.settings import Training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learning:
    """What the optimizer changes, and what of the model's own weights is different in the end."""

    variables: list[tf.Variable]
    changed: list[tf.Variable]  # with lora: the projections, into which `merge` works the changes
    head_rows: list[int] | None = None  # of the head only these tokens' weights learn; None: all that `variables` has
    merge: Callable[[], None] = lambda: None


class LowRank(tf.keras.layers.Layer):
    """A projection that stays, plus a product of two thin matrices that learns: x W + (alpha / rank) x A B.

    A is random and B zero, so that training starts from the model as it was (Hu et al. 2021, arXiv 2106.09685).
    """

    def __init__(self, projection: tf.keras.layers.Dense, rank: int, alpha: float, seed: int) -> None:
        super().__init__(dtype=projection.dtype_policy)
        self.projection = projection
        self.scale = alpha / rank
        width, height = projection.kernel.shape
        start = tf.keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed=seed)
        self.a = self.add_weight(name="a", shape=(width, rank), initializer=start)
        self.b = self.add_weight(name="b", shape=(rank, height), initializer="zeros")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Both together."""
        change = tf.matmul(tf.matmul(inputs, self.a), self.b)
        return self.projection(inputs) + tf.cast(self.scale, change.dtype) * change

    def merge(self) -> tf.keras.layers.Dense:
        """The projection, with the change worked into its weights."""
        change = self.scale * (self.a.numpy().astype(np.float64) @ self.b.numpy().astype(np.float64))
        self.projection.kernel.assign((self.projection.kernel.numpy() + change).astype(np.float32))
        return self.projection


def freeze(model: Any, settings: Training, extended: Sequence[int] = ()) -> Learning:
    """Prepare a model for training by the settings' strategy; `extended` are the tokens that are new to it.

    Raises `DataError` for a model whose head shares the embedding's weights, `SettingsError` for a strategy that the
    model is too small for.
    """
    if model.config.tie_word_embeddings:
        raise DataError(
            "training needs a base model whose lm_head has weights of its own (tie_word_embeddings: false), "
            "as FLAN-T5 has"
        )
    if settings.freeze == "lora":
        return _add_low_rank(model, settings, extended)
    blocks = model.decoder.block
    frozen = {
        "none": [],
        "encoder": [model.shared, model.encoder],
        "all_but_last_n": [model.shared, model.encoder, model.decoder.dropout, *blocks[: -settings.last_blocks]],
        "trunk": model.layers[:3],
    }[settings.freeze]
    if settings.freeze == "all_but_last_n" and settings.last_blocks >= len(blocks):
        raise SettingsError(f"training.last_blocks: expected less than the decoder's {len(blocks)} blocks")
    for layer in frozen:
        layer.trainable = False
        _without_dropout(layer)
    return Learning(model.trainable_variables, model.trainable_variables)


def _add_low_rank(model: Any, settings: Training, extended: Sequence[int]) -> Learning:
    """Put a `LowRank` in place of each attention's query and value projection."""
    model.trainable = False
    _without_dropout(model)
    places = []
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            attentions = [
                getattr(layer, name, None) for layer in block.layer for name in ("SelfAttention", "EncDecAttention")
            ]
            places += [(attention, name) for attention in attentions if attention is not None for name in ("q", "v")]
    added, projections = [], []
    for number, (attention, name) in enumerate(places):
        projection = getattr(attention, name)
        layer = LowRank(projection, settings.lora_rank, settings.lora_alpha, seed=settings.seed + number)
        setattr(attention, name, layer)
        added += [layer.a, layer.b]
        projections.append(projection.kernel)
    head = [model.lm_head.kernel] if extended else []

    def merge() -> None:
        for attention, name in places:
            setattr(attention, name, getattr(attention, name).merge())

    return Learning(added + head, projections + head, head_rows=list(extended) if extended else None, merge=merge)


def _without_dropout(layer: Any) -> None:
    for part in (layer, *layer.submodules):
        if isinstance(part, tf.keras.layers.Dropout):
            part.rate = 0


def parameter_table(model: Any, learning: Learning) -> list[dict[str, Any]]:
    """Parameters of each top-level layer: `layer`, `parameters`, `trainable`. A shared embedding counts once."""
    seen: set[int] = set()
    learns = {id(variable) for variable in learning.variables}
    rows = []
    for layer in model.layers:
        own = [v for v in layer.weights if id(v) not in seen]
        seen.update(id(v) for v in own)
        rows.append(
            {
                "layer": layer.name,
                "parameters": sum(map(_size, own)),
                "trainable": sum(map(_size, (v for v in own if id(v) in learns))),
            }
        )
    if learning.head_rows is not None:  # of the head, these rows only
        rows[-1]["trainable"] = len(learning.head_rows) * int(model.config.d_model)
    return rows


def _size(variable: tf.Variable) -> int:
    return int(np.prod(variable.shape))


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
