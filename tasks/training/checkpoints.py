"""Training's progress in the store, so that a lost machine costs minutes.

    runs/RUN_ID/checkpoints/STEP/state.safetensors    trained weights, optimizer, best weights so far
    runs/RUN_ID/checkpoints/STEP/manifest.json        position, and of which training it is; written last

A checkpoint without its manifest, with another checksum, of other settings or data, or with other shapes is never
loaded: a warning, and the one before it is tried.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tasks import artifacts
from tasks.errors import DataError
from tasks.storage import MissingObjectError, Store, StoreUnreachableError

log = logging.getLogger(__name__)

STATE = "state.safetensors"
KEPT = 2  # the last ones; the one before the last is for when the last turns out to be damaged


class Checkpoints:
    """The checkpoints of one training in the store, under `prefix`.

    `identity` is a hash of everything on which the training depends: one with another identity is not gone on from.
    """

    def __init__(self, store: Store | None, prefix: str, identity: str, minutes: float) -> None:
        self.store, self.prefix, self.identity = store, prefix, identity
        self.seconds = 60 * minutes
        self._last = time.monotonic()
        self._own: list[str] = []  # those that this process has written or gone on from

    @classmethod
    def none(cls) -> Checkpoints:
        """For training that keeps none."""
        return cls(None, "", "", float("inf"))

    def is_due(self) -> bool:
        """Whether the last is old enough."""
        return time.monotonic() - self._last >= self.seconds

    def save(self, step: int, arrays: Mapping[str, np.ndarray], position: dict[str, Any]) -> None:
        """Write a checkpoint, and delete old ones. A store that is away is no reason to stop training: a warning."""
        if self.store is None:
            return
        started = time.monotonic()
        prefix = f"{self.prefix}/{step:08}"
        with tempfile.TemporaryDirectory() as name:
            save_file({key: np.asarray(array, order="C") for key, array in arrays.items()}, Path(name) / STATE)
            about = {"identity": self.identity, "position": position}
            try:
                self.store.delete(f"{prefix}/{artifacts.MANIFEST}")  # it could be a foreign one's
                artifacts.publish(self.store, prefix, Path(name), about)
                # An epoch's last step may have been due by the clock as well: one checkpoint, not two.
                self._own = [own for own in self._own if own != prefix] + [prefix]
                self._delete_others()
                log.info("checkpoint at step %s written in %.1f s", step, time.monotonic() - started)
            except StoreUnreachableError as error:
                log.warning("no checkpoint could be written; training goes on without: %s", error)
        self._last = time.monotonic()

    def latest(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The newest checkpoint that is whole and of this training: its arrays and its position.

        `shapes` are of the arrays that it must have; it may have others besides.
        """
        for prefix in reversed(self._prefixes()):
            with tempfile.TemporaryDirectory() as name:
                try:
                    manifest = artifacts.read_manifest(self.store, prefix)  # type: ignore[arg-type]
                    if manifest.metadata.get("identity") != self.identity:
                        log.warning("%s is of a training with other settings, data or code: ignored", prefix)
                        continue
                    artifacts.fetch(self.store, prefix, Path(name) / "checkpoint")  # type: ignore[arg-type]
                    arrays = load_file(Path(name) / "checkpoint" / STATE)
                except MissingObjectError:
                    log.warning("%s was never completed: ignored", prefix)
                    continue
                except (DataError, SafetensorError) as error:
                    log.warning("%s is damaged: ignored (%s)", prefix, error)
                    continue
            if any(key not in arrays or arrays[key].shape != shape for key, shape in shapes.items()):
                log.warning("%s has not the shapes of this model: ignored", prefix)
                continue
            self._own.append(prefix)
            return arrays, manifest.metadata["position"]
        return None

    def _prefixes(self) -> list[str]:
        """Every checkpoint, whole or not, oldest first."""
        if self.store is None:
            return []
        return sorted({entry.key.rpartition("/")[0] for entry in self.store.list(f"{self.prefix}/")})

    def _delete_others(self) -> None:
        """Delete old checkpoints, and those that were found to be damaged or of another training."""
        for prefix in set(self._prefixes()) - set(self._own[-KEPT:]):
            keys = [entry.key for entry in self.store.list(f"{prefix}/")]  # type: ignore[union-attr]
            for key in sorted(keys, key=lambda key: not key.endswith(artifacts.MANIFEST)):  # the manifest first
                self.store.delete(key)  # type: ignore[union-attr]
