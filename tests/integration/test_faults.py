"""The registry among many writers, kills, bad networks and stores that go away: no fork, no half version, nothing lost.

The counts of docs/reliability.md: `FAULT_ROUNDS=200 FAULT_SCHEDULES=100 FAULT_KILL_EVERY=1 pytest -s` this file.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import bucket_of, free_port, running_store
from faulty_proxy import FAULTS, faulty_proxy
from test_registry import judged

from scripts import object_store
from tasks import promote, registry
from tasks.errors import DataError, RetryableError, SettingsError
from tasks.registry import Event, ProductionMovedError
from tasks.run import Run
from tasks.storage import ConflictError, Store, StoreRefusedError, StoreUnreachableError

MODEL = "m"
WRITERS = 20
ROUNDS = int(os.environ.get("FAULT_ROUNDS", "3"))
SCHEDULES = int(os.environ.get("FAULT_SCHEDULES", "4"))
KILL_EVERY = int(os.environ.get("FAULT_KILL_EVERY", "4"))  # the rest of the calls, where a suite has time for it


def publish(store: Store, folder: Path, version: str, size: int = 1000) -> None:
    directory = folder / version
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "frozen.bin").write_bytes(b"f" * size)
    (directory / "trained.bin").write_text(version)
    registry.publish(store, MODEL, version, directory, {"version": version})


def check(store: Store, folder: Path) -> list[Event]:
    """The history, after a look at whether it is one line, and whether every alias names a version that is whole."""
    events = registry.history(store, MODEL)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    at: dict[str | None, str] = {}
    for event in events:
        if event.action == "move":
            assert event.before == at.get(event.alias)
            at[event.alias] = event.version
    for alias, version in registry.aliases(events).items():
        assert registry.resolve(store, MODEL, alias) == version
        assert pulled(store, folder, alias) == version
    return events


def pulled(store: Store, folder: Path, version: str) -> str:
    """The version that comes when one is asked for; every file was verified."""
    name = registry.pull(store, MODEL, version, folder / "pulled")
    assert (folder / "pulled" / "trained.bin").read_text() == name
    return name


# Many writers


def test_many_writers_promote_and_roll_back_at_once(store: Store, tmp_path: Path) -> None:
    names = [f"{number}" for number in range(6)]
    for name in names:
        publish(store, tmp_path / "made", name)
    outcomes: Counter[str] = Counter()
    won: list[Event] = []
    together, over = threading.Barrier(WRITERS), threading.Event()

    def write(seed: int) -> None:
        dice, mine = random.Random(seed), Store(store.bucket)  # noqa: S311
        for number in range(ROUNDS):
            alias, version = dice.choice(["production", "production", "staging"]), dice.choice(names)
            pointer = registry.read_pointer(mine, MODEL, alias)
            together.wait(300)
            try:
                event = registry.move(
                    mine,
                    MODEL,
                    version,
                    expected=pointer.version if pointer else None,
                    who=f"writer {seed}",
                    why=f"round {number}",
                    alias=alias,
                )
            except ProductionMovedError:
                outcomes["refused: it had moved"] += 1
            else:
                outcomes[
                    "moved" if (event.who, event.why) == (f"writer {seed}", f"round {number}") else "was there already"
                ] += 1
                won.append(event)

    def read() -> None:
        while not over.is_set():
            with contextlib.suppress(DataError):  # before the first promotion there is nothing
                pulled(Store(store.bucket), tmp_path / "reader", "production")
                outcomes["read whole"] += 1

    with ThreadPoolExecutor(WRITERS + 1) as pool:
        reader = pool.submit(read)
        writers = [pool.submit(write, seed) for seed in range(WRITERS)]
        try:
            for writer in writers:
                writer.result()
        finally:
            together.abort()
            over.set()
        reader.result()
    events = check(store, tmp_path)
    assert all(events[event.number - 1] == event for event in won)
    assert {event.number for event in won} == {event.number for event in events}
    assert outcomes["moved"] >= ROUNDS
    print(f"\n{store}: {WRITERS} writers, {ROUNDS} rounds: {len(events)} events; {dict(outcomes)}")


# A promoter that is killed


@pytest.fixture
def promoter(store: Store) -> Iterator[subprocess.Popen[str]]:
    """Promotes a run in a process that is killed after so many requests, and says with which exit code."""
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "dying.py"), store.bucket]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_promoter_is_killed_after_every_storage_call_in_turn(
    store: Store, tmp_path: Path, promoter: subprocess.Popen[str]
) -> None:
    assert promoter.stdin
    assert promoter.stdout
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").write_text("first")
    died, ended = 0, -signal.SIGKILL
    for calls in range(1, 200, KILL_EVERY):
        model = f"m{calls}"
        registry.publish(store, model, "0", tmp_path / "first", {})
        registry.move(store, model, "0", expected=None, who="w", why="y")
        trained = os.urandom(9_000_000 if calls % 8 == 1 else 10)  # large files go in parts
        run = judged(store, tmp_path, f"r{calls}", "promote", "0", model=model, trained=trained)
        print(run.prefix, calls, file=promoter.stdin, flush=True)
        ended = int(promoter.stdout.readline())
        assert ended in {0, -signal.SIGKILL}
        for version in {*registry.versions(store, model), registry.resolve(store, model, "production")}:
            registry.pull(store, model, version, tmp_path / "seen")  # whatever readers see is whole
        version = promote.run(Run(store, run.prefix))["version"]  # as Airflow does
        assert [event.version for event in registry.history(store, model)] == ["0", version]
        stored = registry.stored_pointer(store, model)
        assert stored
        assert (stored.version, stored.event) == (version, 2)
        if ended == 0:
            break
        died += 1
    assert ended == 0
    assert died > 15 / KILL_EVERY
    print(f"\n{store}: killed after {died} calls of {calls}, each {KILL_EVERY}.")


# A bad network


@pytest.mark.parametrize("kind", ["ministack", "minio"])
def test_a_bad_network_leads_to_the_right_end_or_to_a_clean_failure(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: object_store.Server = request.getfixturevalue(kind)
    total: Counter[str] = Counter()

    def schedule(seed: int, store: Store, straight: Store, folder: Path) -> Counter[str]:
        ended: Counter[str] = Counter()

        def until_done(action: Callable[[], object]) -> None:
            for _ in range(20):  # Airflow's retries
                try:
                    action()
                except RetryableError:
                    ended["failed cleanly, and tried again"] += 1
                else:
                    ended["done"] += 1
                    return
            raise AssertionError("twenty tries were not enough")

        def move(version: str, expected: str | None) -> Event:
            return registry.move(store, MODEL, version, expected=expected, who="w", why=version)

        for version in ("1", "2"):
            until_done(lambda version=version: publish(store, folder / "made", version, size=9_000_000))
        until_done(lambda: move("1", None))
        until_done(lambda: move("2", "1"))
        until_done(lambda: pulled(store, folder, "production"))
        until_done(lambda: move("1", "2"))
        until_done(lambda: registry.withdraw(store, MODEL, "2", who="w", why="bad"))
        until_done(lambda: pulled(store, folder, "production"))
        events = check(straight, folder)
        assert [(event.action, event.version) for event in events] == [
            ("move", "1"),
            ("move", "2"),
            ("move", "1"),
            ("withdraw", "2"),
        ]
        assert registry.withdrawn(straight, MODEL) == ["2"]
        assert sorted(path.name for path in folder.iterdir()) == ["made", "pulled"]
        return ended

    with contextlib.ExitStack() as stack:
        work = []
        proxies = []
        for seed in range(SCHEDULES):
            straight = stack.enter_context(bucket_of(server))
            proxy = stack.enter_context(faulty_proxy(server.port, seed))
            monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
            folder = tmp_path / str(seed)
            folder.mkdir()
            work.append((seed, Store(straight.bucket), straight, folder))
            proxies.append(proxy)
        with ThreadPoolExecutor(6) as pool:
            for ended in pool.map(lambda each: schedule(*each), work):
                total += ended
        faults = sum((proxy.counts for proxy in proxies), Counter())
    assert faults["none"] > sum(faults[fault] for fault in FAULTS) > SCHEDULES
    print(f"\n{kind}: {SCHEDULES} schedules: {dict(faults)}; actions: {dict(total)}")


# A store that cannot, or goes away


@pytest.fixture
def careless(ministack: object_store.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store that knows no conditions: a real one, to which they do not get through."""
    headers = frozenset({"if-match", "if-none-match"})
    with bucket_of(ministack) as store, faulty_proxy(ministack.port, rate=0, without_headers=headers) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
        yield Store(store.bucket)


