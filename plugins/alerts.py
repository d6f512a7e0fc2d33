"""Tells people what they have to know: a run failed, was refused, is late; the data drifts; nothing has been promoted.

One message with the reason and the link, to the addresses (Airflow connection `smtp_default`) and the webhook (an HTTP
connection) that a pipeline's settings name under `operation`. A webhook gets `{"text": ...}`, which Slack, Mattermost
and their like understand. What to do about each: docs/operations.md.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx
from airflow.providers.smtp.notifications.smtp import SmtpNotifier
from airflow.sdk import BaseHook, BaseNotifier, Connection, Context
from airflow.sdk.configuration import conf
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference

from plugins.pipelines import bucket
from plugins.store_connection import use_store_connection
from tasks.settings import Operation, Settings

log = logging.getLogger(__name__)
PATIENCE = 10.0  # seconds that a webhook may take
# Failures are logged without a traceback (TRY400): the address of a webhook is a secret.


@dataclass(frozen=True)
class Message:
    """What to tell: one line, the reason in sentences, and where to look."""

    subject: str
    reason: str
    link: str


class Alert(BaseNotifier):
    """Sends a message to a pipeline's channels. Each is tried, and a failure is no more than a line in the log.

    :param settings: the pipeline's settings
    :param describe: makes the message from the task's context, or None when there is nothing to tell
    """

    def __init__(self, settings: Settings, describe: Callable[[Settings, Context], Message | None]) -> None:
        super().__init__()
        self.settings = settings
        self.describe = describe

    def notify(self, context: Context) -> None:
        """Send the message, where a task or its callback runs."""
        to = self.settings.operation
        message = self.describe(self.settings, context) if to.alert_webhook or to.alert_emails else None
        if message and to.alert_webhook:
            try:
                url = webhook_url(BaseHook.get_connection(to.alert_webhook))
                httpx.post(url, json=webhook_body(message), timeout=PATIENCE).raise_for_status()
            except Exception as error:
                log.error("The alert %r could not be sent by webhook: %s", message.subject, kind_of(error))  # noqa: TRY400
        if message and to.alert_emails:
            try:
                # Not called but asked to notify: a call would take what the data says for a template.
                email(message, to.alert_emails).notify(context)
            except Exception as error:
                log.error("The alert %r could not be sent by e-mail: %s", message.subject, error)  # noqa: TRY400


def failed(settings: Settings, context: Context) -> Message:
    """A task failed for good."""
    task = context["ti"].task_id
    reason = str(context.get("exception") or "Airflow lost the task")
    return Message(f"{settings.name}: {task} failed", reason, run_link(context))


def refused(settings: Settings, context: Context) -> Message:
    """A candidate was rejected."""
    result = context["ti"].xcom_pull(task_ids="reject") or {}
    reasons = " ".join(result.get("reasons") or [])
    return Message(f"{settings.name}: the candidate was rejected", f"{reasons}{stale(settings)}", run_link(context))


def unchanged(settings: Settings, context: Context) -> Message | None:
    """Nothing has changed since production, which is worth a message only when that is long ago."""
    reason = stale(settings)
    return (
        Message(f"{settings.name}: nothing has been promoted for weeks", reason, run_link(context)) if reason else None
    )


def drifted(settings: Settings, context: Context) -> Message | None:
    """The data passed validation, and has come more than halfway to a limit beyond which it will not."""
    distances = (context["ti"].xcom_pull(task_ids="validate") or {}).get("drift") or {}
    limits = {name: limit for name, limit in settings.validation.drift_limits.items() if limit}
    far = {name: value for name, value in distances.items() if name in limits and value > limits[name] / 2}
    if not far:
        return None
    said = ", ".join(f"{name} {value:.3f} (at most {limits[name]:g})" for name, value in far.items())
    reason = f"Its distance from the data that production was trained on: {said}."
    return Message(f"{settings.name}: the data drifts", reason, run_link(context))


def stale(settings: Settings) -> str:
    """A sentence about production when it is older than the settings allow, else nothing."""
    from tasks import registry  # noqa: PLC0415  (brings boto3)
    from tasks.storage import Store  # noqa: PLC0415

    use_store_connection()
    store = Store(bucket())
    pointer = registry.read_pointer(store, settings.name)
    if pointer is None:
        return ""
    since = datetime.fromisoformat(registry.read_event(store, settings.name, pointer.event).time)
    age = datetime.now(UTC) - since
    if age < timedelta(weeks=settings.operation.stale_after_weeks):
        return ""
    return f" Production is {pointer.version} since {since:%Y-%m-%d}, which is {age.days // 7} weeks ago."


def deadline(settings: Settings) -> DeadlineAlert | None:
    """Airflow's deadline for a run, counted from when it was queued, where there is anybody to tell."""
    operation = settings.operation
    if not (operation.alert_emails or operation.alert_webhook):
        return None
    return DeadlineAlert(
        name=f"{settings.name} is late",
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=operation.late_after_hours),
        callback=AsyncCallback(
            "plugins.alerts.tell_late",
            {"pipeline": settings.name, "hours": operation.late_after_hours, "operation": operation.model_dump()},
        ),
    )


