"""What training runs on: the CPU, one GPU or several, as one thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

CPU_WITH_BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # as /proc/cpuinfo calls them


class Devices:
    """One device or several with copies of the model, each of which computes a share of every batch.

    On GPUs functions are compiled by XLA, for batches of a few fixed shapes; on a CPU that is slower than not.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None = None, *, xla: bool | None = None) -> None:
        gpus = tf.config.list_logical_devices("GPU")
        if strategy is None:
            strategy = tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()
        self.strategy = strategy
        self.count = int(strategy.num_replicas_in_sync)
        self.xla = bool(gpus) if xla is None else xla

    def compile(self, work: Callable[..., Any], *signature: Any) -> Callable[..., Any]:
        """`work`, which a device does with its share, as a function that all do with theirs (from `place`)."""
        inner = tf.function(work, jit_compile=True, autograph=False) if self.xla else work
        return self.graph(lambda *shares: self.strategy.run(inner, args=shares), *signature)

    def graph(self, work: Callable[..., Any], *signature: Any) -> Callable[..., Any]:
        """`work` as a graph that is traced as seldom as can be: once for all shapes, where nothing forbids it.

        Without autograph, which takes longer than all else of tracing: no branch of the model depends on a tensor.
        """
        if self.count == 1 and not self.xla:
            return tf.function(work, input_signature=signature, autograph=False)
        return tf.function(work, reduce_retracing=not self.xla, autograph=False)

    def split(self, pairs: Any, model: Any, rows: np.ndarray, batch_size: int) -> list[Any]:
        """A batch of some rows for each device. One may have none."""
        fixed_rows = -(-batch_size // self.count) if self.xla else None
        return [pairs.batch(model, share, fixed_rows) for share in np.array_split(rows, self.count)]

    def place(self, batches: Sequence[Any]) -> Any:
        """Give each device its batch."""
        tensors = [tf.nest.map_structure(tf.constant, batch) for batch in batches]
        if self.count == 1:
            return tensors[0]
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tensors[context.replica_id_in_sync_group]
        )

    def results(self, value: Any) -> Sequence[Any]:
        """What each device has found."""
        return self.strategy.experimental_local_results(value)


def resolve_precision(asked: str) -> str:
    """`float32` or `bfloat16`: for `auto` the latter where the hardware multiplies in it."""
    if asked != "auto":
        return asked
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return "bfloat16" if capability >= (8, 0) else "float32"
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:  # not Linux
        return "float32"
    return "bfloat16" if flags & CPU_WITH_BFLOAT16 else "float32"
