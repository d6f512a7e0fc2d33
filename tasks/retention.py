"""What is deleted, and when.

    python -m tasks models prune en-es --keep 10 --dry-run    # versions, and files that no version has
    python -m tasks prune-runs --days 30 --dry-run            # checkpoints and candidates of old runs

Versions   the newest N stay, and whatever an alias stands for or one of the last N moves of an alias names. The others
           cease to exist by an event of the history; their files stay for another day, for those who are pulling them.
Files      of a model that no version names, and uploads that nobody finished, go when they are a day old.
Runs       lose their checkpoints and candidates; what explains a run (settings, results, scores, report) stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from retrain_models.artifacts import MANIFEST, read_manifest
from tasks import registry
from tasks.registry import EXPIRED
from tasks.storage import Store, StoredObject, in_parallel

DAY = timedelta(days=1)
HEAVY = ("checkpoints/", "candidate/")  # of a run


@dataclass
class Plan:
    """What there is to delete."""

    versions: list[str] = field(default_factory=list)
    objects: list[StoredObject] = field(default_factory=list)
    uploads: list[tuple[StoredObject, Callable[[], None]]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """The objects together, in bytes."""
        return sum(entry.size for entry in self.objects)


def plan_versions(store: Store, model: str, keep: int, now: datetime | None = None) -> Plan:
    """What a model can do without. `keep` is the number of versions, and of moves, that count as recent."""
    yesterday = (now or datetime.now(UTC)) - DAY
    uploaded = list(store.list(f"{registry.files_prefix(model)}/"))  # before the manifests: a newer one is not in it
    events = registry.history(store, model)
    moves = [event for event in events if event.action == "move"]
    named = {name for event in moves[-keep:] for name in (event.version, event.before)}
    named |= set(registry.aliases(events).values())
    entries = list(store.list(f"models/{model}/versions/"))
    manifests = sorted((entry for entry in entries if entry.key.endswith(f"/{MANIFEST}")), key=lambda e: e.modified)
    names = [entry.key.split("/")[-2] for entry in manifests]
    tombs = [entry for entry in entries if entry.key.endswith(f"/{EXPIRED}")]
    living = [entry.key for entry in [*manifests, *(tomb for tomb in tombs if tomb.modified > yesterday)]]
    needed = {sha for shas in in_parallel(lambda key: _files(store, key), living) for sha in shas}
    return Plan(
        versions=[name for name in names[:-keep] if name not in named],
        objects=[e for e in uploaded if e.modified < yesterday and e.key.rpartition("/")[2] not in needed],
        uploads=[upload for upload in store.unfinished_uploads(f"models/{model}/") if upload[0].modified < yesterday],
    )


def plan_runs(store: Store, days: int, now: datetime | None = None) -> Plan:
    """The heavy files of runs that are older than some days, the manifests before the files that they name."""
    limit = (now or datetime.now(UTC)) - timedelta(days=days)
    old = [entry for entry in store.list("runs/") if entry.modified < limit and _is_heavy(entry.key)]
    uploads = [upload for upload in store.unfinished_uploads("runs/") if upload[0].modified < limit]
    return Plan(objects=sorted(old, key=lambda entry: not entry.key.endswith(MANIFEST)), uploads=uploads)


def carry_out(store: Store, plan: Plan, *, model: str = "", who: str = "", why: str = "") -> None:
    """Delete what a plan names. Safe to repeat; what was interrupted is in the next plan."""
    for version in plan.versions:
        registry.expire(store, model, version, who=who, why=why)
    manifests = [entry for entry in plan.objects if entry.key.endswith(f"/{MANIFEST}")]
    for entries in (manifests, [entry for entry in plan.objects if entry not in manifests]):
        in_parallel(lambda entry: store.delete(entry.key), entries)
    in_parallel(lambda upload: upload[1](), plan.uploads)


def _files(store: Store, key: str) -> list[str]:
    prefix, _, name = key.rpartition("/")
    return [file.sha256 for file in read_manifest(store, prefix, manifest_name=name).files]


def _is_heavy(key: str) -> bool:
    return key.split("/", 2)[-1].startswith(HEAVY)
