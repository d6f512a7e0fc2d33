"""The pages behind Models in Airflow's navigation, written on the server from what the object store has.

    /                                  every model that the user may see, and what is in production
    /DAG_ID                            one model: production, versions, their scores, the history; roll back, retrain
    /DAG_ID/versions/VERSION           one version: the gate's checks, settings, files
    /DAG_ID/compare?old=..&new=..      two versions: scores, settings, and the sentences that they translate differently
    /DAG_ID/runs/RUN/report, docs, tensorboard, version     what a run left
    /DAG_ID/runs/RUN/files/PATH        the files of those pages

Who may see a page is what Airflow says of the DAG: reading needs the right to read it, and the buttons, which appear
with the right to trigger it, send the browser's own request to Airflow's REST API, which checks and records it.
Nothing is loaded from elsewhere; no script runs but `pages/models.js`; what the store has is text here, never markup.
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.core_api.security import GetUserDep, get_user, requires_access_dag
from airflow.models.dag import DagModel
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException as StarletteHTTPException

from plugins.pipelines import bucket, dag_id, read_pipelines
from plugins.store_connection import use_store_connection
from tasks import registry
from tasks.artifacts import Manifest, is_plain
from tasks.errors import DataError, StepError
from tasks.run import Run
from tasks.settings import Settings
from tasks.storage import MissingObjectError, Store, StoreRefusedError, StoreUnreachableError

PAGES = Path(__file__).parent / "pages"
SHOWN = 50  # versions, and events of the history, on a page; the newest
SENTENCES = 30  # in a comparison
AT_ONCE = 8  # reads from the store
SPLITS = ("train", "validation", "test")
SUMMARY = "summary"  # the first page about the data; the others have the names of Great Expectations' suites
# What a run leaves for people, and all that these pages show of it.
FILES, FOLDERS = ("report.html", "validation/index.html"), ("validation/docs/", "tensorboard/")

# A page, and a file that a run left: with Great Expectations' pages may come scripts and addresses, which stay dead.
PAGE_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)
FILE_POLICY = (
    "sandbox allow-same-origin; default-src 'none'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
TEMPLATES = Environment(
    loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)

Name = Annotated[str, PathParameter(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,249}$")]
Version = Annotated[str, Query(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,249}$")]

app = FastAPI(openapi_url=None)
REQUIRED = [Depends(requires_access_dag("GET")), Depends(use_store_connection)]
everyone = APIRouter(dependencies=REQUIRED)
readers = APIRouter(prefix="/{dag_id}", dependencies=REQUIRED)


# The pages


@everyone.get("/")
def index(request: Request, user: GetUserDep) -> Response:
    """Every model that the user may see."""
    readable = get_auth_manager().get_authorized_dag_ids(user=user, method="GET")
    pipelines = [each for each in read_pipelines()[0].values() if dag_id(each.name) in readable]
    store = Store(bucket())
    events = at_once(lambda each: production(store, each.name), pipelines)
    models = [
        {"name": each.name, "description": each.description, "dag_id": dag_id(each.name), "production": event}
        for each, event in zip(pipelines, events, strict=True)
    ]
    return page(request, "index.html.j2", models=models)


@readers.get("")
def model(request: Request, dag_id: Name, user: GetUserDep) -> Response:
    """One model."""
    settings, store = pipeline(dag_id), Store(bucket())
    name = settings.name
    versions = registry.versions(store, name)[-SHOWN:]
    manifests = dict(zip(versions, at_once(lambda each: registry.manifest(store, name, each), versions), strict=True))
    history = registry.history(store, name)
    checks = at_once(lambda each: checks_of(store, manifests[each]), versions)
    order = {event.version: event.number for event in reversed(history)}  # when it first came, where that is known
    rows = [version_row(each, manifests[each], found) for each, found in zip(versions, checks, strict=True)]
    rows.sort(key=lambda row: order.get(row["version"], 0))
    rollback = dag_id.replace("retrain_", "rollback_", 1)
    return page(
        request,
        "model.html.j2",
        settings=settings,
        dag_id=dag_id,
        rollback=rollback,
        production=production(store, name),
        rows=list(reversed(rows)),
        withdrawn=set(registry.withdrawn(store, name)),
        trend=trend(rows),
        history=list(reversed(history))[:SHOWN],
        may_retrain=may_trigger(user, dag_id),
        may_roll_back=may_trigger(user, rollback),
        paused=is_paused(dag_id),
    )


@readers.get("/versions/{version}")
def one_version(request: Request, dag_id: Name, version: Name) -> Response:
    """One version."""
    settings, store = pipeline(dag_id), Store(bucket())
    manifest = registry.manifest(store, settings.name, version)
    return page(
        request,
        "version.html.j2",
        settings=settings,
        dag_id=dag_id,
        version=version,
        manifest=manifest,
        checks=checks_of(store, manifest),
        moves=[event for event in registry.history(store, settings.name) if event.version == version],
        lineage=flat(manifest.metadata.get("lineage") or {}),
    )


@readers.get("/compare")
def compare(request: Request, dag_id: Name, old: Version, new: Version) -> Response:
    """Two versions, and where they differ."""
    settings, store = pipeline(dag_id), Store(bucket())
    manifests = [registry.manifest(store, settings.name, each) for each in (old, new)]
    sentences, why_not = differing_sentences(store, *manifests)
    return page(
        request,
        "compare.html.j2",
        settings=settings,
        dag_id=dag_id,
        old=old,
        new=new,
        rows=[version_row(each, found) for each, found in zip((old, new), manifests, strict=True)],
        differences=differing_values(*manifests),
        sentences=sentences,
        why_not=why_not,
    )


@readers.get("/runs/{run}/version")
def version_of_run(request: Request, dag_id: Name, run: Name) -> Response:
    """The version that a run has promoted."""
    promoted = found_run(dag_id, run).find_result("promote")
    if promoted is None:
        raise HTTPException(404, f"{run} has promoted no version.")
    return RedirectResponse(f"{root(request)}/{dag_id}/versions/{promoted['version']}", 303)


@readers.get("/runs/{run}/tensorboard")
def tensorboard(request: Request, dag_id: Name, run: Name) -> Response:
    """What training wrote for TensorBoard."""
    found = found_run(dag_id, run)
    folder = found.key("tensorboard/")
    files = [
        {"path": entry.key.removeprefix(f"{found.prefix}/"), "size": entry.size} for entry in found.store.list(folder)
    ]
    return page(request, "tensorboard.html.j2", dag_id=dag_id, run=found, files=files, settings=pipeline(dag_id))


@readers.get("/runs/{run}/report")
def report(request: Request, dag_id: Name, run: Name) -> Response:
    """The report, below this site's own head."""
    found = found_run(dag_id, run)
    if not found.store.exists(found.key("report.html")):
        raise HTTPException(404, f"{run} has left no report: it may not have come so far.")
    return framed(request, dag_id, found, title="Report", path="report.html")


