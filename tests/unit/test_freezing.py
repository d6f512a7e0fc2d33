"""What learns and what stays, strategy by strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from datasets import Dataset
from transformers import T5Config

from tasks.errors import DataError, SettingsError
from tasks.model import label_states, load_model, make_batch, new_model, save_model
from tasks.settings import Training
from tasks.training.devices import Devices
from tasks.training.fit import Trainer
from tasks.training.freezing import freeze, parameter_table
from tasks.training.loss import loss_meter
from tasks.training.pairs import Pairs

FLAN_T5_BASE = {
    "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip


def train(model: Any, rows: Dataset, extended: tuple[int, ...] = (), **settings: Any) -> Any:
    """Train two epochs; returns what learned."""
    training = Training(**{"epochs": 2, "batch_size": 2, "learning_rate": 0.01, "precision": "float32", **settings})
    learning = freeze(model, training, extended)
    pairs = Pairs.of(rows)
    Trainer(model, learning, train=pairs, validation=pairs, settings=training, devices=Devices()).fit()
    return learning


def test_flan_t5_base_has_the_published_numbers_of_parameters() -> None:
    model = new_model(T5Config(**FLAN_T5_BASE))
    table = parameter_table(model, freeze(model, Training()))
    assert [(row["layer"], row["parameters"], row["trainable"]) for row in table] == [
        ("shared", 24_674_304, 0),
        ("encoder", 84_954_240, 0),
        ("decoder", 113_275_008, 0),
        ("lm_head", 24_674_304, 24_674_304),
    ]
    total, trainable = (sum(row[name] for row in table) for name in ("parameters", "trainable"))
    assert (total, total - trainable, trainable) == (247_577_856, 222_903_552, 24_674_304)


def is_head(name: str) -> bool:
    return "lm_head" in name


def is_decoder(name: str) -> bool:
    return "/decoder/" in name or is_head(name)


def is_last_block(name: str) -> bool:
    return "/decoder/block_._1/" in name or "/decoder/final_layer_norm" in name or is_head(name)


def is_query_or_value(name: str) -> bool:
    return "/q/kernel" in name or "/v/kernel" in name


@pytest.mark.parametrize(
    ("strategy", "learns"),
    [
        ("trunk", is_head),
        ("encoder", is_decoder),
        ("all_but_last_n", is_last_block),
        ("none", lambda name: True),
        ("lora", is_query_or_value),
    ],
)
def test_exactly_what_the_strategy_names_is_changed(
    strategy: str, learns: Callable[[str], bool], model: Any, rows: Dataset
) -> None:
    before = {variable.name: variable.numpy() for variable in model.weights}
    loss = loss_meter(model)(rows, 64)
    learning = train(model, rows, freeze=strategy, last_blocks=1)
    learning.merge()
    after = {variable.name: variable.numpy() for variable in model.weights}
    assert set(after) == set(before)  # with lora, too: the changes are in the projections
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if learns(name)}
    assert changed == {variable.name for variable in learning.changed}
    assert loss_meter(model)(rows, 64) < loss


@pytest.mark.parametrize("strategy", ["trunk", "encoder", "all_but_last_n", "lora"])
def test_what_stays_has_no_dropout(strategy: str, model: Any, rows: Dataset) -> None:
    freeze(model, Training(freeze=strategy, last_blocks=1))
    batch = make_batch(model, rows["input_ids"][:], rows["labels"][:])
    runs = [
        model.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, training=training)[0].numpy()
        for training in (True, False)
    ]
    np.testing.assert_array_equal(*runs)
    states = [label_states(model, batch, training=training).numpy() for training in (True, False)]
    assert np.array_equal(*states) == (strategy in {"trunk", "lora"})


def test_low_rank_changes_start_from_the_model_as_it_was_and_end_in_its_weights(
    model: Any, base: Path, rows: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    measure = loss_meter(load_model(base))(rows, 64)
    learning = freeze(model, Training(freeze="lora", lora_rank=3))
    assert loss_meter(model)(rows, 64) == pytest.approx(measure, rel=1e-6)
    assert sum(row["trainable"] for row in parameter_table(model, learning)) == 12 * (96 * 3 + 3 * 96)
    for variable in learning.variables:
        variable.assign(tf.random.stateless_normal(variable.shape, [1, 2]) * 0.1)
    adapted = loss_meter(model)(rows, 64)
    assert adapted != pytest.approx(measure, rel=1e-3)
    learning.merge()
    save_model(model, tokenizer, tmp_path, learning.changed)
    assert loss_meter(load_model(tmp_path))(rows, 64) == pytest.approx(adapted, rel=1e-5)


def test_new_characters_learn_even_where_the_head_does_not(model: Any, rows: Dataset) -> None:
    new = [rows["labels"][0][0], rows["labels"][2][1]]  # as if these tokens were new
    before = model.lm_head.kernel.numpy()
    learning = train(model, rows, extended=tuple(new), freeze="lora")
    table = parameter_table(model, learning)
    assert table[-1] == {"layer": "lm_head", "parameters": 96 * 2400, "trainable": 2 * 96}
    changed = np.flatnonzero((model.lm_head.kernel.numpy() != before).any(axis=0))
    assert changed.tolist() == sorted(new)


def test_a_model_whose_head_is_its_embedding_is_refused() -> None:
    config = T5Config(vocab_size=100, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(DataError, match="lm_head has weights of its own"):
        freeze(new_model(config), Training())


def test_more_blocks_than_there_are_cannot_learn(model: Any) -> None:
    with pytest.raises(SettingsError, match=r"training\.last_blocks: expected less than the decoder's 2 blocks"):
        freeze(model, Training(freeze="all_but_last_n", last_blocks=2))
