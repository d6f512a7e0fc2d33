"""Pull a version of 1 GB, verified, beside `aws s3 cp --recursive` of the same files without verification.

    AWS=path/to/aws MINIO_BINARY=path/to/minio python -m benchmarks.pull

Also what the second of two weekly versions costs, when nine tenths of a model are frozen. The alternatives take turns.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from scripts import object_store
from tasks import artifacts, registry
from tasks.storage import Store

SIZES = {"model-00001.safetensors": 890_000_000, "model-00002.safetensors": 99_000_000, "tokenizer.json": 2_400_000}
TURNS = 3


def main() -> None:
    """Print megabytes a second for each turn, and the ratio of the medians."""
    with tempfile.TemporaryDirectory() as folder:
        server = object_store.server("minio", Path(folder) / "store", 9199, object_store.Credentials.random())
        process = subprocess.Popen(
            server.command,
            env={**os.environ, **server.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        try:
            server.wait_until_ready(process)
            os.environ.update(server.client_environment, AWS_DEFAULT_REGION="us-east-1")
            measure(Path(folder))
        finally:
            process.kill()
            process.wait()


def measure(folder: Path) -> None:
    """Publish two versions, then pull."""
    store = Store("benchmark")
    store.create_bucket()
    directory = folder / "model"
    directory.mkdir()
    for name, size in SIZES.items():
        with (directory / name).open("wb") as file:
            for _ in range(size // 1_000_000):
                file.write(os.urandom(1_000_000))
    total = sum(path.stat().st_size for path in directory.iterdir())
    artifacts.publish(store, "plain", directory)
    registry.publish(store, "m", "1", directory, {})
    with (directory / "model-00002.safetensors").open("r+b") as file:
        file.write(os.urandom(1_000_000))
    kept = {entry.key for entry in store.list("models/m/files/")}
    registry.publish(store, "m", "2", directory, {})
    sent = sum(entry.size for entry in store.list("models/m/files/") if entry.key not in kept)
    print(f"the second version uploads {sent / 1e6:.0f} MB of {total / 1e6:.0f} MB ({sent / total:.1%})")
    aws = [os.environ.get("AWS", "aws"), "--endpoint-url", os.environ["S3_ENDPOINT_URL"], "s3", "cp", "--recursive"]
    rates: dict[str, list[float]] = {"pull": [], "aws s3 cp": []}
    for _ in range(TURNS):
        for name, seconds in rates.items():
            target = folder / "target"
            started = time.monotonic()
            if name == "pull":
                registry.pull(store, "m", "1", target)
            else:
                subprocess.run([*aws, "--only-show-errors", "s3://benchmark/plain/", str(target)], check=True)
            seconds.append(total / 1e6 / (time.monotonic() - started))
            shutil.rmtree(target)
    for name, each in rates.items():
        print(f"{name}: {', '.join(f'{rate:.0f}' for rate in each)} MB/s")
    medians = {name: statistics.median(each) for name, each in rates.items()}
    print(f"pull with verification / aws s3 cp without: {medians['pull'] / medians['aws s3 cp']:.2f}")


if __name__ == "__main__":
    main()
