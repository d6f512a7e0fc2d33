"""The Models page in Airflow: what is in production, what was, and how they compare. `models_app.py` has the pages."""

from __future__ import annotations

from typing import Any

from airflow.plugins_manager import AirflowPlugin

PREFIX = "/retrain"


class LazyApp:
    """The pages' application, imported when somebody looks: every Airflow component loads this file, few need more."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer as the application does."""
        from plugins.models_app import app  # noqa: PLC0415

        await app(scope, receive, send)


class ModelsPage(AirflowPlugin):
    """The pages and their entry in Airflow's navigation, for Airflow to find."""

    name = "retrain_models_page"
    fastapi_apps = [{"app": LazyApp(), "url_prefix": PREFIX, "name": "Models"}]  # noqa: RUF012
    external_views = [  # noqa: RUF012
        {
            "name": "Models",
            "href": f"{PREFIX}/",
            "destination": "nav",
            "url_route": "models",
            "icon": f"{PREFIX}/static/models.svg",
            "icon_dark_mode": f"{PREFIX}/static/models-dark.svg",
            "nav_top_level": True,
        }
    ]
