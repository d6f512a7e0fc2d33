"""How Airflow is set up on this machine, for the local stack and for the tests. A cluster's is in its Helm values.

An environment, not an airflow.cfg: it is complete, visible in one place, and follows the repository when it is moved.
"""

from __future__ import annotations

import base64
import secrets
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
ADMIN = "admin"


def new_secrets() -> dict[str, str]:
    """Keys that Airflow's components share, and the password of its UI."""
    return {
        "jwt": secrets.token_urlsafe(48),
        "session": secrets.token_urlsafe(48),
        "fernet": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "password": secrets.token_urlsafe(12),
    }


def environment(home: Path, keys: dict[str, str], *, port: int, bucket: str) -> dict[str, str]:
    """The environment of every Airflow component with its data in `home`."""
    url = f"http://{HOST}:{port}"
    return {
        "AIRFLOW_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "RETRAIN_RUNNER": "local",
        "RETRAIN_BUCKET": bucket,
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",  # each is a process that waits; the default is 32
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        # The default asks the name server for this machine's full name, and waits for it when there is no network.
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "socket.gethostname",
        "AIRFLOW__CORE__FERNET_KEY": keys["fernet"],
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{ADMIN}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__SECRET_KEY": keys["session"],
        "AIRFLOW__API_AUTH__JWT_SECRET": keys["jwt"],
        # Nothing waits for its turn here, so the scheduler need not be gentle.
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.3",
        "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
    }


# Not `airflow standalone`, which is these four: it opens log servers on every interface, and prints the password.
COMPONENTS = {
    "api-server": ["api-server"],
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
}
