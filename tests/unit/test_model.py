"""The model on disk and in TensorFlow, with a tiny T5: weights in PyTorch's layout, shards, the vocabulary, batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from examples.make_base_model import PROMPT, SIZES, tokenise
from tasks.data.tokenizer import load_tokenizer
from tasks.errors import DataError
from tasks.model import (
    NO_TARGET,
    extend_vocabulary,
    label_states,
    length_batches,
    load_model,
    make_batch,
    pair_batches,
    save_model,
)


def logits(model: Any, rows: Dataset) -> np.ndarray:
    """At every target of every row, one after the other."""
    batch = make_batch(model, rows["input_ids"][:], rows["labels"][:])
    return model.lm_head(label_states(model, batch, training=False)).numpy()


# On disk


def test_a_saved_model_loads_with_equal_logits(model: Any, tokenizer: Any, rows: Dataset, tmp_path: Path) -> None:
    save_model(model, tokenizer, tmp_path / "copy")
    np.testing.assert_array_equal(logits(load_model(tmp_path / "copy"), rows), logits(model, rows))
    assert load_tokenizer(tmp_path / "copy")("¿Qué?")["input_ids"] == tokenizer("¿Qué?")["input_ids"]


def pytorch_names(layers: int) -> set[str]:
    """The tensors of T5ForConditionalGeneration with gated activation and an output head of its own."""
    names = {"shared.weight", "lm_head.weight"}
    for stack, blocks in {
        "encoder": ("SelfAttention", None, "DenseReluDense"),
        "decoder": ("SelfAttention", "EncDecAttention", "DenseReluDense"),
    }.items():
        names.add(f"{stack}.final_layer_norm.weight")
        names.add(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        for layer in range(layers):
            for place, block in enumerate(filter(None, blocks)):
                path = f"{stack}.block.{layer}.layer.{place}"
                names.add(f"{path}.layer_norm.weight")
                parts = ("wi_0", "wi_1", "wo") if block == "DenseReluDense" else ("q", "k", "v", "o")
                names |= {f"{path}.{block}.{part}.weight" for part in parts}
    return names


def test_weights_are_written_as_pytorch_has_them(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(model, tokenizer, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == pytorch_names(layers=2)
        assert file.get_tensor("encoder.block.0.layer.1.DenseReluDense.wi_0.weight").shape == (256, 96)  # (out, in)
        assert file.get_tensor("lm_head.weight").shape == (2400, 96)
        assert {file.get_tensor(name).dtype for name in file.keys()} == {np.dtype(np.float32)}  # noqa: SIM118


def test_weights_may_come_in_shards(base: Path, rows: Dataset, model: Any, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001.safetensors": names[::2], "model-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, tmp_path / "m" / shard)
    (tmp_path / "m" / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(logits(load_model(tmp_path / "m"), rows), logits(model, rows))


@pytest.mark.parametrize("fault", ["missing", "left over", "other shape", "no safetensors", "garbage", "no config"])
def test_a_model_that_would_be_partly_random_is_refused(fault: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    if fault == "missing":
        del weights["encoder.final_layer_norm.weight"]
    elif fault == "left over":
        weights["encoder.extra.weight"] = np.zeros(3, np.float32)
    elif fault == "other shape":
        weights["lm_head.weight"] = weights["lm_head.weight"][:100]
    save_file(weights, path)
    if fault == "no safetensors":
        path.unlink()
    elif fault == "garbage":
        path.write_bytes(b"\x80\x04pickle")
    elif fault == "no config":
        (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(DataError):
        load_model(tmp_path / "m")


def test_what_was_frozen_is_the_same_file_after_every_training(
    model: Any, tokenizer: Any, rows: Dataset, tmp_path: Path
) -> None:
    for week in ("first", "second"):
        model.lm_head.kernel.assign(model.lm_head.kernel * 1.01)
        save_model(model, tokenizer, tmp_path / week, [model.lm_head.kernel])
    shards = [[(tmp_path / week / name).read_bytes() for name in SHARDS] for week in ("first", "second")]
    assert shards[0][0] == shards[1][0]
    assert shards[0][1] != shards[1][1]
    assert set(load_file(tmp_path / "second" / SHARDS[1])) == {"lm_head.weight"}
    index = json.loads((tmp_path / "second" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == pytorch_names(layers=2)
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()
    np.testing.assert_array_equal(logits(load_model(tmp_path / "second"), rows), logits(model, rows))


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_bfloat16_is_only_for_computing(base: Path, rows: Dataset, tokenizer: Any, model: Any, tmp_path: Path) -> None:
    mixed = load_model(base, "bfloat16")
    assert {variable.dtype for variable in mixed.weights} == {tf.float32}
    batch = make_batch(mixed, rows["input_ids"][:], rows["labels"][:])
    states = label_states(mixed, batch, training=False)
    assert states.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(states, tf.float32), label_states(model, batch, training=False), atol=0.2)
    save_model(mixed, tokenizer, tmp_path)
    original, saved = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(np.array_equal(original[name], saved[name]) for name in pytorch_names(layers=2))
    assert load_model(base).compute_dtype == "float32"  # the precision of one model is not that of the next


# The vocabulary


def test_a_new_character_starts_as_the_like_one(model: Any) -> None:
    before = model.shared.weights[0].numpy(), model.lm_head.kernel.numpy()
    extend_vocabulary(model, [{"char": "ő", "id": 2399, "like": 70}, {"char": "ű", "id": 2398, "like": 81}])
    after = model.shared.weights[0].numpy(), model.lm_head.kernel.numpy()
    np.testing.assert_array_equal(after[0][[2399, 2398]], before[0][[70, 81]])
    np.testing.assert_array_equal(after[1][:, [2399, 2398]], before[1][:, [70, 81]])
    np.testing.assert_array_equal(after[0][:2398], before[0][:2398])
    np.testing.assert_array_equal(after[1][:, :2398], before[1][:, :2398])


def test_a_character_without_a_row_is_refused(model: Any) -> None:
    with pytest.raises(DataError, match="outside the model's vocabulary of 2400 rows"):
        extend_vocabulary(model, [{"char": "ő", "id": 2400, "like": 70}])


# Batches


def test_a_batch_says_where_there_is_something_to_learn(model: Any) -> None:
    batch = make_batch(model, [[5, 6, 1], [7, 1]], [[8, 9, 10, 1], [11, 1]])
    assert batch.input_ids.tolist() == [[5, 6, 1, 0, 0, 0, 0, 0], [7, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.attention_mask.sum(axis=1).tolist() == [3, 2]
    assert batch.decoder_input_ids.tolist() == [[0, 8, 9, 10, 1, 0, 0, 0], [0, 11, 1, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [8, 9, 10, 1, 11, 1]
    assert batch.positions.tolist() == [0, 1, 2, 3, 8, 9]


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=8), st.integers(8, 12))
def test_fixed_shapes_are_few_and_hold_the_same_targets(lengths: list[tuple[int, int]], rows: int) -> None:
    class Model:
        class config:
            pad_token_id, eos_token_id, decoder_start_token_id = 0, 1, 0

    pairs = [([5] * inputs, [6] * labels) for inputs, labels in lengths]
    batch = make_batch(Model, [i for i, _ in pairs], [t for _, t in pairs], rows)
    assert batch.input_ids.shape[0] == rows
    assert batch.input_ids.shape[1] % 32 == batch.decoder_input_ids.shape[1] % 32 == 0
    assert batch.targets.shape == batch.positions.shape == (batch.decoder_input_ids.size,)
    assert (batch.targets != NO_TARGET).sum() == sum(labels for _, labels in lengths)
    assert (batch.attention_mask.sum(axis=1) > 0).all()


@given(st.lists(st.integers(1, 99), max_size=50), st.integers(1, 9))
def test_batches_hold_every_row_longest_first(lengths: list[int], batch_size: int) -> None:
    batches = length_batches(lengths, batch_size)
    order = [int(row) for batch in batches for row in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    assert all(len(batch) <= batch_size for batch in batches)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=60), st.integers(1, 9))
def test_batches_of_pairs_hold_every_row_once_by_both_lengths(lengths: list[tuple[int, int]], batch_size: int) -> None:
    inputs, labels = (np.array([pair[side] for pair in lengths], int) for side in (0, 1))
    batches = pair_batches(inputs, labels, batch_size)
    order = [int(row) for batch in batches for row in batch]
    assert sorted(order) == list(range(len(lengths)))
    keys = [(-(-int(inputs[row]) // 8), int(labels[row])) for row in order]
    assert keys == sorted(keys, reverse=True)


def test_a_made_base_model_learns_from_tokens_as_the_pipeline_makes_them(tokenizer: Any) -> None:
    texts = pd.DataFrame({"source": ["My wife has a car."], "target": ["Mi esposa tiene un carro."]})
    (row,) = tokenise(texts, tokenizer, PROMPT, SIZES["tiny"])
    assert row["input_ids"] == tokenizer(PROMPT + texts.source[0])["input_ids"]
    assert row["labels"] == tokenizer(texts.target[0])["input_ids"]
