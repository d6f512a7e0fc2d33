"""Airflow as people use it: the real components on loopback, and a real browser.

One story, told in order: somebody triggers a run with the form, approves the candidate, looks at the report and the
Data Docs, has a harmful setting refused, rolls back, presses Retrain and does not answer, and finds out what a reader
may not do.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil
import pytest
import yaml
from playwright.sync_api import Browser, FrameLocator, Page, expect, sync_playwright

from plugins.models_page import PREFIX
from plugins.pipelines import run_id
from scripts import airflow_settings
from scripts.airflow_api import AirflowApi
from scripts.demo import HARMFUL, OFFLINE
from scripts.stack import ALL, STORE, Stack, environment
from tasks import registry
from tasks.__main__ import STEPS
from tasks.run import Run
from tasks.storage import Store
from tests.conftest import free_port
from tests.integration.test_alerts import Webhook, serving

ROOT = Path(__file__).resolve().parents[2]
DAG, MODEL, SEED = "retrain_demo", "demo", "2026-01-01-seed"
HASTY = {"approval_hours": 0.002, "late_after_hours": 0.001, "alert_webhook": "chat"}  # seven seconds, and four
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>document.title = 'owned'</script>"
PATIENCE = 600.0  # seconds that a run may take on a busy machine

expect.set_options(timeout=60_000)  # a busy machine is no failure
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium (Debian: apt-get install chromium)")


@dataclass
class Site:
    """The running stack, and what the story has made so far."""

    stack: Stack
    passwords: dict[str, str]
    webhook: Any
    promoted: str = ""  # Airflow's id of the run that was promoted

    @property
    def url(self) -> str:
        return self.stack.url

    @property
    def api(self) -> AirflowApi:
        return self.stack.api()

    def store(self) -> Store:
        return Store(self.stack.bucket)

    def run(self, model: str, dag_run: str) -> Run:
        """What a run has in the store."""
        return Run.at(f"s3://{self.stack.bucket}/runs/{run_id(model, dag_run)}")

    def get(self, path: str, user: str | None = "admin") -> httpx.Response:
        """What the server answers to a user, or to nobody."""
        headers = {}
        if user:
            login = {"username": user, "password": self.passwords[user]}
            token = httpx.post(f"{self.url}/auth/token", json=login, trust_env=False).json()["access_token"]
            headers = {"authorization": f"Bearer {token}"}
        return httpx.get(self.url + path, headers=headers, trust_env=False, timeout=60)

    def until(self, condition: Any, what: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE:g} s"
            time.sleep(0.5)
        return found

    def runs(self, dag: str) -> list[str]:
        """The ids of a DAG's runs, in order."""
        runs = self.get(f"/api/v2/dags/{dag}/dagRuns?order_by=run_after").json()["dag_runs"]
        return [run["dag_run_id"] for run in runs]

    def finished(self, dag: str, run: str) -> str:
        """How a run has ended."""
        self.until(lambda: self.api.run_state(dag, run) in ("success", "failed"), f"the end of {run}")
        return self.api.run_state(dag, run)

    def followers(self) -> list[dict[str, str]]:
        """What the DAG that follows a promotion has tried, once for each of its runs, when they have ended."""
        dag = "on_promotion"
        runs = self.runs(dag)
        assert {self.finished(dag, run) for run in runs} <= {"success"}
        paths = [f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/smoke_test/xcomEntries/return_value" for run in runs]
        return [self.get(path).json()["value"] for path in paths]

    def audited(self, dag: str, event: str) -> list[str]:
        """Who did something to a DAG, by Airflow's audit log."""
        log = self.get(f"/api/v2/eventLogs?dag_id={dag}&event={event}").json()["event_logs"]
        return [entry["owner"] for entry in log]

    def waits_or_has_ended(self, run: str) -> bool:
        """Whether a run waits for a person, or never will."""
        ended = self.api.run_state(DAG, run) in ("success", "failed")
        return ended or self.states(run).get("approval") == "awaiting_input"

    def states(self, run: str) -> dict[str, str | None]:
        return {name: task["state"] for name, task in self.api.task_instances(DAG, run).items()}


@pytest.fixture(scope="module")
def webhook() -> Iterator[Any]:
    """Where alerts go."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    server.answer = 200
    yield from serving(server)


@pytest.fixture(scope="module")
def site(webhook: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Airflow with two small pipelines in which a person has to approve, and a version in production to start from."""
    config = tmp_path_factory.mktemp("config")
    write_pipeline(config, MODEL)
    write_pipeline(config, "hasty", **HASTY)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RETRAIN_AIRFLOW_PORT", "RETRAIN_STORE_PORT"):
            patch.setenv(name, str(free_port()))
        patch.setenv("RETRAIN_CONFIG", str(config))
        stack = Stack(tmp_path_factory.mktemp("stack"))
        chat = {"conn_type": "http", "host": f"http://127.0.0.1:{webhook.server_port}"}
        extra = {
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{airflow_settings.ADMIN}:admin,reader:viewer",
            "AIRFLOW_CONN_CHAT": json.dumps(chat),
            "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "1",  # and so of how long a person may wait
        }
        stack.up(print, {**OFFLINE, **extra})
        try:
            with environment(stack.environment):
                site = Site(stack, json.loads(stack.password_file.read_text()), webhook)
                seed(site.store())
                dags = [DAG, "rollback_demo", "retrain_hasty", "on_promotion"]
                site.until(lambda: all(map(site.api.find_dag, dags)), "reading the DAG files")
                for dag in (DAG, "on_promotion"):
                    site.api.pause(dag, False)
                yield site
        finally:
            stack.down()


def write_pipeline(folder: Path, name: str, **operation: Any) -> None:
    """The demo's pipeline, smaller, under another name, and with a person's approval."""
    content = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text())
    content |= {"name": name, "approval": "human", "operation": operation}
    content["data"] |= {"max_train_rows": 1200, "max_eval_rows": 120}
    content["training"]["epochs"] = 1
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def seed(store: Store) -> None:
    """A first version: the base model, made by a person with markup in every pocket."""
    settings = {"note": EVIL, "preprocessing": {"prompt": "translate English to Spanish: "}}
    about = {
        "metrics": {"candidate": 50.0, "champion": 49.0},
        "lineage": {"inputs": "other", "settings": settings},
    }
    base = ROOT / "examples" / "demo" / "base-model"
    registry.publish(store, MODEL, SEED, base, {"version": SEED, "run": "seed", **about})
    registry.move(store, MODEL, SEED, expected=None, who=f"engineer {EVIL}", why=f"to begin with {EVIL}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """A browser in which the admin has logged in."""
    page = log_in(browser, site, airflow_settings.ADMIN)
    yield page
    page.context.close()


def log_in(browser: Browser, site: Site, user: str) -> Page:
    page = browser.new_context(viewport={"width": 1280, "height": 1100}).new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{site.url}/auth/login")
    page.locator("input[name=username]").fill(user)
    page.locator("input[name=password]").fill(site.passwords[user])
    page.locator("button[type=submit]").click()
    page.wait_for_url(lambda url: "/auth/" not in url)
    return page


def models(page: Page, site: Site, path: str = "") -> FrameLocator:
    """The Models page, inside Airflow's UI."""
    page.goto(f"{site.url}/plugin/models{PREFIX}/{path}")
    return page.frame_locator("iframe[title=Models]")


# Before anything: nobody sees anything


def every_page(run: str = "seed") -> list[str]:
    """An address of each kind of page, so that a new kind cannot be forgotten."""
    from plugins.models_app import app

    values = {"dag_id": DAG, "version": SEED, "run": run, "path": "report.html", "name": "models.css"}
    addresses = {re.sub(r"{(\w+)(:\w+)?}", lambda m: values[m[1]], route.path) for route in app.routes}
    assert len(addresses) >= 8
    return [f"{PREFIX}{address}" for address in sorted(addresses)]


def test_nobody_sees_anything_without_a_session(site: Site) -> None:
    for address in every_page():
        answer = site.get(f"{address}?old={SEED}&new={SEED}", user=None)
        assert answer.status_code in (401, 403), address
        assert SEED not in answer.text.replace(address, "")


def test_nothing_listens_beyond_this_machine(site: Site) -> None:
    parts = [site.stack._background.find(name) for name in ALL]
    ours = {process.pid for part in parts if part for process in (part, *part.children(recursive=True))}
    # All of the machine's, because a process that parses a file is gone before it can be asked for its own.
    sockets = [each for each in psutil.net_connections("inet") if each.pid in ours]
    listening = {each.laddr for each in sockets if each.status == psutil.CONN_LISTEN}
    assert [address for address in listening if not ip_address(address.ip).is_loopback] == []
    assert {site.stack.ports["airflow"], site.stack.ports["store"]} <= {address.port for address in listening}


# The story


def test_run_is_triggered_with_the_form_and_waits_for_a_person(page: Page, site: Site) -> None:
    page.goto(f"{site.url}/dags/{DAG}")
    page.get_by_role("button", name="Trigger").first.click()
    form = page.locator("[role=dialog][aria-modal=true]")
    form.get_by_role("button", name="Run", exact=True).click()
    expect(
        form.get_by_text("Quick check").or_(form.get_by_text("Full: as the pipeline's file says")).first
    ).to_be_visible()
    form.get_by_role("button", name="Training", exact=True).click()
    form.get_by_label("Epochs").fill("2")
    form.get_by_role("button", name="Trigger", exact=True).last.click()
    (site.promoted,) = site.until(lambda: site.api.unfinished_runs(DAG), "the run")
    site.until(lambda: site.waits_or_has_ended(site.promoted), "the wait for a person")
    assert site.states(site.promoted)["approval"] == "awaiting_input"
    run = site.run(MODEL, site.promoted)
    assert run.settings.training.epochs == 2
    assert run.config["requested"] == {"training.epochs": 2}


def test_person_sees_the_gates_table_and_approves(page: Page, site: Site) -> None:
    page.goto(f"{site.url}/dags/{DAG}/runs/{site.promoted}/tasks/approval/required_actions")
    expect(page.get_by_text("Shall this candidate be demo in production?").first).to_be_visible()
    expect(page.get_by_role("cell", name="BLEU", exact=True)).to_be_visible()
    expect(page.get_by_role("link", name="The report", exact=True)).to_be_visible()
    page.get_by_role("button", name="Approve").click()
    assert site.finished(DAG, site.promoted) == "success"
    ends = site.states(site.promoted)
    assert {name for name, state in ends.items() if state == "skipped"} == {"unchanged", "reject"}
    run = site.run(MODEL, site.promoted)
    assert run.result("approval") == {"summary": "approved by admin", "approved": True, "by": "admin"}


def test_log_of_each_step_begins_with_what_it_will_do_and_ends_with_what_it_did(site: Site) -> None:
    ran = [name for name, state in site.states(site.promoted).items() if state == "success" and name in STEPS]
    assert len(ran) == len(STEPS) - 1  # all but `reject`
    for name in ran:
        lines = [line[9:] for line in site.api.log(DAG, site.promoted, name, 1) if re.match(r"\d\d:\d\d:\d\d ", line)]
        assert lines[0].startswith(f"{name}: {STEPS[name]} ("), name
        assert re.match(rf"{name}: done in [\d.]+ s: \w", lines[-1]), name
    said = {"changed": "changed: is there anything new to train on? pull found 1,", "approval": "approved by admin"}
    said["decision"] = "decision: where does the gate's verdict lead? It is promote: all "
    for name, words in said.items():
        assert words in "\n".join(site.api.log(DAG, site.promoted, name, 1))


def test_what_follows_a_promotion_has_pulled_and_tried_the_new_version(site: Site) -> None:
    version = registry.read_pointer(site.store(), MODEL).version  # type: ignore[union-attr]
    site.until(site.followers, "the run that follows the promotion")
    assert site.followers() == [{MODEL: version}]


def test_what_airflow_keeps_of_a_run_is_small_and_links_to_the_pages(page: Page, site: Site) -> None:
    base = f"/api/v2/dags/{DAG}/dagRuns/{site.promoted}/taskInstances"
    names = {"report": "Report", "validate": "Data Docs", "promote": "Model version", "train": "TensorBoard data"}
    for task, name in names.items():
        assert len(site.get(f"{base}/{task}/xcomEntries/return_value").content) < 10_000
        page.goto(f"{site.url}/dags/{DAG}/runs/{site.promoted}/tasks/{task}/details")
        link = page.get_by_role("link", name=name, exact=True).first
        expect(link).to_be_visible()
        link.click()
        frame = page.frame_locator("iframe[title=Models]")
        expect(frame.locator("nav")).to_contain_text("demo")
        expect(frame.get_by_role("heading", name="Not found")).to_have_count(0)


def test_models_page_shows_production_and_the_pages_of_its_run(page: Page, site: Site) -> None:
    version = registry.read_pointer(site.store(), MODEL).version  # type: ignore[union-attr]
    page.goto(site.url)
    page.get_by_role("link", name="Models").click()
    frame = page.frame_locator("iframe[title=Models]")
    expect(frame.get_by_text(version)).to_be_visible()
    frame.get_by_text(MODEL, exact=True).first.click()
    expect(frame.locator(".large")).to_have_text(version)
    expect(frame.locator("svg.trend circle").first).to_be_visible()
    row = frame.locator("tr", has_text=version).first
    expect(row).to_contain_text(re.compile(r"✓ (\d+) of \1"))
    row.get_by_role("link", name="Report").click()
    report = frame.frame_locator("iframe")
    expect(report.get_by_role("heading", name="Promoted")).to_be_visible()
    report.get_by_role("link", name="What was expected and found").click()
    expect(report.get_by_role("heading", name="The data is fit for training")).to_be_visible()
    frame.get_by_role("link", name="Data Docs").click()
    expect(report.get_by_role("heading", name="The data is fit for training")).to_be_visible()
    frame.get_by_role("link", name="train, pair by pair").click()
    expect(report.get_by_text("Evaluated Expectations").first).to_be_visible()


def test_what_a_run_left_is_light_or_dark_as_airflow_is_whatever_the_system_is(page: Page, site: Site) -> None:
    for theme, paper in {"dark": "rgb(18, 22, 29)", "light": "rgb(255, 255, 255)"}.items():
        page.evaluate("theme => localStorage.setItem('theme', theme)", theme)
        for name in ("report", "docs"):
            frame = models(page, site, f"{DAG}/runs/{run_id(MODEL, site.promoted)}/{name}")
            expect(frame.frame_locator("iframe").locator("body")).to_have_css("background-color", paper)


def test_sentences_that_differ_are_text_whatever_is_in_them(page: Page, site: Site) -> None:
    """What a run wrote about the first version has a script in every translation, and one in the reasons."""
    store = site.store()
    run = site.run(MODEL, site.promoted)
    key, path = run.key("evaluation", "translations.parquet"), site.stack.folder / "translations.parquet"
    store.download(key, path)
    pd.read_parquet(path).assign(candidate=f"Hola {EVIL}").to_parquet(path)
    store.upload(path, "runs/seed/evaluation/translations.parquet")
    version = registry.read_pointer(store, MODEL).version  # type: ignore[union-attr]
    frame = models(page, site, f"{DAG}/compare?old={SEED}&new={version}")
    expect(frame.locator(".sentence").first).to_contain_text(EVIL)
    expect(frame.locator(".sentence mark").first).to_be_visible()
    for path in (DAG, f"{DAG}/versions/{SEED}", f"{DAG}/compare?old={SEED}&new={version}"):
        answer = site.get(f"{PREFIX}/{path}")
        assert answer.status_code == 200
        assert EVIL not in answer.text
        assert "&lt;script&gt;" in answer.text
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        page.goto(f"{site.url}{PREFIX}/{path}")
        assert page.title() != "owned"


def test_harmful_setting_is_rejected_and_the_grid_says_so(page: Page, site: Site) -> None:
    before = registry.read_pointer(site.store(), MODEL)
    run = site.api.trigger(DAG, HARMFUL)
    assert site.finished(DAG, run) == "success"
    ends = site.states(run)
    assert (ends["reject"], ends["promote"], ends["approval"]) == ("success", "skipped", "skipped")
    assert registry.read_pointer(site.store(), MODEL) == before
    frame = models(page, site, f"{DAG}/runs/{run_id(MODEL, run)}/report")
    expect(frame.frame_locator("iframe").get_by_role("heading", name="Rejected")).to_be_visible()
    assert len(site.followers()) == 1


def test_decision_that_is_cleared_is_made_again_and_comes_to_the_same(site: Site) -> None:
    """The tasks that are no steps; the steps themselves: `test_dag.py`."""
    before = registry.read_pointer(site.store(), MODEL)
    (run,) = (run for run in site.runs(DAG) if run != site.promoted)
    for task in ("changed", "decision"):
        again = {"dag_run_id": run, "task_ids": [task], "include_downstream": task == "decision", "only_failed": False}
        site.api._ask("POST", f"/api/v2/dags/{DAG}/clearTaskInstances", json={"dry_run": False, **again})
        assert site.finished(DAG, run) == "success"
        ends = site.api.task_instances(DAG, run)
        assert (ends[task]["state"], ends[task]["try_number"]) == ("success", 2)
        assert (ends["reject"]["state"], ends["promote"]["state"]) == ("success", "skipped")
    assert registry.read_pointer(site.store(), MODEL) == before


def test_rollback_with_a_reason_moves_production(page: Page, site: Site) -> None:
    frame = models(page, site, DAG)
    frame.locator("select[name=version]").select_option(SEED)
    frame.locator("input[name=reason]").fill("it insults customers")
    frame.get_by_role("button", name="Move production").click()
    page.wait_for_url(re.compile(r"/dags/rollback_demo/runs/"))
    (run,) = site.runs("rollback_demo")
    assert site.finished("rollback_demo", run) == "success"
    frame = models(page, site, DAG)
    expect(frame.locator(".large")).to_have_text(SEED)
    expect(frame.get_by_role("cell", name="it insults customers")).to_be_visible()
    event = registry.history(site.store(), MODEL)[-1]
    assert (event.version, event.who, event.why) == (SEED, "admin", "it insults customers")
    assert site.audited("rollback_demo", "trigger_dag_run") == ["admin"]
    extra = site.get("/api/v2/assets/events?source_dag_id=rollback_demo").json()["asset_events"][0]["extra"]
    assert extra["version"] == SEED


def test_what_follows_a_rollback_has_tried_the_old_version(site: Site) -> None:
    site.until(lambda: len(site.followers()) == 2, "the run that follows the rollback")
    assert site.followers()[-1] == {MODEL: SEED}


# What must not work


def test_reader_may_look_and_not_touch(browser: Browser, site: Site) -> None:
    page = log_in(browser, site, "reader")
    frame = models(page, site, DAG)
    expect(frame.get_by_role("heading", name="Versions")).to_be_visible()
    assert frame.locator("form[data-trigger]").count() == 0
    answer = page.request.post(
        f"{site.url}/api/v2/dags/rollback_demo/dagRuns",
        data={"logical_date": None, "conf": {"version": SEED, "reason": "because"}},
    )
    assert answer.status == 403
    page.context.close()


@pytest.mark.parametrize(
    "path",
    [
        "nonsense",
        "retrain_nonsense",
        f"{DAG}/versions/nonsense",
        f"{DAG}/versions/..%2F..%2Fproduction.json",
        f"{DAG}/versions/%3Cscript%3E",
        f"{DAG}/compare?old=..%2F..&new={SEED}",
        f"{DAG}/compare",
        f"{DAG}/runs/nonsense/report",
        f"{DAG}/runs/seed/version",
        f"{DAG}/runs/..%2Fmodels/report",
        f"{DAG}/runs/seed/files/config.json",
        f"{DAG}/runs/seed/files/validation/quarantine.parquet",
        f"{DAG}/runs/seed/files/validation/docs/..%2F..%2Fconfig.json",
        f"{DAG}/runs/seed/files/..%2F..%2Fmodels%2Fdemo%2Fproduction.json",
        "static/..%2Fmodels_app.py",
    ],
)
def test_malformed_and_unknown_names_are_not_found(path: str, site: Site) -> None:
    answer = site.get(f"{PREFIX}/{path}")
    assert answer.status_code == 404
    assert "<script>" not in answer.text
    assert "Traceback" not in answer.text


def test_store_that_is_down_is_said_and_airflow_stays_up(page: Page, site: Site) -> None:
    site.stack.down([STORE])
    try:
        frame = models(page, site)
        expect(frame.get_by_role("heading", name="The object store does not answer")).to_be_visible(timeout=120_000)
        assert site.get(f"{PREFIX}/{DAG}").status_code == 503
        assert site.api.unhealthy() == []
    finally:
        site.stack.up(print, OFFLINE)
    assert site.get(f"{PREFIX}/{DAG}").status_code == 200
