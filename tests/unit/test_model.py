"""The model on disk and in TensorFlow, with a tiny T5: weights, freezing, loss and translation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import T5Config

from tasks.errors import DataError
from tasks.model import (
    decoder_states,
    freeze_trunk,
    length_batches,
    load_model,
    loss_meter,
    make_batch,
    new_model,
    parameter_table,
    save_model,
    token_losses,
)
from tasks.settings import Training
from tasks.tokenizer import load_tokenizer
from tasks.train import best_epoch, fit, shuffled_batches, transfer_distance

BASE = Path(__file__).resolve().parents[2] / "examples" / "demo" / "base-model"
PROMPT = "translate English to Spanish: "


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BASE)


@pytest.fixture
def model() -> Any:
    return load_model(BASE)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> Dataset:
    """A few tokenised pairs of different lengths."""
    pairs = {
        "My wife has a car.": "Mi esposa tiene un carro.",
        "Where is the computer?": "¿Dónde está la computadora?",
        "They did not drink the juice this morning because it was cold.": "No bebieron el jugo esta mañana.",
        "Yes.": "Sí.",
        "The potatoes cost 10 dollars.": "Las papas cuestan 10 dólares.",
    }
    encoded = {"input_ids": [PROMPT + source for source in pairs], "labels": list(pairs.values())}
    return Dataset.from_dict({name: tokenizer(texts)["input_ids"] for name, texts in encoded.items()})


def logits(model: Any, rows: Dataset) -> np.ndarray:
    batch = make_batch(model, rows["input_ids"][:], rows["labels"][:])
    return model.lm_head(decoder_states(model, *batch, training=False)).numpy()


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


def test_weights_may_come_in_shards(rows: Dataset, model: Any, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "m")
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
def test_a_model_that_would_be_partly_random_is_refused(fault: str, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "m")
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


# Freezing


def test_flan_t5_base_has_the_published_numbers_of_parameters() -> None:
    config = T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model = new_model(config)
    freeze_trunk(model)
    table = {row["layer"]: (row["parameters"], row["trainable"]) for row in parameter_table(model)}
    total, trainable = (sum(numbers) for numbers in zip(*table.values(), strict=True))
    assert (total, total - trainable, trainable) == (247_577_856, 222_903_552, 24_674_304)
    assert table["lm_head"] == (24_674_304, 24_674_304)


def test_a_model_whose_head_is_its_embedding_has_nothing_to_train() -> None:
    config = T5Config(vocab_size=100, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(DataError, match="needs a model whose lm_head has weights of its own"):
        freeze_trunk(new_model(config))


# Loss


def test_loss_is_cross_entropy_per_target_token_without_padding(model: Any, rows: Dataset) -> None:
    scores, labels = logits(model, rows).astype(np.float64), rows["labels"][:]
    by_hand = []
    for row, tokens in enumerate(labels):
        for place, token in enumerate(tokens):
            at = scores[row, place]
            by_hand.append(np.log(np.exp(at - at.max()).sum()) + at.max() - at[token])
    assert len(by_hand) == sum(map(len, labels))
    assert loss_meter(model)(rows, 64) == pytest.approx(np.mean(by_hand), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_loss_does_not_depend_on_batches_or_padding(batch_size: int, model: Any, rows: Dataset) -> None:
    measure = loss_meter(model)
    assert measure(rows, batch_size) == pytest.approx(measure(rows, 64), rel=1e-5)
    backwards = rows.select(range(len(rows) - 1, -1, -1))
    assert measure(backwards, batch_size) == pytest.approx(measure(rows, batch_size), rel=1e-5)


# Training


def test_only_the_head_learns(model: Any, rows: Dataset) -> None:
    before = {variable.name: variable.numpy() for variable in model.weights}
    freeze_trunk(model)
    table = fit(model, rows, rows, Training(epochs=2, learning_rate=0.01, batch_size=2))
    changed = {v.name for v in model.weights if not np.array_equal(v.numpy(), before[v.name])}
    assert len(changed) == 1
    assert "lm_head" in changed.pop()
    assert [row["epoch"] for row in table] == [0, 1, 2]
    assert table[2]["validation_loss"] < table[0]["validation_loss"]


def test_gradients_are_those_of_the_mean_loss(model: Any, rows: Dataset) -> None:
    """Against finite differences of an independent computation, on one weight of the head."""
    batch = make_batch(model, rows["input_ids"][:], rows["labels"][:])
    states = decoder_states(model, *batch, training=False)
    kernel = model.lm_head.kernel
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(token_losses(model, states, batch[2]))
    gradient = tape.gradient(loss, kernel).numpy()
    place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)

    def loss_at(change: float) -> float:
        weights = kernel.numpy().astype(np.float64)
        weights[place] += change
        real = np.array([token for row in rows["labels"][:] for token in row])
        flat = np.concatenate([states.numpy()[i, : len(row)] for i, row in enumerate(rows["labels"][:])])
        scores = flat.astype(np.float64) @ weights
        scores -= scores.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(real)), real]))

    assert gradient[place] == pytest.approx((loss_at(1e-4) - loss_at(-1e-4)) / 2e-4, rel=1e-3)


def test_training_twice_gives_the_same_model(rows: Dataset) -> None:
    ends = []
    for _ in range(2):
        model = load_model(BASE)
        freeze_trunk(model)
        table = fit(model, rows, rows, Training(epochs=2, learning_rate=0.01, batch_size=2, seed=3))
        ends.append((table, model.lm_head.kernel.numpy()))
    assert ends[0][0] == ends[1][0]
    np.testing.assert_array_equal(ends[0][1], ends[1][1])


def test_the_best_epoch_is_left_in_the_model(model: Any, rows: Dataset) -> None:
    """Each epoch of steps that are far too long is worse than the one before."""
    freeze_trunk(model)
    table = fit(model, rows, rows, Training(epochs=3, learning_rate=5, batch_size=2))
    best = best_epoch(table)
    assert best["epoch"] > 0
    assert loss_meter(model)(rows, 64) == pytest.approx(best["validation_loss"], rel=1e-5)
    assert best["validation_loss"] == min(row["validation_loss"] for row in table[1:])


def test_a_loss_that_is_no_number_stops_the_training(model: Any, rows: Dataset) -> None:
    freeze_trunk(model)
    model.lm_head.kernel.assign(model.lm_head.kernel * np.nan)
    with pytest.raises(DataError, match=r"the loss became nan in epoch 0: lower training\.learning_rate"):
        fit(model, rows, rows, Training(epochs=1))


def test_distance_is_relative_to_the_new_weights() -> None:
    assert transfer_distance([np.array([3.0, 0.0])], [np.array([3.0, 4.0])]) == pytest.approx(4 / 5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3))
def test_every_row_is_seen_once_an_epoch(lengths: list[int], batch_size: int, seed: int) -> None:
    rows = {
        "input_ids": [[i] * length for i, length in enumerate(lengths)],
        "labels": [[i] for i in range(len(lengths))],
    }
    seen = [row[0] for inputs, _ in shuffled_batches(rows, batch_size, seed) for row in inputs]  # type: ignore[arg-type]
    assert sorted(seen) == list(range(len(lengths)))
    again = [row[0] for inputs, _ in shuffled_batches(rows, batch_size, seed) for row in inputs]  # type: ignore[arg-type]
    assert seen == again


@given(st.lists(st.integers(1, 99), max_size=50), st.integers(1, 9))
def test_batches_hold_every_row_longest_first(lengths: list[int], batch_size: int) -> None:
    batches = length_batches(lengths, batch_size)
    order = [int(row) for batch in batches for row in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    assert all(len(batch) <= batch_size for batch in batches)
