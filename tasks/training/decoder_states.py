"""What a frozen trunk gives, computed once: the decoder's states at the target positions of every pair.

With `freeze: trunk` they are all that the head learns from, and nothing changes them. So the trunk runs once for a
pair, and every epoch reads its states from memory-mapped files. In the store they are kept under what they depend on,
so the next run computes only pairs that no run has seen:

    decoder-states/FINGERPRINT/SHARD/states.npy     (targets, d_model): the 16 bits of each float16 or bfloat16
    decoder-states/FINGERPRINT/SHARD/pairs.npy      key and number of targets of each pair, in the order of the states
    decoder-states/FINGERPRINT/SHARD/manifest.json  last

FINGERPRINT is of base model and precision, SHARD of the pairs. A pair's key is of its token ids, where a character by
which the tokenizer was extended stands as the token whose vectors it was given: to a frozen trunk the two are the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow as tf

from tasks import artifacts
from tasks.errors import DataError, RetryableError, SettingsError
from tasks.model import NO_TARGET, label_states
from tasks.progress import Progress
from tasks.storage import Store, to_json
from tasks.training.devices import Devices
from tasks.training.pairs import Pairs, Ragged

log = logging.getLogger(__name__)

FORMAT = 1  # raised when the same pair gives other states
SHARD_TARGETS = 2**17  # in a shard, about: 200 MB for FLAN-T5 base
DISK_LIMIT = "RETRAIN_DISK_LIMIT"  # bytes; what the pod may use, from k8s/pods/gpu.yaml; 0: no limit
FIXED_STEP = 512  # with XLA the positions of a batch are filled up to a multiple of this
STORED_AS = {"float32": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ENTRY = np.dtype([("key", "V16"), ("targets", "<i8")])


@dataclass(frozen=True)
class Keep:
    """Where in the store the states of one base model are kept."""

    store: Store
    prefix: str

    @classmethod
    def of(cls, store: Store, base_model: str, precision: str) -> Keep:
        """The place for a base model's states in a precision; `base_model` is its key, which names its content."""
        made_of = {"format": FORMAT, "base_model": base_model.rsplit("/", 1)[-1], "precision": precision}
        return cls(store, f"decoder-states/{hashlib.sha256(to_json(made_of)).hexdigest()[:32]}")


class StatePairs(Pairs):
    """Pairs whose decoder states are known: only the head is computed."""

    def __init__(self, pairs: Pairs, shards: Sequence[np.ndarray], places: Sequence[tuple[int, int]]) -> None:
        super().__init__(pairs.inputs, pairs.labels)
        self.shards, self.places = shards, places
        self.signature = (  # type: ignore[assignment]
            tf.TensorSpec([None, shards[0].shape[1]], tf.as_dtype(shards[0].dtype)),
            tf.TensorSpec([None], tf.int32),
        )

    def batch(self, model: Any, rows: np.ndarray, fixed_rows: int | None) -> Any:
        """Some rows' states (targets, d_model) and targets; with fixed shapes, filled up to one of a few lengths."""
        places = [(*self.places[row], self.labels.lengths[row]) for row in rows]
        states = [self.shards[shard][start : start + length] for shard, start, length in places]
        targets = [self.labels[row] for row in rows]
        missing = -sum(map(len, targets)) % FIXED_STEP if fixed_rows else int(len(rows) == 0)
        if missing:
            states.append(np.zeros([missing, self.shards[0].shape[1]], self.shards[0].dtype))
            targets.append(np.full(missing, NO_TARGET, np.int32))
        return np.concatenate(states), np.concatenate(targets)

    @staticmethod
    def states(model: Any, batch: Any, *, training: bool) -> tuple[tf.Tensor, tf.Tensor]:
        """The batch itself, in the precision in which the model computes."""
        states, targets = batch
        return tf.cast(states, model.lm_head.compute_dtype), targets


