"""Training's curves as TensorBoard reads them: `tensorboard --logdir` on a copy of `runs/RUN_ID/tensorboard/`."""

from __future__ import annotations

import logging
from pathlib import Path

import tensorflow as tf

from tasks.storage import Store, StoreUnreachableError

log = logging.getLogger(__name__)

# What makes TensorBoard show a number as a curve. `tf.summary.scalar` would need the tensorboard package for it.
SCALAR = tf.compat.v1.SummaryMetadata(
    plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars"), data_class=1
)


class Events:
    """Numbers by step, in an event file that is copied to the store."""

    def __init__(self, directory: Path, store: Store, prefix: str) -> None:
        self.directory, self.store, self.prefix = directory, store, prefix
        self._writer = tf.summary.create_file_writer(str(directory))

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Record some numbers at a step."""
        with self._writer.as_default():
            for name, value in figures.items():
                tf.summary.write(name, tf.constant(value, tf.float32), step=step, metadata=SCALAR)

    def upload(self) -> None:
        """Copy what there is to the store. A store that is away is no reason to stop training."""
        self._writer.flush()
        try:
            self.store.upload_all({f"{self.prefix}/{file.name}": file for file in self.directory.iterdir()})
        except StoreUnreachableError as error:
            log.warning("TensorBoard's events could not be written: %s", error)
