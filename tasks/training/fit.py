"""The training loop: epochs over batches, validation after each, checkpoints in between."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from tasks.errors import DataError
from tasks.progress import Progress
from tasks.settings import Training
from tasks.training.checkpoints import Checkpoints
from tasks.training.devices import Devices
from tasks.training.events import Events
from tasks.training.freezing import Learning
from tasks.training.loss import cross_entropy, cross_entropy_value
from tasks.training.pairs import Pairs
from tasks.training.stopping import Stopping

log = logging.getLogger(__name__)

DIVERGED = 100  # a loss so many times that of guessing at random is no learning any more
Arrays = dict[str, np.ndarray]
Item = TypeVar("Item")


@dataclass
class Position:
    """How far training has come: what a checkpoint says besides the weights."""

    epoch: int = 1  # the one that is being trained
    batch: int = 0  # its batches that are done
    step: int = 0  # batches done in all epochs
    loss_sum: float = 0.0  # over the targets of this epoch's batches so far
    targets: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)  # a row for each that is done


class Trainer:
    """A model that learns from pairs.

    Dropout is a function of seed, step and place in the model, and so is the order of the pairs of seed and epoch:
    there is no random state besides, and training that goes on from a checkpoint is the training that was interrupted.
    """

    def __init__(
        self,
        model: Any,
        learning: Learning,
        *,
        train: Pairs,
        validation: Pairs,
        settings: Training,
        devices: Devices,
    ) -> None:
        tf.keras.utils.set_random_seed(settings.seed)
        self.model, self.learning, self.settings, self.devices = model, learning, settings, devices
        self.train, self.validation = train, validation
        with devices.strategy.scope():
            # The old Adam is one fused operation, several times faster on a CPU than the new one.
            self.optimizer = tf.keras.optimizers.legacy.Adam(settings.learning_rate)
            self.optimizer.iterations  # noqa: B018 - makes the variable
            self.optimizer._create_all_weights(learning.variables)
        set_dropout(model, settings.seed, self.optimizer.iterations)
        self.gradients = (
            tf.function(self._gradients, jit_compile=True, autograph=False) if devices.xla else self._gradients
        )
        self.step = devices.graph(
            lambda batch, targets: devices.strategy.run(self._step, args=(batch, targets)),
            train.signature,
            tf.TensorSpec([], tf.float32),
        )
        self.value = devices.compile(self._value, validation.signature)
        self.position = Position()
        self.best: list[np.ndarray] = []

    def _gradients(self, batch: Any, targets: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The sum of one device's losses, and its share of the gradients of the mean over the whole batch."""
        trunk_learns = self.learning.variables[0] is not self.model.lm_head.kernel
        with tf.GradientTape() as tape:
            states, wanted = self.train.states(self.model, batch, training=True)
            loss = cross_entropy(
                states,
                wanted,
                self.model.lm_head.kernel,
                smoothing=self.settings.label_smoothing,
                states_learn=trunk_learns,
            )
            mean = loss / targets
        # An embedding's gradient comes as the rows that were used: as a whole it can be summed and clipped.
        return loss, [tf.convert_to_tensor(g) for g in tape.gradient(mean, self.learning.variables)]

    def _step(self, batch: Any, targets: tf.Tensor) -> tf.Tensor:
        loss, gradients = self.gradients(batch, targets)
        replica = tf.distribute.get_replica_context()
        gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        if self.learning.head_rows is not None:  # the head is the last; Adam leaves alone what never has a gradient
            learns = np.zeros(self.model.config.vocab_size, np.float32)
            learns[self.learning.head_rows] = 1
            gradients[-1] *= learns
        if self.settings.clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self.settings.clip_norm)
        pairs = zip(gradients, self.learning.variables, strict=True)
        self.optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, loss)

    def _value(self, batch: Any) -> tf.Tensor:
        states, wanted = self.validation.states(self.model, batch, training=False)
        return cross_entropy_value(states, wanted, self.model.lm_head.kernel)

    def fit(
        self,
        checkpoints: Checkpoints | None = None,
        stopping: Stopping | None = None,
        events: Events | None = None,
    ) -> list[dict[str, Any]]:
        """Train, from the last checkpoint if there is one, and leave the model at its best epoch.

        Returns a row an epoch, epoch 0 being the untrained model: `epoch`, `training_loss` (None for epoch 0),
        `validation_loss`, both per target token. Raises `DataError` when the loss is no number or far from any use,
        `StoppedError` after a checkpoint when the process has been asked to end.
        """
        checkpoints, stopping = checkpoints or Checkpoints.none(), stopping or Stopping()
        with stopping.deferred():
            self._restore(checkpoints)
            position = self.position
            if not position.epochs:
                self._end_epoch(0, None, events)
            while not self._finished():
                started, targets_before = time.monotonic(), position.targets
                for loss in self._batches():
                    if events:
                        events.add(position.step, {"loss/step": loss, "learning_rate": self._rate(position.step)})
                    if stopping.requested or checkpoints.is_due():
                        checkpoints.save(position.step, self._arrays(), asdict(position))
                    stopping.raise_if_requested()
                if events:
                    rate = (position.targets - targets_before) / (time.monotonic() - started)
                    events.add(position.step, {"targets per second": rate})
                self._end_epoch(position.epoch, position.loss_sum / position.targets, events)
                if best_epoch(position.epochs) is position.epochs[-1]:
                    self.best = [variable.numpy() for variable in self.learning.variables]
                position.epoch, position.batch, position.loss_sum, position.targets = position.epoch + 1, 0, 0.0, 0
                checkpoints.save(position.step, self._arrays(), asdict(position))
                stopping.raise_if_requested()
        for variable, value in zip(self.learning.variables, self.best, strict=True):
            variable.assign(value)
        return position.epochs

    def _batches(self) -> Iterator[float]:
        """Train on the batches that are left of the epoch; yields each one's mean loss."""
        position, settings = self.position, self.settings
        order = self.train.shuffled(settings.batch_size, settings.seed + position.epoch)[position.batch :]
        made = (
            (rows, self.devices.split(self.train, self.model, rows, settings.batch_size), self.train.targets(rows))
            for rows in order
        )
        with Progress(
            f"epoch {position.epoch}/{settings.epochs}", total=sum(map(len, order)), unit="pairs"
        ) as progress:
            for rows, batches, targets in ahead(made):
                self.optimizer.learning_rate.assign(self._rate(position.step))
                loss = float(
                    self.devices.results(self.step(self.devices.place(batches), tf.constant(float(targets))))[0]
                )
                if not math.isfinite(loss):
                    raise DataError(
                        f"the loss became {loss} in epoch {position.epoch}, step {position.step}: "
                        f"lower training.learning_rate, or set training.clip_norm"
                    )
                position.batch += 1
                position.step += 1
                position.loss_sum += loss
                position.targets += targets
                progress.advance(len(rows), loss=position.loss_sum / position.targets)
                yield loss / targets

    def _rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: it rises over the warm-up, and stays."""
        warmup = self.settings.warmup_steps
        return self.settings.learning_rate * min(1.0, (step + 1) / warmup if warmup else 1.0)

    def _end_epoch(self, epoch: int, training_loss: float | None, events: Events | None) -> None:
        """Measure, record, and stop what has gone wrong."""
        loss = self.validation_loss()
        shown = "   -  " if training_loss is None else f"{training_loss:.4f}"
        log.info("epoch %s: training loss %s, validation loss %.4f", epoch, shown, loss)
        useless = DIVERGED * math.log(self.model.config.vocab_size)
        if not math.isfinite(loss) or loss > useless:
            raise DataError(
                f"the loss became {loss:.4g} in epoch {epoch}: "
                + ("is the base model fit for use?" if epoch == 0 else "lower training.learning_rate")
            )
        # No times here: the same training must give the same files, and so the same version.
        self.position.epochs.append({"epoch": epoch, "training_loss": training_loss, "validation_loss": loss})
        if events:
            figures = {"loss/validation": loss}
            if training_loss is not None:
                figures["loss/training"] = training_loss
            events.add(self.position.step, figures)
            events.upload()

    def validation_loss(self) -> float:
        """Cross-entropy per target token of the validation split."""
        total = 0.0
        for rows in self.validation.in_order(self.settings.batch_size):
            batches = self.devices.split(self.validation, self.model, rows, self.settings.batch_size)
            total += sum(map(float, self.devices.results(self.value(self.devices.place(batches)))))
        return total / int(self.validation.labels.lengths.sum())

    def _finished(self) -> bool:
        """Whether all epochs are done, or no epoch for a while was better than the best."""
        done = self.position.epochs
        if self.position.epoch > self.settings.epochs:
            return True
        waited = len(done) - 1 - best_epoch(done)["epoch"] if len(done) > 1 else 0
        if self.settings.patience is None or waited < self.settings.patience:
            return False
        log.info("validation loss has not fallen for %s epochs: training ends", waited)
        return True

    def _arrays(self) -> Arrays:
        """What a checkpoint holds: trained weights, the optimizer's variables, the best epoch's weights."""
        groups = {
            "weights": [variable.numpy() for variable in self.learning.variables],
            "optimizer": [variable.numpy() for variable in self.optimizer.variables()],
            "best": self.best,
        }
        return {f"{name}/{i}": array for name, group in groups.items() for i, array in enumerate(group)}

    def _restore(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint that fits, if there is one."""
        found = checkpoints.latest({name: array.shape for name, array in self._arrays().items()})
        if found is None:
            return
        arrays, position = found
        for name, variables in (("weights", self.learning.variables), ("optimizer", self.optimizer.variables())):
            for i, variable in enumerate(variables):
                variable.assign(arrays[f"{name}/{i}"])
        self.best = [arrays[f"best/{i}"] for i in range(len(self.learning.variables)) if f"best/{i}" in arrays]
        self.position = Position(**position)
        log.info("going on from a checkpoint: epoch %s, batch %s", self.position.epoch, self.position.batch)


def best_epoch(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The trained epoch with the lowest validation loss. Epoch 0 is the base model, which is not a candidate."""
    return min(epochs[1:], key=lambda epoch: epoch["validation_loss"])


def set_dropout(model: Any, seed: int, step: tf.Variable) -> None:
    """Make every dropout of the model a function of seed, step, its place in the model, and the device."""

    class AtStep:
        """What a Keras dropout asks for its mask."""

        def __init__(self, place: int) -> None:
            self.place = place

        def _maybe_init(self) -> None:
            """Keras asks for it; there is nothing to be made."""

        def dropout(self, inputs: tf.Tensor, rate: float, noise_shape: Any = None) -> tf.Tensor:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            where = tf.stack([tf.cast(step, tf.int64) * 1024 + tf.cast(replica, tf.int64), seed * 65_536 + self.place])
            return tf.nn.experimental.stateless_dropout(inputs, rate, seed=where, noise_shape=noise_shape)

    dropouts = [layer for layer in model.submodules if isinstance(layer, tf.keras.layers.Dropout)]
    for place, layer in enumerate(dropouts):
        layer._random_generator = AtStep(place)


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
