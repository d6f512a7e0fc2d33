"""Alerts reach a real webhook and mail server with the reason and the link, and never fail what they tell of."""

from __future__ import annotations

import asyncio
import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import Connection

from plugins import alerts
from plugins.alerts import Alert, webhook_url
from tasks import registry
from tasks.settings import Operation, Settings, load
from tasks.storage import Store

ROOT = Path(__file__).resolve().parents[2]
RUN = "http://127.0.0.1:8080/dags/retrain_demo/runs/manual__2026-11-24T00%3A00%3A00%2B00%3A00"
EVIL = "{{ 7 * 7 }} <b>not bold</b>"


class Webhook(BaseHTTPRequestHandler):
    """Keeps what is posted."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, json.loads(body)))  # type: ignore[attr-defined]
        self.send_response(self.server.answer)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Mail(socketserver.StreamRequestHandler):
    """As much of SMTP as it takes to be given a mail."""

    def handle(self) -> None:
        self.wfile.write(b"220 ready\r\n")
        while line := self.rfile.readline():
            command = line[:4].upper()
            if command == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                mail = b"".join(iter(self.rfile.readline, b".\r\n"))
                self.server.received.append(mail.decode())  # type: ignore[attr-defined]
            self.wfile.write(b"221 bye\r\n" if command == b"QUIT" else b"250 ok\r\n")
            if command == b"QUIT":
                return


def serving(server: Any) -> Iterator[Any]:
    server.received = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    server.answer = 200
    about = {"conn_type": "http", "host": f"http://127.0.0.1:{server.server_port}/services", "password": "T0/secret"}
    monkeypatch.setenv("AIRFLOW_CONN_CHAT", json.dumps(about))
    yield from serving(server)


@pytest.fixture
def mail(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail)
    server.daemon_threads = True
    extra = {"from_email": "retrain@example.com", "disable_ssl": True, "disable_tls": True}
    about = {"conn_type": "smtp", "host": "127.0.0.1", "port": server.server_address[1], "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", json.dumps(about))
    yield from serving(server)


def settings(**operation: Any) -> Settings:
    demo = load(ROOT / "config" / "demo.yaml")
    both = {"alert_emails": ["team@example.com"], "alert_webhook": "chat"}
    return demo.model_copy(update={"operation": Operation(**{**both, **operation})})


def context(task: str, result: Any = None, **more: Any) -> Any:
    """What Airflow hands to a callback, as far as an alert looks at it."""
    run = {"dag_id": "retrain_demo", "run_id": "manual__2026-11-24T00:00:00+00:00", "task_id": task}
    return {"ti": SimpleNamespace(**run, xcom_pull=lambda task_ids: result), **more}


def test_failure_is_told_with_the_reason_and_the_link(webhook: Any, mail: Any) -> None:
    Alert(settings(), alerts.failed)(context("train", exception=RuntimeError(f"train: the loss became nan {EVIL}")))
    ((path, body),) = webhook.received
    assert path == "/services/T0/secret"
    assert body["text"].startswith("demo: train failed\ntrain: the loss became nan {{ 7 * 7 }} &lt;b&gt;")
    assert body["text"].endswith(RUN)
    (letter,) = mail.received
    assert "Subject: [retrain] demo: train failed" in letter
    assert "To: team@example.com" in letter
    import email

    (part,) = [part for part in email.message_from_string(letter).walk() if part.get_content_type() == "text/html"]
    content = part.get_payload(decode=True).decode()
    assert "the loss became nan {{ 7 * 7 }} &lt;b&gt;not bold" in content
    assert f'<a href="{RUN}">' in content


def test_one_channel_that_fails_does_not_keep_the_other(webhook: Any, mail: Any, caplog: Any) -> None:
    webhook.answer = 500
    Alert(settings(), alerts.failed)(context("train"))
    assert len(mail.received) == 1
    assert "could not be sent by webhook: HTTPStatusError 500" in caplog.text
    assert "secret" not in caplog.text


def test_channel_that_is_not_there_is_no_failure(caplog: Any) -> None:
    Alert(settings(alert_webhook="nowhere", alert_emails=[]), alerts.failed)(context("train"))
    assert "could not be sent by webhook: " in caplog.text


def test_nobody_is_told_where_nobody_is_named(webhook: Any, mail: Any) -> None:
    Alert(settings(alert_emails=[], alert_webhook=None), alerts.failed)(context("train"))
    assert (webhook.received, mail.received) == ([], [])


def published(store: Store, tmp_path: Path, time: str) -> None:
    """A version in production since a time."""
    (tmp_path / "weights").write_text("w")
    registry.publish(store, "demo", "v1", tmp_path, {"version": "v1"})
    event = registry.move(store, "demo", "v1", expected=None, who="somebody", why="first")
    store.put_json(registry.event_key("demo", event.number), {**vars(event), "time": time})


def test_rejection_is_told_with_the_checks_that_failed(webhook: Any, store: Store) -> None:
    Alert(settings(), alerts.refused)(context("reject", {"reasons": ["BLEU is 3.00, below the floor of 30."]}))
    assert "the candidate was rejected\nBLEU is 3.00, below the floor of 30." in webhook.received[0][1]["text"]


def test_no_promotion_for_weeks_is_told_once_it_is_long_ago(webhook: Any, store: Store, tmp_path: Path) -> None:
    alert = Alert(settings(stale_after_weeks=4), alerts.unchanged)
    alert(context("unchanged"))  # nothing was ever promoted
    published(store, tmp_path, "2026-01-05T00:00:00+00:00")
    alert(context("unchanged"))
    ((_, body),) = webhook.received
    assert "demo: nothing has been promoted for weeks\nProduction is v1 since 2026-01-05" in body["text"]


def test_fresh_production_is_nothing_to_tell(webhook: Any, store: Store, tmp_path: Path) -> None:
    from datetime import UTC, datetime, timedelta

    published(store, tmp_path, (datetime.now(UTC) - timedelta(weeks=3)).isoformat())
    Alert(settings(stale_after_weeks=4), alerts.unchanged)(context("unchanged"))
    assert webhook.received == []


def test_drift_is_told_when_it_is_more_than_halfway_to_its_limit(webhook: Any) -> None:
    validation = settings().validation.model_copy(update={"max_length_drift": 0.2})
    alert = Alert(settings().model_copy(update={"validation": validation}), alerts.drifted)
    for result in (None, {"drift": None}, {"drift": {"lengths": 0.05, "trigrams": 0.0}}):
        alert(context("validate", result))
    assert webhook.received == []
    alert(context("validate", {"drift": {"lengths": 0.15}}))
    ((_, body),) = webhook.received
    assert "demo: the data drifts\n" in body["text"]
    assert "lengths 0.150 (at most 0.2)" in body["text"]


def test_late_run_is_told_by_the_triggerer(webhook: Any, mail: Any) -> None:
    alert = alerts.deadline(settings(late_after_hours=2))
    assert alert
    assert alert.interval.total_seconds() == 7200
    run = {"dag_id": "retrain_demo", "dag_run_id": "manual__2026-11-24T00:00:00+00:00", "state": "running"}
    asyncio.run(alerts.tell_late(**json.loads(json.dumps(alert.callback.kwargs)), context={"dag_run": run}))
    assert "has not ended 2 hours after it was queued; it is running." in webhook.received[0][1]["text"]
    assert "Subject: [retrain] demo: a run is late" in mail.received[0]


def test_no_deadline_where_nobody_is_told() -> None:
    assert alerts.deadline(settings(alert_emails=[], alert_webhook=None)) is None


@pytest.mark.parametrize(
    ("connection", "url"),
    [
        ({"host": "https://hooks.slack.com/services", "password": "T/B/x"}, "https://hooks.slack.com/services/T/B/x"),
        ({"host": "chat.example.com", "port": 8443}, "https://chat.example.com:8443"),
        ({"host": "http://127.0.0.1:9/hook"}, "http://127.0.0.1:9/hook"),
    ],
)
def test_address_of_a_webhook(connection: dict[str, Any], url: str) -> None:
    assert webhook_url(Connection(conn_id="chat", conn_type="http", **connection)) == url