def with_states(
    model: Any,
    splits: dict[str, Pairs],
    directory: Path,
    devices: Devices,
    *,
    precision: str,
    batch_size: int,
    like: dict[int, int] | None = None,
    keep: Keep | None = None,
) -> dict[str, StatePairs]:
    """The splits with their decoder states: from the store where it has them, else computed; as files in `directory`.

    `like` gives for each token that extends the vocabulary the one whose vectors it has. Raises `RetryableError` or
    `SettingsError` when there is not the disk for all, before any is computed; `DataError` when a state does not fit
    in 16 bits.
    """
    directory.mkdir()
    keys = {split: pair_keys(pairs, like or {}, model.config.vocab_size) for split, pairs in splits.items()}
    rows = {key: (split, row) for split, names in keys.items() for row, key in enumerate(names)}
    targets = {key: int(splits[split].labels.lengths[row]) for key, (split, row) in rows.items()}
    stored = find_stored(keep, set(rows), directory) if keep else {}
    missing = set(rows).difference(*stored.values())
    width = int(model.config.d_model)
    refuse_without_space(directory, targets, missing, 2 * width)

    shards: list[np.ndarray] = []
    places: dict[bytes, tuple[int, int]] = {}

    def add(folder: Path) -> None:
        entries = np.load(folder / "pairs.npy")
        states = np.load(folder / "states.npy", mmap_mode="r").view(STORED_AS[precision])
        if states.shape != (entries["targets"].sum(), width):
            raise DataError(f"{folder.name} has states of shape {states.shape}")
        starts = np.cumsum(entries["targets"]) - entries["targets"]
        places.update(
            {entry["key"].tobytes(): (len(shards), int(at)) for entry, at in zip(entries, starts, strict=True)}
        )
        shards.append(states)

    for prefix, members in stored.items():
        folder = directory / prefix.rsplit("/", 1)[-1]
        try:
            artifacts.fetch(keep.store, prefix, folder)  # type: ignore[union-attr]
            add(folder)
        except (DataError, ValueError) as error:
            log.warning("%s is damaged; its states are computed anew: %s", prefix, error)
            missing |= members & set(rows)
    names = [key for key in rows if key in missing and key not in places]
    if names:
        chosen = [(splits[rows[key][0]], rows[key][1]) for key in names]
        todo = Pairs(*(ragged([getattr(pairs, side)[row] for pairs, row in chosen]) for side in ("inputs", "labels")))
        trunk = trunk_runner(model, devices, batch_size)
        with Progress("decoder states", total=len(todo), unit="pairs") as progress:
            for batches in in_shards(todo, batch_size):
                folder = write_shard(
                    trunk,
                    todo,
                    names,
                    batches,
                    directory=directory,
                    width=width,
                    precision=precision,
                    progress=progress,
                )
                add(folder)
                if keep:
                    artifacts.publish(keep.store, f"{keep.prefix}/{folder.name}", folder)
    return {split: StatePairs(pairs, shards, [places[key] for key in keys[split]]) for split, pairs in splits.items()}


def pair_keys(pairs: Pairs, like: dict[int, int], vocabulary: int) -> list[bytes]:
    """For each pair 16 bytes that tell its token ids from all others."""
    known = np.arange(vocabulary, dtype="<i4")
    known[list(like)] = list(like.values())
    sides = [Ragged(known[side.values], side.lengths) for side in (pairs.inputs, pairs.labels)]
    keys = []
    for row in range(len(pairs)):
        digest = hashlib.blake2b(digest_size=16)
        for side in sides:
            digest.update(int(side.lengths[row]).to_bytes(4, "little") + side[row].tobytes())
        keys.append(digest.digest())
    return keys


def ragged(sequences: Sequence[np.ndarray]) -> Ragged:
    """Sequences put together."""
    return Ragged(np.concatenate(sequences), np.array([len(sequence) for sequence in sequences]))


def find_stored(keep: Keep, wanted: set[bytes], directory: Path) -> dict[str, set[bytes]]:
    """The complete shards in the store that have any of the wanted pairs, and which each has."""
    found: dict[str, set[bytes]] = {}
    left = set(wanted)
    for entry in keep.store.list(f"{keep.prefix}/"):
        prefix, _, name = entry.key.rpartition("/")
        if name != artifacts.MANIFEST:
            continue
        index = directory / "index"
        try:
            artifacts.fetch(keep.store, prefix, index, wanted=lambda path: path == "pairs.npy")
            members = {key.tobytes() for key in np.load(index / "pairs.npy")["key"]}
        except (DataError, ValueError, OSError) as error:
            log.warning("%s is damaged and left alone: %s", prefix, error)
            continue
        if members & left:
            found[prefix] = members
            left -= members
    return found


