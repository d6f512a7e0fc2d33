"""reject: leave production where it is, and say why.

    python -m tasks reject --run s3://retrain/runs/RUN_ID

Reads    runs/RUN_ID/results/gate.json, models/NAME/production.json
Writes   nothing but its result: production's version, and the reasons against the candidate
"""

from __future__ import annotations

from typing import Any

from tasks import registry
from tasks.errors import DataError
from tasks.run import Run


def run(run: Run) -> dict[str, Any]:
    """State the refusal. Raises `DataError` when the gate let the candidate through."""
    gate = run.result("gate")
    if gate["decision"] != "reject":
        raise DataError(f"the gate of {run.uri} decided {gate['decision']!r}: nothing to reject")
    pointer = registry.read_pointer(run.store, run.settings.name)
    reasons = [check["sentence"] for check in gate["checks"] if not check["passed"]]
    stays = f"production stays at {pointer.version}" if pointer else "there is no production model yet"
    return {
        "summary": f"{stays}; {len(reasons)} checks failed: {' '.join(reasons)}",
        "production": pointer.version if pointer else None,
        "reasons": reasons,
    }
