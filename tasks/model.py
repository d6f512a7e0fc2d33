"""T5 models on disk and in TensorFlow: read, write, freeze, and measure.

On disk a model is a standard `from_pretrained` directory with safetensors in PyTorch's names and layout, because that
is what the hub has and what most services load. TensorFlow's own `save_pretrained` writes TensorFlow names, which
PyTorch loads as random weights with no more than a warning; so both directions are done here, and neither accepts a
missing or an unexpected tensor.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # transformers' TensorFlow models are Keras 2 models
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
warnings.filterwarnings("ignore", module="tf_keras")

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from transformers import AutoConfig, GenerationConfig, TFAutoModelForSeq2SeqLM  # noqa: E402
from transformers.modeling_tf_pytorch_utils import (  # noqa: E402
    convert_tf_weight_name_to_pt_weight_name,
    load_pytorch_state_dict_in_tf2_model,
)
from transformers.utils import logging as transformers_logging  # noqa: E402

from tasks.errors import DataError  # noqa: E402

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

WIDTH_STEP = 16  # sequences are padded to a multiple of this: few shapes, little padding
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # second names of shared.weight


def new_model(config: Any) -> Any:
    """An untrained TensorFlow sequence-to-sequence model with its variables made."""
    model = TFAutoModelForSeq2SeqLM.from_config(config)
    model.build_in_name_scope()
    return model


def load_model(directory: Path) -> Any:
    """A TensorFlow model from safetensors in PyTorch's layout, in one file or in shards.

    Raises `DataError` when a weight is missing or left over: a model that is partly random must not be used.
    """
    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        weights = _read_weights(directory)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{directory} is not a model directory with safetensors weights: {error}") from error
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
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return load_file(directory / "model.safetensors")
    weights: dict[str, np.ndarray] = {}
    for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        weights.update(load_file(directory / shard))
    return weights


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a `from_pretrained` directory that PyTorch and TensorFlow load: float32, PyTorch's names and layout."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {}
    for variable in model.weights:
        name, transpose = convert_tf_weight_name_to_pt_weight_name(variable.name, tf_weight_shape=variable.shape)
        value = variable.numpy().astype(np.float32)
        weights[name] = np.ascontiguousarray(value.T if transpose.value == "simple" else value)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["T5ForConditionalGeneration"]
    model.config.torch_dtype = "float32"
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(str(directory))


def freeze_trunk(model: Any) -> None:
    """Freeze the embedding, the encoder and the decoder (`model.layers[:3]`); the output head stays trainable.

    Raises `DataError` for a model whose head shares the embedding's weights: there would be nothing to train.
    """
    if model.config.tie_word_embeddings:
        raise DataError(
            "training.freeze: trunk needs a model whose lm_head has weights of its own "
            "(tie_word_embeddings: false), as FLAN-T5 has"
        )
    for layer in model.layers[:3]:
        layer.trainable = False


def parameter_table(model: Any) -> list[dict[str, Any]]:
    """Parameters of each top-level layer: `layer`, `parameters`, `trainable`. A shared embedding counts once."""
    seen: set[int] = set()
    rows = []
    for layer in model.layers:
        own = [v for v in layer.weights if id(v) not in seen]
        seen.update(id(v) for v in own)
        trainable = {id(v) for v in layer.trainable_weights}
        rows.append(
            {
                "layer": layer.name,
                "parameters": sum(int(np.prod(v.shape)) for v in own),
                "trainable": sum(int(np.prod(v.shape)) for v in own if id(v) in trainable),
            }
        )
    return rows


def pad(sequences: Sequence[Sequence[int]], value: int, width: int | None = None) -> np.ndarray:
    """Sequences as one int32 array (rows, width), padded on the right; width is rounded up to few distinct ones."""
    longest = width or max(len(sequence) for sequence in sequences)
    array = np.full((len(sequences), -(-longest // WIDTH_STEP) * WIDTH_STEP), value, np.int32)
    for row, sequence in enumerate(sequences):
        array[row, : len(sequence)] = sequence
    return array


def decoder_states(
    model: Any, input_ids: tf.Tensor, attention_mask: tf.Tensor, labels: tf.Tensor, *, training: bool
) -> tf.Tensor:
    """The decoder's last hidden states for known targets: (batch, target length, d_model).

    The decoder reads the labels shifted right, as in T5: the start token, then every label but the last.
    """
    start = tf.fill([tf.shape(labels)[0], 1], model.config.decoder_start_token_id)
    decoder_input = tf.concat([start, labels[:, :-1]], axis=1)
    encoded = model.encoder(input_ids=input_ids, attention_mask=attention_mask, training=training)[0]
    return model.decoder(
        input_ids=decoder_input,
        encoder_hidden_states=encoded,
        encoder_attention_mask=attention_mask,
        use_cache=False,
        training=training,
    )[0]


def token_losses(model: Any, states: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Cross-entropy of every target token that is not padding, flat. Logits exist only at those positions."""
    real = labels != model.config.pad_token_id
    logits = model.lm_head(tf.boolean_mask(states, real))
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.boolean_mask(labels, real), logits)


def length_batches(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Row numbers in batches of similar length, longest first: an allocation that fits the first batch fits all."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def loss_meter(model: Any) -> Callable[[Any, int], float]:
    """A function that measures a model's loss over tokenised rows, compiled once and used every epoch.

    It takes rows (`input_ids`, `labels`) and a batch size, and returns the cross-entropy per target token; padding is
    not counted, and dropout is off.
    """

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)] * 3)
    def batch_loss(input_ids: tf.Tensor, attention_mask: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        losses = token_losses(model, decoder_states(model, input_ids, attention_mask, labels, training=False), labels)
        return tf.reduce_sum(losses), tf.size(losses)

    def measure(rows: Any, batch_size: int) -> float:
        inputs, labels = rows["input_ids"][:], rows["labels"][:]
        total, count = 0.0, 0
        for batch in length_batches([len(row) for row in inputs], batch_size):
            arrays = make_batch(model, [inputs[i] for i in batch], [labels[i] for i in batch])
            batch_sum, batch_count = batch_loss(*arrays)
            total += float(batch_sum)
            count += int(batch_count)
        return total / count

    return measure


def make_batch(
    model: Any, inputs: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Input ids, attention mask and labels of some rows, each (rows, width) int32."""
    pad_id = model.config.pad_token_id
    input_ids = pad(inputs, pad_id)
    mask = (np.arange(input_ids.shape[1]) < np.array([len(row) for row in inputs])[:, None]).astype(np.int32)
    return tf.constant(input_ids), tf.constant(mask), tf.constant(pad(labels, pad_id))
