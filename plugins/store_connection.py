"""The object store's address and key from an Airflow connection, instead of from the environment.

`RETRAIN_STORE_CONN_ID` names the connection, wherever Airflow runs. Its type is Amazon Web Services: login and password
are the key; `extra` may have `endpoint_url`, `region_name`, `aws_session_token`, `profile_name` and `verify`, a CA
bundle's path. What it leaves out, the environment says. Pods have their Secret.
"""

from __future__ import annotations

import os

from airflow.sdk import BaseHook, Connection
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException

from tasks.errors import SettingsError

EXTRAS = {
    "endpoint_url": "S3_ENDPOINT_URL",
    "region_name": "AWS_REGION",
    "aws_session_token": "AWS_SESSION_TOKEN",
    "profile_name": "AWS_PROFILE",
    "verify": "AWS_CA_BUNDLE",
}


class StoreConnectionError(AirflowFailException, SettingsError):
    """The connection to the store is not there, or says what cannot be done. Never retried."""


def use_store_connection() -> None:
    """Let this process, and those that it starts, reach the store as the connection says, if one is named.

    Raises `StoreConnectionError`.
    """
    name = os.environ.get("RETRAIN_STORE_CONN_ID")
    if not name:
        return
    try:
        connection = BaseHook.get_connection(name)
    except AirflowNotFoundException as error:
        raise StoreConnectionError(f"RETRAIN_STORE_CONN_ID is {name!r}, and there is no such connection") from error
    os.environ.update(environment_of(connection))


def environment_of(connection: Connection) -> dict[str, str]:
    """What a connection says, as the variables that boto3 and `retrain_models.storage` read."""
    extra = connection.extra_dejson
    said = {variable: extra.get(name) for name, variable in EXTRAS.items()}
    said |= {"AWS_ACCESS_KEY_ID": connection.login, "AWS_SECRET_ACCESS_KEY": connection.password}
    for variable, value in said.items():
        if value is not None and not isinstance(value, str):
            raise StoreConnectionError(
                f"the connection {connection.conn_id!r} has {value!r} where text for {variable} was expected"
            )
    return {variable: value for variable, value in said.items() if value}
