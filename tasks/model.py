"""T5 models on disk and in TensorFlow: read, write and extend them, and what they compute for a batch of pairs.

On disk a model is a standard `from_pretrained` directory with safetensors in PyTorch's names and layout, because that
is what the hub has and what most services load. TensorFlow's own `save_pretrained` writes TensorFlow names, which
PyTorch loads as random weights with no more than a warning; so both directions are done here, and neither accepts a
missing or an unexpected tensor.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, GenerationConfig, TFAutoModelForSeq2SeqLM
from transformers.modeling_tf_pytorch_utils import (
    convert_tf_weight_name_to_pt_weight_name,
    load_pytorch_state_dict_in_tf2_model,
)
from transformers.utils import logging as transformers_logging

from tasks.errors import DataError
from tasks.storage import to_json

warnings.filterwarnings("ignore", module="tf_keras")
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

WIDTH_STEP = 16  # sequences are padded to a multiple of this: few shapes, little padding
CLOSE = 8  # ... where any shape will do
XLA_STEP = 32  # ... where each shape costs a compilation
NO_TARGET = -1  # at a position that is only there to fill a shape
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # second names of shared.weight


def new_model(config: Any) -> Any:
    """An untrained TensorFlow sequence-to-sequence model with its variables made."""
    model = TFAutoModelForSeq2SeqLM.from_config(config)
    model.build_in_name_scope()
    return model


@contextlib.contextmanager
def _computing_in(precision: str) -> Iterator[None]:
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    try:
        yield
    finally:
        tf.keras.mixed_precision.set_global_policy(before)


def load_model(directory: Path, precision: str = "float32") -> Any:
    """A TensorFlow model from safetensors in PyTorch's layout, in one file or in shards.

    With the precision `bfloat16` it computes in that; its weights are float32 all the same.

    Raises `DataError` when a weight is missing or left over: a model that is partly random must not be used.
    """
    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        weights = _read_weights(directory)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{directory} is not a model directory with safetensors weights: {error}") from error
    with _computing_in(precision):
        model = new_model(config)
    for name in TIED:
        weights.pop(name, None)
    try:
        _, report = load_pytorch_state_dict_in_tf2_model(
            model, weights, allow_missing_keys=True, output_loading_info=True
        )
    except ValueError as error:
        raise DataError(f"a weight in {directory} has not the shape that its config.json says: {error}") from error
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        raise DataError(f"the weights in {directory} do not fit its config.json: {wrong}")
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    return model


def _read_weights(directory: Path) -> dict[str, np.ndarray]:
    index = directory / WEIGHTS_INDEX
    if not index.exists():
        return load_file(directory / WEIGHTS)
    weights: dict[str, np.ndarray] = {}
    for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        weights.update(load_file(directory / shard))
    return weights


def save_model(model: Any, tokenizer: Any, directory: Path, trained: Sequence[tf.Variable] = ()) -> None:
    """Write a `from_pretrained` directory that PyTorch and TensorFlow load: float32, PyTorch's names and layout.

    The weights that were `trained`, if not all were, have a shard of their own: the other shard is the same file after
    every training from the same base model, and need not be stored twice.
    """
    directory.mkdir(parents=True, exist_ok=True)
    learned = {id(variable) for variable in trained}
    parts = [[v for v in model.weights if id(v) not in learned], [v for v in model.weights if id(v) in learned]]
    shards = [dict(map(_to_pytorch, part)) for part in parts if part]
    if len(shards) == 1:
        save_file(shards[0], directory / WEIGHTS, metadata={"format": "pt"})
    else:
        places = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(shard, directory / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(shard, file))
        size = sum(value.nbytes for shard in shards for value in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (directory / WEIGHTS_INDEX).write_bytes(to_json(index))
    model.config.architectures = ["T5ForConditionalGeneration"]
    model.config.torch_dtype = "float32"
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(str(directory))


def _to_pytorch(variable: tf.Variable) -> tuple[str, np.ndarray]:
    name, transpose = convert_tf_weight_name_to_pt_weight_name(variable.name, tf_weight_shape=variable.shape)
    value = variable.numpy().astype(np.float32)
    return name, np.ascontiguousarray(value.T if transpose.value == "simple" else value)


def extend_vocabulary(model: Any, extension: Sequence[dict[str, Any]]) -> None:
    """Give characters that the tokenizer lacked the vectors of a like piece to start from, in embedding and head.

    `extension` has `char`, `id` and `like` (ids) for each. Raises `DataError` for an id that the model has no row for.
    """
    if not extension:
        return
    rows = model.config.vocab_size
    for entry in extension:
        if not (0 <= entry["id"] < rows and 0 <= entry["like"] < rows):
            raise DataError(f"the tokenizer's extension {entry} is outside the model's vocabulary of {rows} rows")
    new, like = [entry["id"] for entry in extension], [entry["like"] for entry in extension]
    for weights, axis in ((model.shared.weights[0], 0), (model.lm_head.kernel, 1)):
        values = np.moveaxis(weights.numpy(), axis, 0)
        values[new] = values[like]
        weights.assign(np.moveaxis(values, 0, axis))


def pad(sequences: Sequence[Any], value: int, step: int = WIDTH_STEP) -> np.ndarray:
    """Sequences as one int32 array (rows, width), padded on the right; the width is a multiple of `step`."""
    longest = max(1, *(len(sequence) for sequence in sequences))
    array = np.full((len(sequences), -(-longest // step) * step), value, np.int32)
    for row, sequence in enumerate(sequences):
        array[row, : len(sequence)] = sequence
    return array


def length_batches(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Row numbers in batches of similar length, longest first: an allocation that fits the first batch fits all."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pair_batches(inputs: np.ndarray, labels: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Row numbers in batches in which both lengths are similar, longest inputs first."""
    order = np.lexsort((-labels, -((inputs + CLOSE - 1) // CLOSE)))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Batch(NamedTuple):
    """Some pairs as a model reads them, and where in what it computes there is something to learn. All int32."""

    input_ids: Any  # (rows, input width)
    attention_mask: Any  # (rows, input width): 1 at a token, 0 at padding
    decoder_input_ids: Any  # (rows, label width): the start token, then all labels but the last, as in T5
    positions: Any  # (targets,): where in rows x label width there is a label that is not padding
    targets: Any  # (targets,): the labels there


BATCH = Batch(*[tf.TensorSpec([None, None], tf.int32)] * 3, *[tf.TensorSpec([None], tf.int32)] * 2)


def make_batch(model: Any, inputs: Sequence[Any], labels: Sequence[Any], fixed_rows: int | None = None) -> Batch:
    """A batch of some pairs' token ids (numpy).

    With `fixed_rows` it has one of a few shapes only, for XLA, which compiles each anew: so many rows, widths that are
    multiples of 32, and every position, where `targets` is `NO_TARGET` at those that only fill up.
    """
    config = model.config
    step = XLA_STEP if fixed_rows else CLOSE
    missing = max(0, (fixed_rows or 1) - len(inputs))
    input_ids = pad([*inputs, *[[config.eos_token_id]] * missing], config.pad_token_id, step)
    padded = pad([*labels, *[[]] * missing], NO_TARGET, step)
    lengths = [*map(len, inputs), *[1] * missing]
    mask = (np.arange(input_ids.shape[1]) < np.array(lengths)[:, None]).astype(np.int32)
    shifted = np.roll(np.where(padded == NO_TARGET, config.pad_token_id, padded), 1, axis=1)
    shifted[:, 0] = config.decoder_start_token_id
    targets = padded.reshape(-1)
    positions = np.arange(targets.size) if fixed_rows else np.flatnonzero(targets != NO_TARGET)
    return Batch(input_ids, mask, shifted, positions.astype(np.int32), targets[positions])


def label_states(model: Any, batch: Batch, *, training: bool) -> tf.Tensor:
    """The decoder's last hidden states at the batch's positions, from which the head tells the targets.

    (targets, d_model), in the precision in which the model computes.
    """
    encoded = model.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, training=training)[0]
    states = model.decoder(
        input_ids=batch.decoder_input_ids,
        encoder_hidden_states=encoded,
        encoder_attention_mask=batch.attention_mask,
        use_cache=False,
        training=training,
    )[0]
    return tf.gather(tf.reshape(states, [-1, states.shape[-1]]), batch.positions)
