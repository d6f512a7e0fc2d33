"""What train saves loads in PyTorch with every weight in its place, and says there what it says in TensorFlow.

PyTorch is no dependency of this project, and transformers 5 cannot be installed beside the 4 that has TensorFlow. So
the test asks the interpreters that TORCH_PYTHONS names (paths, separated by colons), each with torch and a transformers
of its own, and is skipped where there is none.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tasks.data.tokenizer import load_tokenizer
from tasks.model import extend_vocabulary, load_model, save_model
from tasks.settings import Training
from tasks.training.freezing import freeze

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples" / "demo" / "base-model"
SENTENCES = {
    "translate English to Spanish: My wife has a car.": "Mi esposa tiene un carro.",
    "translate English to Spanish: Where is the computer?": "¿Dónde está la computadora?",
}
INTERPRETERS = [name for name in os.environ.get("TORCH_PYTHONS", "").split(":") if name]
if importlib.util.find_spec("torch"):
    INTERPRETERS.append(sys.executable)


@pytest.mark.skipif(not INTERPRETERS, reason="no PyTorch: TORCH_PYTHONS names no interpreter that has it")
@pytest.mark.parametrize("strategy", ["trunk", "none", "lora"])
@pytest.mark.parametrize("python", INTERPRETERS or [""])
def test_pytorch_loads_every_weight_and_computes_the_same(python: str, strategy: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(BASE), load_tokenizer(BASE)
    extend_vocabulary(model, [{"char": "ő", "id": 2399, "like": 70}])
    learning = freeze(model, Training(freeze=strategy))
    for number, variable in enumerate(learning.variables):  # as training would: nothing is as it was
        variable.assign_add(0.01 * tf.random.stateless_normal(variable.shape, [number, 7]))
    learning.merge()
    save_model(model, tokenizer, tmp_path / "model", learning.changed)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (strategy != "none")

    rows = [
        {"text": source, "input_ids": tokenizer(source)["input_ids"], "labels": tokenizer(target)["input_ids"]}
        for source, target in SENTENCES.items()
    ]
    (tmp_path / "tokens.json").write_text(json.dumps(rows))
    command = [python, str(ROOT / "tests" / "integration" / "torch_logits.py"), str(tmp_path / "model")]
    ended = subprocess.run(
        [*command, str(tmp_path / "tokens.json"), str(tmp_path / "logits.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads((tmp_path / "logits.json").read_text())
    assert found["faults"] == {}
    assert found["ids"] == [row["input_ids"] for row in rows]
    for row, theirs in zip(rows, found["logits"], strict=True):
        decoder_input = [model.config.decoder_start_token_id, *row["labels"][:-1]]
        ours = model(input_ids=tf.constant([row["input_ids"]]), decoder_input_ids=tf.constant([decoder_input])).logits
        np.testing.assert_allclose(theirs, ours[0], rtol=1e-3, atol=1e-3 * float(np.abs(ours).max()))