async def tell_late(pipeline: str, hours: float, operation: dict[str, Any], context: dict[str, Any]) -> None:
    """Say that a run is late. Awaited by the triggerer, with the run as the REST API shows it."""
    run = context["dag_run"]
    message = Message(
        f"{pipeline}: a run is late",
        f"{run['dag_run_id']} has not ended {hours:g} hours after it was queued; it is {run['state']}.",
        ui_link(run["dag_id"], run["dag_run_id"]),
    )
    to = Operation.model_validate(operation)
    if to.alert_webhook:
        try:
            url = webhook_url(await BaseHook.aget_connection(to.alert_webhook))
            async with httpx.AsyncClient(timeout=PATIENCE) as client:
                (await client.post(url, json=webhook_body(message))).raise_for_status()
        except Exception as error:
            log.error("The alert %r could not be sent by webhook: %s", message.subject, kind_of(error))  # noqa: TRY400
    if to.alert_emails:
        try:
            await email(message, to.alert_emails).async_notify({})
        except Exception as error:
            log.error("The alert %r could not be sent by e-mail: %s", message.subject, error)  # noqa: TRY400


def email(message: Message, to: list[str]) -> SmtpNotifier:
    """The message as an e-mail; everything in it is text."""
    reason, link = html.escape(message.reason), html.escape(message.link)
    return SmtpNotifier(
        to=to, subject=f"[retrain] {message.subject}", html_content=f'<p>{reason}</p><p><a href="{link}">{link}</a></p>'
    )


def webhook_url(connection: Connection) -> str:
    """A connection's address: its host and, as the end of the path, its password, which Airflow keeps secret.

    For Slack: host `https://hooks.slack.com/services`, password `T000/B000/XXXX`.
    """
    host = connection.host or ""
    address = host if "://" in host else f"https://{host}"
    port = f":{connection.port}" if connection.port else ""
    return "/".join(filter(None, [f"{address.rstrip('/')}{port}", (connection.password or "").lstrip("/")]))


def webhook_body(message: Message) -> dict[str, str]:
    """The message as a chat shows it; `&`, `<` and `>` mean something there."""
    text = f"{message.subject}\n{message.reason.strip()}"
    return {"text": f"{html.escape(text, quote=False)}\n{message.link}"}


def kind_of(error: Exception) -> str:
    """What went wrong with a webhook, without its address, in which there is a secret."""
    response = getattr(error, "response", None)
    return f"{type(error).__name__}{f' {response.status_code}' if response is not None else ''}"


def run_link(context: Context) -> str:
    """The run in Airflow's UI."""
    return ui_link(context["ti"].dag_id, context["ti"].run_id)


def ui_link(dag_id: str, run_id: str) -> str:
    """A run's address in Airflow's UI."""
    base = conf.get("api", "base_url", fallback="").rstrip("/")
    return f"{base}/dags/{quote(dag_id)}/runs/{quote(run_id)}"