def test_a_store_without_conditional_writes_is_refused_unless_there_is_a_lock(
    careless: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2"):
        publish(careless, tmp_path / "made", version)
    with pytest.raises(SettingsError, match=r"writes whatever the condition \(if_absent\).*RETRAIN_STORE_LOCK"):
        registry.move(careless, MODEL, "1", expected=None, who="w", why="y")
    assert registry.history(careless, MODEL) == []
    monkeypatch.setenv("RETRAIN_STORE_LOCK", str(tmp_path / "nowhere" / "lock"))
    with pytest.raises(SettingsError, match=r"RETRAIN_STORE_LOCK is .*, which cannot be opened"):
        registry.move(careless, MODEL, "1", expected=None, who="w", why="y")
    monkeypatch.setenv("RETRAIN_STORE_LOCK", str(tmp_path / "lock"))
    registry.move(careless, MODEL, "1", expected=None, who="w", why="y")

    def roll(number: int) -> bool:
        try:
            registry.move(Store(careless.bucket), MODEL, "2", expected="1", who=str(number), why="y")
        except ProductionMovedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(roll, range(8)))
    assert [event.version for event in check(careless, tmp_path)] == ["1", "2"]
    with pytest.raises(ConflictError):
        careless.put("k", b"1", if_match='"none"')