def refuse_without_space(directory: Path, targets: dict[bytes, int], missing: set[bytes], size: int) -> None:
    """Say how much disk the states need, `size` bytes a target.

    Raises `RetryableError` when there is less, `SettingsError` when the step may not have as much (a pod is evicted
    for it, however much the node has).
    """
    total, new = size * sum(targets.values()), size * sum(targets[key] for key in missing)
    log.info(
        "decoder states: %s for %s pairs; %s of it for %s pairs that are computed now, the rest is in the store",
        readable(total), f"{len(targets):,}", readable(new), f"{len(missing):,}",
    )  # fmt: skip
    free, allowed = shutil.disk_usage(directory).free, int(os.environ.get(DISK_LIMIT) or 0) or sys.maxsize
    if total > 0.95 * allowed:
        raise SettingsError(
            f"the decoder states need {readable(total)}, and the step may use {readable(allowed)} of disk: raise "
            f"ephemeral-storage and the size of the volume in the pod template, or set training.decoder_states to off"
        )
    if total > 0.95 * free:
        raise RetryableError(
            f"the decoder states need {readable(total)} in {directory}, where {readable(free)} are free: give the step "
            f"more disk (TMPDIR says where), or set training.decoder_states to off"
        )


def readable(size: float) -> str:
    """Bytes as people write them."""
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def in_shards(pairs: Pairs, batch_size: int) -> Iterator[list[np.ndarray]]:
    """All pairs in batches of similar lengths, and those in groups of about `SHARD_TARGETS` targets."""
    group: list[np.ndarray] = []
    for batch in pairs.in_order(batch_size):
        group.append(batch)
        if sum(map(pairs.targets, group)) >= SHARD_TARGETS:
            yield group
            group = []
    if group:
        yield group


Trunk = Callable[[Pairs, np.ndarray], list[np.ndarray]]


def trunk_runner(model: Any, devices: Devices, batch_size: int) -> Trunk:
    """A function that gives, for some rows of pairs, the decoder's states at their targets, a piece a device."""

    def states(batch: Any) -> tf.Tensor:
        return label_states(model, batch, training=False)

    run = devices.compile(states, Pairs.signature)

    def trunk(pairs: Pairs, rows: np.ndarray) -> list[np.ndarray]:
        batches = devices.split(pairs, model, rows, batch_size)
        pieces = devices.results(run(devices.place(batches)))
        return [piece.numpy()[batch.targets != NO_TARGET] for piece, batch in zip(pieces, batches, strict=True)]

    return trunk


def write_shard(
    trunk: Trunk,
    pairs: Pairs,
    names: Sequence[bytes],
    batches: list[np.ndarray],
    *,
    directory: Path,
    width: int,
    precision: str,
    progress: Progress,
) -> Path:
    """Compute the states of some batches and write them as a shard, named by the pairs in it."""
    dtype, rows = STORED_AS[precision], np.concatenate(batches)
    entries = np.empty(len(rows), ENTRY)
    entries["key"] = np.frombuffer(b"".join(names[row] for row in rows), "V16")
    entries["targets"] = pairs.labels.lengths[rows]
    folder = directory / hashlib.sha256(entries.tobytes()).hexdigest()[:32]
    folder.mkdir()
    np.save(folder / "pairs.npy", entries)
    about = {"descr": "<u2", "fortran_order": False, "shape": (int(entries["targets"].sum()), width)}
    with (folder / "states.npy").open("wb") as file:  # not memory-mapped: on a full disk that ends in SIGBUS
        np.lib.format.write_array_header_1_0(file, about)
        for batch in batches:
            for piece in trunk(pairs, batch):
                values = piece.astype(dtype)
                if not np.isfinite(values.astype(np.float32)).all():
                    raise DataError(
                        f"the base model's decoder states do not fit in {dtype}: set training.precision to bfloat16, "
                        f"or training.decoder_states to off"
                    )
                file.write(values.view(np.uint16).tobytes())
            progress.advance(len(batch))
    return folder
