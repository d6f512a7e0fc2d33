"""reject: leave production where it is, and say why.

    python -m tasks reject --run s3://retrain/runs/RUN_ID

Reads    runs/RUN_ID/results/gate.json, results/approval.json if a person was asked, models/NAME/production.json
Writes   nothing but its result: production's version, and the reasons against the candidate
"""

from __future__ import annotations

from typing import Any

from tasks import registry
from tasks.errors import DataError
from tasks.run import Run


def run(run: Run) -> dict[str, Any]:
    """State the refusal. Raises `DataError` when neither the gate nor a person refused the candidate."""
    gate, approval = run.result("gate"), run.find_result("approval")
    declined = approval is not None and not approval["approved"]
    if gate["decision"] != "reject" and not declined:
        raise DataError(f"the gate of {run.uri} decided {gate['decision']!r}: nothing to reject")
    pointer = registry.read_pointer(run.store, run.settings.name)
    reasons = [check["sentence"] for check in gate["checks"] if not check["passed"]]
    why = f"{len(reasons)} checks failed: {' '.join(reasons)}"
    if approval and not reasons:
        why = approval["summary"]
        reasons = [f"The candidate was {why}."]
    stays = f"production stays at {pointer.version}" if pointer else "there is no production model yet"
    return {
        "summary": f"{stays}; {why}",
        "production": pointer.version if pointer else None,
        "reasons": reasons,
    }
