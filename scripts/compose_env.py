"""Write `.env`, from which docker-compose.yaml takes its passwords and keys: random ones, readable by their owner only.

python -m scripts.compose_env
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

from scripts import airflow_settings, object_store
from scripts.stack import ROOT, write_private


def main(path: Path = ROOT / ".env") -> int:
    """Write the file, unless there is one: the data in the volumes was written under its passwords."""
    if path.exists():
        print(f"{path.name} is there already, and was left as it is.")
        return 0
    airflow = airflow_settings.new_secrets()
    root, pipeline, reader = (object_store.Credentials.random() for _ in range(3))
    variables = {
        "AIRFLOW_PASSWORD": airflow["password"],
        "AIRFLOW_FERNET_KEY": airflow["fernet"],
        "AIRFLOW_SECRET_KEY": airflow["session"],
        "AIRFLOW_JWT_SECRET": airflow["jwt"],
        "POSTGRES_PASSWORD": secrets.token_urlsafe(24),
        "COMPOSE_PROFILES": "object-store",
        "MINIO_ROOT_USER": root.access_key,
        "MINIO_ROOT_PASSWORD": root.secret_key,
        "AWS_ACCESS_KEY_ID": pipeline.access_key,
        "AWS_SECRET_ACCESS_KEY": pipeline.secret_key,
        "READER_ACCESS_KEY_ID": reader.access_key,
        "READER_SECRET_ACCESS_KEY": reader.secret_key,
    }
    write_private(path, "".join(f"{name}={value}\n" for name, value in variables.items()))
    print(f"{path.name} is written. Next: docker compose up --build")
    return 0


if __name__ == "__main__":
    sys.exit(main())