@readers.get("/runs/{run}/docs")
def data_docs(request: Request, dag_id: Name, run: Name, shown: str = SUMMARY) -> Response:
    """What validation found, first in short, then split by split as Great Expectations' Data Docs show it."""
    found = found_run(dag_id, run)
    keys = (entry.key for entry in found.store.list(found.key("validation/docs/validations/")))
    paths = [key.removeprefix(f"{found.prefix}/") for key in keys if key.endswith(".html")]
    suites = {path.split("/")[3]: path for path in paths}  # validation/docs/validations/SUITE/...; the newest
    pages = {SUMMARY: "validation/index.html", **{name: suites[name] for name in sorted(suites, key=place_of_suite)}}
    if not found.store.exists(found.key(pages[SUMMARY])):
        raise HTTPException(404, f"{run} has left no Data Docs: it may not have come so far.")
    shown = shown if shown in pages else SUMMARY
    tabs = {name: name == shown for name in pages}
    return framed(request, dag_id, found, title="Data Docs", path=pages[shown], tabs=tabs)


def place_of_suite(name: str) -> tuple[int, str]:
    """Where a suite stands among the others: its split's place, then its name."""
    places = [place for place, split in enumerate(SPLITS) if name.startswith(split)]
    return (min(places, default=len(SPLITS)), name)


def framed(
    request: Request, dag_id: str, run: Run, *, title: str, path: str, tabs: dict[str, bool] | None = None
) -> Response:
    """A page that a run left, below this site's own head."""
    settings = pipeline(dag_id)
    return page(
        request,
        "framed.html.j2",
        settings=settings,
        dag_id=dag_id,
        run=run,
        title=title,
        path=path,
        tabs=tabs or {},
    )


