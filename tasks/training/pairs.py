"""Tokenised pairs as training reads them: in flat arrays, and in batches of any rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from datasets import Dataset

from tasks.model import BATCH, Batch, label_states, make_batch, pair_batches


class Ragged:
    """Sequences of different lengths in one array: a fraction of the memory of lists."""

    def __init__(self, values: np.ndarray, lengths: np.ndarray) -> None:
        self.values, self.lengths = values, lengths
        self.starts = np.cumsum(lengths) - lengths

    @classmethod
    def column(cls, rows: Dataset, name: str) -> Ragged:
        """A column of lists of token ids."""
        column = rows.with_format("arrow")[:][name].combine_chunks()
        return cls(column.flatten().to_numpy().astype(np.int32), column.value_lengths().to_numpy())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.starts[row] : self.starts[row] + self.lengths[row]]


class Pairs:
    """Pairs of which the model computes everything, anew each time."""

    signature = BATCH

    def __init__(self, inputs: Ragged, labels: Ragged) -> None:
        self.inputs, self.labels = inputs, labels

    @classmethod
    def of(cls, rows: Dataset) -> Pairs:
        """The pairs of a prepared split."""
        return cls(Ragged.column(rows, "input_ids"), Ragged.column(rows, "labels"))

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, model: Any, rows: np.ndarray, fixed_rows: int | None) -> Batch:
        """Some rows' token ids; shapes as in `make_batch`."""
        return make_batch(model, [self.inputs[r] for r in rows], [self.labels[r] for r in rows], fixed_rows)

    @staticmethod
    def states(model: Any, batch: Batch, *, training: bool) -> tuple[tf.Tensor, tf.Tensor]:
        """The decoder's states where there is a target, and the targets."""
        return label_states(model, batch, training=training), batch.targets

    def in_order(self, batch_size: int) -> list[np.ndarray]:
        """Every row once, in batches in which both lengths are similar."""
        return pair_batches(self.inputs.lengths, self.labels.lengths, batch_size)

    def shuffled(self, batch_size: int, seed: int) -> list[np.ndarray]:
        """The same, but the seed decides the batches' order, and which of equally long rows go together."""
        random = np.random.default_rng(seed)
        order = random.permutation(len(self))
        batches = pair_batches(self.inputs.lengths[order], self.labels.lengths[order], batch_size)
        return [order[batches[place]] for place in random.permutation(len(batches))]

    def targets(self, rows: np.ndarray) -> int:
        """How many target tokens some rows have."""
        return int(self.labels.lengths[rows].sum())
