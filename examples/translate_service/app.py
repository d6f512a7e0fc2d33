"""A service that translates with the production model, and follows it without dropping a request.

    MODEL=demo RETRAIN_BUCKET=retrain uvicorn examples.translate_service.app:app --port 8090
    curl localhost:8090/translate -H 'Content-Type: application/json' -d '{"sentences": ["Good morning."]}'

It pulls at the start, and again whenever production moves. A new model first has to translate the self-test's
sentences; only then do new requests go to it, while those under way end with the old one. One that fails is left alone,
and the old one stays. Settings come from the environment: MODEL, ALIAS (production), MODELS (a directory),
POLL_SECONDS (30).
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

import retrain_models
from examples.translate_service.engine import CTRANSLATE2, Translate, load

log = logging.getLogger("translate_service")

SELF_TEST = ["Where is the laptop?", "My sister did not buy tomatoes this week."]
WAITING = 16  # requests that may wait for the model; more are told to come back


@dataclass(frozen=True)
class Serving:
    """A model that has passed its self-test."""

    version: str
    since: float
    metrics: dict[str, Any]
    engine: str
    translate: Translate


class Service:
    """The model that serves, and the thread that follows production."""

    def __init__(self) -> None:
        self.model = os.environ.get("MODEL", "demo")
        self.alias = os.environ.get("ALIAS", retrain_models.PRODUCTION)
        self.folder = Path(os.environ.get("MODELS", "models")) / self.model
        self.seconds = float(os.environ.get("POLL_SECONDS", "30"))
        self.serving: Serving | None = None
        self.counts: Counter[str] = Counter()
        self.slots = threading.BoundedSemaphore(WAITING)

    def follow(self) -> None:
        """Serve what production is, for ever."""
        while True:
            try:
                for version in retrain_models.watch(self.model, self.alias, seconds=self.seconds):
                    self.swap(version)
            except retrain_models.StepError as error:
                log.error("%s of %s cannot be followed, trying again: %s", self.alias, self.model, error)  # noqa: TRY400
                self.counts["watch_failures"] += 1
            time.sleep(self.seconds)

    def swap(self, version: str) -> None:
        """Serve a version from now on, if it passes; otherwise go on as before."""
        try:
            serving = self.prepare(version)
        except Exception:
            stays = f"{self.serving.version} stays" if self.serving else "there is no other"
            log.exception("%s %s is not served; %s", self.model, version, stays)
            self.counts["models_refused"] += 1
            return
        before, self.serving = self.serving, serving
        self.counts["models_served"] += 1
        log.info("%s %s is served, with %s", self.model, version, serving.engine)
        for directory in self.folder.iterdir():
            if directory.name not in {version, before and before.version}:
                shutil.rmtree(directory)

    def prepare(self, version: str) -> Serving:
        """Pull, load and try a version. Raises when it is not fit to serve."""
        now = [self.folder / self.serving.version] if self.serving else []
        pulled = retrain_models.pull(self.model, version, self.folder / version, int8=CTRANSLATE2, reuse=now)
        about = pulled.manifest.metadata
        engine, translate = load(pulled.directory, about)
        outputs = translate(SELF_TEST)
        if len(outputs) != len(SELF_TEST) or not all(output.strip() for output in outputs):
            raise ValueError(f"the self-test gave {outputs}")
        return Serving(version, time.time(), about.get("metrics", {}), engine, translate)


service = Service()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Follow production as long as the application runs."""
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    threading.Thread(target=service.follow, daemon=True).start()
    yield


app = FastAPI(title="Translation", lifespan=lifespan)
Sentence = Annotated[str, Field(min_length=1, max_length=2000)]


class Request(BaseModel):
    """What to translate."""

    sentences: list[Sentence] = Field(min_length=1, max_length=64)


class Answer(BaseModel):
    """The translations, in the order of the sentences, and the version that made them."""

    translations: list[str]
    version: str


def current() -> Serving:
    """The model that serves. Answers 503 while there is none yet."""
    if service.serving is None:
        raise HTTPException(503, f"no model of {service.model} has been loaded yet", {"Retry-After": "5"})
    return service.serving


@app.post("/translate")
def translate(request: Request) -> Answer:
    """Translate a batch. A request ends with the model with which it began."""
    serving = current()
    if not service.slots.acquire(blocking=False):
        service.counts["requests_turned_away"] += 1
        raise HTTPException(503, "too many requests are waiting", {"Retry-After": "1"})
    started = time.monotonic()
    try:
        translations = serving.translate(request.sentences)
    finally:
        service.slots.release()
    service.counts["requests"] += 1
    service.counts["sentences"] += len(translations)
    service.counts["milliseconds"] += round(1000 * (time.monotonic() - started))
    return Answer(translations=translations, version=serving.version)


@app.get("/health")
def health() -> dict[str, str]:
    """200 when requests can be answered, for a load balancer's probe."""
    return {"status": "ok", "version": current().version}


@app.get("/version")
def version() -> dict[str, Any]:
    """Which version serves, since when, with which engine, and how it was judged."""
    serving = current()
    fields = {name: getattr(serving, name) for name in ("version", "since", "engine", "metrics")}
    return {"model": service.model, **fields}


@app.get("/metrics", response_class=PlainTextResponse)
def metrics() -> str:
    """Counters in Prometheus' text format."""
    names = ["requests", "sentences", "milliseconds", "requests_turned_away", "models_served", "models_refused"]
    lines = [f"translate_{name}_total {service.counts[name]}" for name in [*names, "watch_failures"]]
    if service.serving:
        lines.append(f'translate_model_info{{version="{service.serving.version}"}} 1')
    return "\n".join(lines) + "\n"
