"""A person between the gate and production, in pipelines whose settings say `approval: human`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import HITLBranchOperator
from airflow.sdk import Context

from plugins.store_connection import use_store_connection

APPROVE, REJECT = "Approve", "Reject"


class Approval(HITLBranchOperator):
    """Waits, without a worker slot, until a person says whether what the gate let through becomes production.

    As Airflow's ApprovalOperator, but a no leads to `reject`, so that the run says what became of the candidate; and
    the answer is written to the run in the store, where the report finds it. No answer in time is a no.
    """

    template_fields = (*HITLBranchOperator.template_fields, "run_uri")

    def __init__(self, *, run_uri: str, hours: float, **kwargs: Any) -> None:
        super().__init__(
            options=[APPROVE, REJECT],
            options_mapping={APPROVE: "promote", REJECT: "reject"},
            defaults=[REJECT],
            response_timeout=timedelta(hours=hours),
            **kwargs,
        )
        self.run_uri = run_uri
        self.hours = hours

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Write the answer down, then go the way that it means; Airflow leaves by an exception there."""
        if "error" not in event:
            self._record(event)
        return super().execute_complete(context, event)

    def _record(self, event: dict[str, Any]) -> None:
        from tasks.run import Run  # noqa: PLC0415  (brings boto3)

        use_store_connection()
        approved = event["chosen_options"] == [APPROVE]
        who = (event["responded_by_user"] or {}).get("name")  # nobody's, when the time was up
        if approved:
            summary = f"approved by {who}"
        else:
            summary = f"not approved by {who}" if who else f"not approved by anybody within {self.hours:g} hours"
        Run.at(self.run_uri).save_result("approval", {"summary": summary, "approved": approved, "by": who})
        self.log.info("%s", summary)


def checks_table(verdict: Mapping[str, Any]) -> str:
    """The gate's checks as a Markdown table."""
    rows = ["| | check | observed | required |", "|---|---|---|---|"]
    for check in verdict["checks"]:
        mark = "✓" if check["passed"] else "✗"
        rows.append(f"| {mark} | {plain(check['name'])} | {seen(check)} | {plain(check['required'])} |")
    champion = verdict.get("champion_version")
    against = (
        f"version {champion}, which is in production" if champion else "the base model: there is no production yet"
    )
    return "\n".join([f"Compared with {against}.", "", *rows])


def seen(check: Mapping[str, Any]) -> str:
    """What a check observed, as people read it."""
    if check["observed"] is None:
        return "none"
    if check["required"] == "yes":
        return "yes" if check["observed"] else "no"
    return f"{check['observed']:.4g}"


def plain(text: str) -> str:
    """Text that Markdown leaves alone."""
    return "".join(f"\\{character}" if character in r"\`*_{}[]<>()#+!|" else character for character in text)