@pytest.mark.parametrize("kind", ["ministack", "minio"])
def test_a_store_that_is_killed_during_an_upload_and_started_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "minio" and object_store.find_minio(Path.home() / "go" / "bin") is None:
        pytest.skip("no minio binary in MINIO_BINARY, on PATH or in ~/go/bin")
    server = object_store.server(kind, tmp_path / "data", free_port(), object_store.Credentials.random())

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            server.command,
            env={**os.environ, **server.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        server.wait_until_ready(process)
        return process

    process = start()
    try:
        with bucket_of(server) as store:
            publish(store, tmp_path / "made", "1")
            registry.move(store, MODEL, "1", expected=None, who="w", why="y")
            started = threading.Event()

            class Watched(Store):
                def upload(self, path: Path, key: str, **more: object) -> None:
                    super().upload(path, key, advance=lambda _: started.set())

            with ThreadPoolExecutor(1) as pool:
                upload = pool.submit(publish, Watched(store.bucket), tmp_path / "made", "2", 60_000_000)
                assert started.wait(60)
                process.kill()
                process.wait()
                process = start()
                with contextlib.suppress(StoreUnreachableError):  # or boto3's own retries were enough
                    upload.result()
            assert pulled(store, tmp_path, "production") == "1"
            publish(store, tmp_path / "made", "2", 60_000_000)
            registry.move(store, MODEL, "2", expected="1", who="w", why="y")
            assert [event.version for event in check(store, tmp_path)] == ["1", "2"]
    finally:
        process.kill()
        process.wait()


# Disks that are full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Leave not a byte free; the file that does it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    return filler


def test_a_pull_whose_disk_fills_up_leaves_the_model_and_goes_on_later(
    store: Store, tmp_path: Path, small_disk: Path
) -> None:
    publish(store, tmp_path / "made", "1")
    publish(store, tmp_path / "made", "2", size=40_000_000)
    publish(store, tmp_path / "made", "3", size=70_000_000)
    model = small_disk / "model"
    registry.pull(store, MODEL, "1", model)
    with pytest.raises(RetryableError, match=r"has [\d,]+ bytes left and 70,000,001 are needed: make room"):
        registry.pull(store, MODEL, "3", model)
    filler: list[Path] = []

    def arrived(_: int) -> None:  # somebody else takes what was free when the pull began
        if not filler:
            filler.append(fill(small_disk))

    with pytest.raises(RetryableError, match=f"the disk of {small_disk} is full: make room"):
        registry.pull(store, MODEL, "2", model, advance=arrived)
    assert (model / "trained.bin").read_text() == "1"
    filler[0].unlink()
    registry.pull(store, MODEL, "2", model)
    assert (model / "trained.bin").read_text() == "2"
    assert [path.name for path in small_disk.iterdir()] == ["model"]


def test_a_store_whose_disk_is_full_refuses_and_keeps_what_it_has(tmp_path: Path, small_disk: Path) -> None:
    """Not on MiniStack, which then keeps in memory what it cannot write."""
    if object_store.find_minio(Path.home() / "go" / "bin") is None:
        pytest.skip("no minio binary in MINIO_BINARY, on PATH or in ~/go/bin")
    with running_store("minio", small_disk) as server, bucket_of(server) as store:
        publish(store, tmp_path / "made", "1")
        registry.move(store, MODEL, "1", expected=None, who="w", why="y")
        (small_disk / "filler").write_bytes(bytes(40_000_000))
        with pytest.raises(StoreUnreachableError, match="its disk is full"):
            publish(store, tmp_path / "made", "2", size=30_000_000)
        assert registry.versions(store, MODEL) == ["1"]
        assert pulled(store, tmp_path, "production") == "1"
        (small_disk / "filler").unlink()
        for wait in (1, 2, 4, 8):  # as Airflow's retries: it looks at its disk now and then
            with contextlib.suppress(StoreUnreachableError):
                publish(store, tmp_path / "made", "2", size=30_000_000)
                break
            time.sleep(wait)
        registry.move(store, MODEL, "2", expected="1", who="w", why="y")
        assert [event.version for event in check(store, tmp_path)] == ["1", "2"]


def test_a_clock_that_is_wrong_is_said(minio: object_store.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on MiniStack, which does not look at the time of a request."""
    import botocore.auth

    now = botocore.auth.get_current_datetime
    with bucket_of(minio) as store:
        from datetime import timedelta

        monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *args: now(*args) + timedelta(hours=1))
        with pytest.raises(StoreRefusedError, match="clock and the store's are too far apart: set the clock"):
            store.put("k", b"1")