@readers.get("/runs/{run}/files/{path:path}")
def file(request: Request, dag_id: Name, run: Name, path: str) -> Response:
    """A file that a run left for people."""
    if not is_plain(path) or not (path in FILES or path.startswith(FOLDERS)):
        raise HTTPException(404, "There is no such page.")
    found = found_run(dag_id, run)
    content = found.store.get(found.key(path))
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    headers = {"Content-Security-Policy": FILE_POLICY}
    if kind == "text/html":
        kind = "text/html; charset=utf-8"
        if path.startswith("validation/docs/"):
            looks = f'<link rel="stylesheet" href="{root(request)}/static/docs.css"></head>'
            content = content.replace(b"</head>", looks.encode(), 1)
    elif path.startswith("tensorboard/"):
        headers["Content-Disposition"] = "attachment"
    return Response(content, media_type=kind, headers=headers)


STATIC = {each.name: each for each in PAGES.iterdir() if each.suffix in {".css", ".js", ".svg"}}


@app.get("/static/{name}", dependencies=[Depends(get_user)])
def static(name: str) -> Response:
    """The pages' style and script."""
    if name not in STATIC:
        raise HTTPException(404, "There is no such page.")
    kind = mimetypes.guess_type(name)[0]
    return Response(STATIC[name].read_bytes(), media_type=kind, headers={"Cache-Control": "private, max-age=300"})


app.include_router(everyone)
app.include_router(readers)


# What every answer has, and what goes wrong


@app.middleware("http")
async def careful_headers(request: Request, call_next: Callable[[Request], Any]) -> Response:
    """Keep every answer to itself."""
    response: Response = await call_next(request)
    response.headers.setdefault("Content-Security-Policy", PAGE_POLICY)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


@app.exception_handler(StarletteHTTPException)
def refuse(request: Request, error: StarletteHTTPException) -> Response:
    """Say what is wrong with the request."""
    titles = {401: "You are not logged in", 403: "You may not see this", 404: "Not found"}
    said = {401: "Log in to Airflow, then look again.", 403: "Ask for the right to read this DAG in Airflow."}
    title = titles.get(error.status_code, "That did not work")
    return failure(request, error.status_code, title, said.get(error.status_code, str(error.detail)))


@app.exception_handler(RequestValidationError)
def refuse_malformed(request: Request, _: RequestValidationError) -> Response:
    """Nothing has such a name."""
    return failure(request, 404, "Not found", "Names have letters, digits, dots, dashes and underscores only.")


@app.exception_handler(StepError)
def explain(request: Request, error: StepError) -> Response:
    """Say what is wrong with the store or what is in it."""
    if isinstance(error, StoreUnreachableError | StoreRefusedError):
        return failure(request, 503, "The object store does not answer", f"{error}. Airflow itself is not affected.")
    if isinstance(error, MissingObjectError | DataError):
        return failure(request, 404, "Not found", str(error))
    return failure(request, 500, "That did not work", str(error))


def failure(request: Request, status: int, title: str, reason: str) -> Response:
    """The page of an error."""
    return page(request, "failure.html.j2", status_code=status, title=title, reason=reason)


def page(request: Request, template: str, *, status_code: int = 200, **about: Any) -> Response:
    """A page of this site."""
    html = TEMPLATES.get_template(template).render(root=root(request), airflow=airflow(request), **about)
    return Response(html, status_code, media_type="text/html; charset=utf-8")


def root(request: Request) -> str:
    """Where this site begins, as a path of the server."""
    return request.scope.get("root_path", "").rstrip("/")


def airflow(request: Request) -> str:
    """Where Airflow's UI begins, as a path of the server."""
    return root(request).rsplit("/", 1)[0]


# What the pages show


def pipeline(wanted: str) -> Settings:
    """The pipeline of a DAG."""
    for settings in read_pipelines()[0].values():
        if dag_id(settings.name) == wanted:
            return settings
    raise HTTPException(404, f"{wanted} is not the DAG of a pipeline.")


def found_run(wanted: str, run: str) -> Run:
    """A run, if it is one of that pipeline: who may read one DAG may not read another's runs."""
    found = Run(Store(bucket()), f"runs/{run}")
    known = found.store.exists(found.key("config.json"))
    if not known or found.config.get("settings", {}).get("name") != pipeline(wanted).name:
        raise HTTPException(404, f"{wanted} has no run {run}.")
    return found


def production(store: Store, name: str) -> registry.Event | None:
    """What put the model into production that is there."""
    pointer = registry.read_pointer(store, name)
    return registry.read_event(store, name, pointer.event) if pointer else None


def may_trigger(user: Any, wanted: str) -> bool:
    """Whether Airflow would let the user start the DAG."""
    return get_auth_manager().is_authorized_dag(
        method="POST", access_entity=DagAccessEntity.RUN, details=DagDetails(id=wanted), user=user
    )


