"""One run of a pipeline, as its steps see it: settings to read, results to leave.

runs/RUN_ID/config.json          the settings in effect, written first, by `configure`
runs/RUN_ID/results/STEP.json    what each step found, written last, by the step
runs/RUN_ID/failures/STEP.json   why a step failed, the last time that it did
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from tasks.errors import DataError, SettingsError, StepError
from tasks.settings import Settings, explain
from tasks.storage import MissingObjectError, Store, split_uri


@dataclass
class Run:
    """A run's place in the object store: `s3://BUCKET/runs/RUN_ID`."""

    store: Store
    prefix: str
    _results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def at(cls, uri: str) -> Run:
        """The run at a URI. Raises `SettingsError` when it is not `s3://BUCKET/runs/RUN_ID`."""
        store, key = split_uri(uri)
        folder, _, run_id = key.partition("/")
        if folder != "runs" or not run_id or "/" in run_id:
            raise SettingsError(f"--run {uri!r}: expected s3://BUCKET/runs/RUN_ID")
        return cls(store, key)

    @property
    def id(self) -> str:
        """The run's identifier."""
        return self.prefix.rsplit("/", 1)[-1]

    @property
    def uri(self) -> str:
        """Where the run is."""
        return f"s3://{self.store.bucket}/{self.prefix}"

    def key(self, *parts: str) -> str:
        """The key of something that belongs to this run."""
        return "/".join([self.prefix, *parts])

    @cached_property
    def config(self) -> dict[str, Any]:
        """What `configure` wrote: `settings`, `created`, `code_version`, `requested`."""
        try:
            return self.store.get_json(self.key("config.json"))
        except MissingObjectError:
            raise SettingsError(f"{self.uri} has no config.json: run the configure step first") from None

    @cached_property
    def settings(self) -> Settings:
        """The settings in effect, validated again: the file may be older than this code."""
        try:
            return Settings.model_validate(self.config["settings"])
        except ValidationError as error:
            raise SettingsError(f"{self.uri}/config.json does not fit this version: {explain(error)}") from error

    def result(self, step: str) -> dict[str, Any]:
        """What an earlier step found. Raises `DataError` when it has not ended."""
        found = self.find_result(step)
        if found is None:
            raise DataError(f"{self.uri} has no result of the {step} step: run it first")
        return found

    def find_result(self, step: str) -> dict[str, Any] | None:
        """What a step found, or None when it has not ended."""
        if step not in self._results:
            try:
                self._results[step] = self.store.get_json(self.key("results", f"{step}.json"))
            except MissingObjectError:
                return None
        return self._results[step]

    def save_result(self, step: str, result: dict[str, Any]) -> None:
        """Record that a step has ended, and with what."""
        self.store.put_json(self.key("results", f"{step}.json"), result)
        self._results[step] = result

    def save_failure(self, step: str, error: BaseException) -> None:
        """Record why a step failed, for the report."""
        reason = " ".join(str(error).split()).encode("utf-8", "replace").decode() or type(error).__name__
        kind = "" if isinstance(error, StepError) else f"{type(error).__name__}: "
        self.store.put_json(
            self.key("failures", f"{step}.json"),
            {"reason": f"{kind}{reason}"[:4096], "time": datetime.now(UTC).isoformat(timespec="seconds")},
        )

    def find_failure(self, step: str) -> dict[str, Any] | None:
        """Why a step failed, or None when it never did."""
        try:
            return self.store.get_json(self.key("failures", f"{step}.json"))
        except MissingObjectError:
            return None
