"""Train on one CPU device and on two, and print the losses of each epoch: run by `test_fit.py`, as a process."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf
from datasets import Dataset

from tasks.model import load_model
from tasks.settings import Training
from tasks.training.devices import Devices
from tasks.training.fit import Trainer
from tasks.training.freezing import freeze
from tasks.training.pairs import Pairs

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

BASE = Path(__file__).resolve().parents[2] / "examples" / "demo" / "base-model"
ROWS = Dataset.from_dict(
    {
        "input_ids": [[20 + i, 30, *[40 + i] * i, 1] for i in range(7)],
        "labels": [[90 + i, *[50 - i] * (9 - i), 1] for i in range(7)],
    }
)

for strategy in (None, tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
    devices = Devices(strategy)
    # Batches of three and of one: a device has less than the other, or nothing.
    settings = Training(
        freeze="encoder", epochs=2, batch_size=3, learning_rate=0.01, clip_norm=1.0, precision="float32"
    )
    with devices.strategy.scope():
        model = load_model(BASE)
        learning = freeze(model, settings)
    for part in model.submodules:
        if isinstance(part, tf.keras.layers.Dropout):
            part.rate = 0  # each device draws masks of its own
    pairs = Pairs.of(ROWS)
    trained = Trainer(model, learning, train=pairs, validation=pairs, settings=settings, devices=devices).fit()
    print([row["validation_loss"] for row in trained])
