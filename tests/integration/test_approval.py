"""A person between gate and production: what an answer leads to, and what no answer does."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from plugins.approval import APPROVE, REJECT, Approval, checks_table
from tasks import promote, reject, report
from tasks.errors import DataError
from tasks.run import Run
from tasks.settings import Settings
from tasks.storage import Store

CHECK = {"name": "BLEU", "observed": 31.0, "required": ">= 30", "passed": True, "sentence": "BLEU is 31."}


@pytest.fixture
def run(store: Store) -> Run:
    """A run that the gate let through, in a pipeline in which a person decides."""
    settings = Settings.model_validate(
        {
            **{"name": "demo", "description": "d", "approval": "human"},
            **{"data": {"source": "s"}, "base_model": {"source": "b"}, "preprocessing": {"prompt": "p"}},
        }
    )
    run = Run.at(f"s3://{store.bucket}/runs/r")
    store.put_json(run.key("config.json"), {"settings": settings.model_dump(mode="json"), "created": "2026-11-24"})
    verdict = {"decision": "promote", "champion_version": None, "checks": [CHECK], "summary": "s", "seconds": 1}
    run.save_result("gate", verdict)
    return run


def answer(run: Run, option: str, user: str | None) -> None:
    """Airflow goes on with an answer; the way not taken is skipped, which it says by an exception."""
    task = Approval(task_id="approval", subject="?", run_uri=run.uri, hours=72)
    event = {
        "chosen_options": [option],
        "params_input": {},
        "responded_at": datetime.now(UTC),
        "responded_by_user": {"id": user, "name": user} if user else None,
    }
    gone = []
    task.do_branch = lambda context, branches_to_execute: gone.append(branches_to_execute)  # type: ignore[method-assign]
    task.execute_complete({"ti": SimpleNamespace()}, event)  # type: ignore[typeddict-item]
    assert gone == [["promote" if option == APPROVE else "reject"]]


def outcome(run: Run) -> tuple[str, str]:
    steps: dict[str, Any] = dict.fromkeys(report.STEPS)
    again = Run.at(run.uri)
    word, sentences = report.outcome(
        {**steps, **{s: again.find_result(s) for s in steps}}, {}, again.settings.model_dump()
    )
    return word, " ".join(sentences)


def test_without_an_answer_nothing_is_promoted(run: Run) -> None:
    assert outcome(run)[0] == "waiting"
    with pytest.raises(DataError, match="only with a person's approval"):
        promote.run(run)
    with pytest.raises(DataError, match="nothing to reject"):
        reject.run(run)


@pytest.mark.parametrize(("user", "said"), [("ana", "not approved by ana"), (None, "anybody within 72 hours")])
def test_no_is_a_rejection_with_its_reason(run: Run, user: str | None, said: str) -> None:
    answer(run, REJECT, user)
    again = Run.at(run.uri)
    result = reject.run(again)
    assert said in result["summary"]
    assert said in result["reasons"][0]
    again.save_result("reject", {**result, "seconds": 0})
    assert outcome(run) == ("rejected", f"Nothing is in production yet. {result['reasons'][0]}")
    with pytest.raises(DataError, match="only with a person's approval"):
        promote.run(Run.at(run.uri))


def test_yes_lets_the_candidate_through(run: Run) -> None:
    answer(run, APPROVE, "ana")
    assert Run.at(run.uri).result("approval") == {"summary": "approved by ana", "approved": True, "by": "ana"}
    with pytest.raises(DataError, match="no result of the train step"):  # what it looks for next
        promote.run(Run.at(run.uri))


def test_table_is_text_whatever_is_in_it() -> None:
    table = checks_table({"checks": [{**CHECK, "name": "a|b <i>", "observed": None}], "champion_version": "v1"})
    assert r"| ✓ | a\|b \<i\> | none |" in table
    assert "version v1" in table


@pytest.mark.parametrize(("observed", "said"), [(1.0, "yes"), (0.0, "no")])
def test_what_is_or_is_not_is_no_number(observed: float, said: str) -> None:
    check = {**CHECK, "name": "data valid", "observed": observed, "required": "yes"}
    assert f"| data valid | {said} | yes |" in checks_table({"checks": [check]})