def is_paused(wanted: str) -> bool:
    """Whether a DAG is switched off, so that its runs would wait."""
    found = DagModel.get_current(wanted)
    return bool(found and found.is_paused)


def version_row(version: str, manifest: Manifest, checks: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """What a list says of a version."""
    metrics = manifest.metadata.get("metrics") or {}
    return {
        "version": version,
        "run": manifest.metadata.get("run"),
        "bleu": metrics.get("candidate"),
        "against": metrics.get("champion"),
        "checks": len(checks),
        "passed": sum(check["passed"] for check in checks),
        "size": manifest.size,
    }


def trend(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The plot of BLEU over versions, in units of an SVG of 600 by 160; None where there is nothing to draw."""
    scored = [row for row in rows if isinstance(row["bleu"], int | float)]
    if not scored:
        return None
    values = [value for row in scored for value in (row["bleu"], row["against"]) if isinstance(value, int | float)]
    low, high = min(values), max(values)
    low, high = (low - 1, high + 1) if high - low < 2 else (low, high)

    def place(index: int, value: float) -> tuple[float, float]:
        across = 50 + 520 * (index / (len(scored) - 1) if len(scored) > 1 else 0.5)
        return round(across, 1), round(140 - 120 * (value - low) / (high - low), 1)

    points = [
        {
            "version": row["version"],
            "at": place(i, row["bleu"]),
            "bleu": row["bleu"],
            "against": place(i, row["against"]) if isinstance(row["against"], int | float) else None,
            "against_bleu": row["against"],
        }
        for i, row in enumerate(scored)
    ]
    return {"points": points, "low": low, "high": high, "line": " ".join("{},{}".format(*p["at"]) for p in points)}


def checks_of(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """What the gate found when the version was made; nothing where its run is no longer in the store."""
    run = manifest.metadata.get("run")
    if not isinstance(run, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", run):
        return []
    return (Run(store, f"runs/{run}").find_result("gate") or {}).get("checks", [])


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as one list: `{"training.epochs": 3}`."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    pairs = [flat(inner, f"{name}.{key}".lstrip(".")) for key, inner in value.items()]
    return {key: inner for pair in pairs for key, inner in pair.items()}


def differing_values(old: Manifest, new: Manifest) -> list[tuple[str, Any, Any]]:
    """What the manifests say differently of where two versions come from."""
    before, after = (flat(each.metadata.get("lineage") or {}) for each in (old, new))
    names = [*after, *(name for name in before if name not in after)]
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


def differing_sentences(store: Store, old: Manifest, new: Manifest) -> tuple[list[dict[str, Any]], str]:
    """The test sentences that two versions translate most differently, or why they cannot be shown."""
    try:
        import pandas as pd  # noqa: PLC0415  (half a second, and only this page needs it)

        from tasks.report import mark_words  # noqa: PLC0415
    except ImportError:  # Airflow's own image has only what Airflow needs
        return [], "To show them, Airflow's API server needs pandas, pyarrow and matplotlib."

    tables = []
    with TemporaryDirectory() as scratch:
        for number, manifest in enumerate((old, new)):
            path = Path(scratch) / f"{number}.parquet"
            run = str(manifest.metadata.get("run"))
            if not re.fullmatch(r"[A-Za-z0-9._-]+", run):
                return [], "One of the versions was not made by a run."
            try:
                store.download(f"runs/{run}/evaluation/translations.parquet", path)
                tables.append(pd.read_parquet(path, columns=["source", "reference", "candidate"]))
            except (MissingObjectError, ValueError, OSError):
                return [], f"The translations of {run} are no longer in the store."
    both = tables[0].merge(tables[1], on=["source", "reference"], suffixes=("_old", "_new")).drop_duplicates()
    if both.empty:
        return [], "The versions were not tested on the same sentences."
    differing = both[both["candidate_old"] != both["candidate_new"]]
    if differing.empty:
        return [], f"They translate all {len(both):,} test sentences that they have in common alike."
    return [
        {
            "source": row["source"],
            "reference": row["reference"],
            "old": mark_words(row["candidate_old"], row["candidate_new"]),
            "new": mark_words(row["candidate_new"], row["candidate_old"]),
        }
        for row in differing.head(SENTENCES).to_dict("records")
    ], f"{len(differing):,} of {len(both):,} test sentences differ" + (
        f"; the first {SENTENCES} are shown." if len(differing) > SENTENCES else "."
    )


def at_once(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """The results of work that waits for the store, several at once, in order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(work, items))
