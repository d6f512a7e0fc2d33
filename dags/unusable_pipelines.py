"""Shows a broken file in `config/` as an import error in Airflow: its name, the setting and what is wrong with it.

Raising in `retrain.py` would take down the DAGs of the other files too: when a DAG file raises, Airflow drops every dag
that it has made so far. So that file makes the dags of the good pipelines, and this one complains about the others.
"""

from __future__ import annotations

from plugins.pipelines import read_pipelines
from tasks.errors import SettingsError

faults = read_pipelines()[1]
if faults:
    raise SettingsError("\n".join(faults))
