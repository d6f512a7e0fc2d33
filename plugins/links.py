"""The links on a task's page in Airflow: to what the Models page has of the run, and to the pod."""

from __future__ import annotations

import os
from urllib.parse import quote, urlsplit

import attrs
from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.configuration import conf
from airflow.sdk.types import TaskInstanceKey

PREFIX = "/retrain"  # where plugins/models_page.py puts its pages; inside Airflow's UI they are below /plugin/models


@attrs.define()
class PageLink(BaseOperatorLink):
    """A link to a page about the run.

    :param label: what the button says
    :param page: the page's name below the run
    """

    label: str
    page: str

    @property
    def name(self) -> str:
        """What the button says."""
        return self.label

    @property
    def xcom_key(self) -> str:
        """Where Airflow keeps the address."""
        return f"_link_{self.page}"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The page's address in Airflow's UI."""
        run = operator.run_uri.rsplit("/", 1)[-1]  # type: ignore[attr-defined]
        return page_url(f"{quote(ti_key.dag_id)}/runs/{quote(run)}/{self.page}")


@attrs.define()
class PodLink(BaseOperatorLink):
    """A link to where the cluster's own dashboard shows the step's pod.

    `RETRAIN_POD_URL` is the address of a pod there, with `{namespace}` and `{pod}` in it.
    """

    @property
    def name(self) -> str:
        """What the button says."""
        return "Pod"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey | None = None) -> str:
        """The pod's address, or nothing when no pod has been made."""
        place = operator.place  # type: ignore[attr-defined]
        if not place:
            return ""
        return os.environ["RETRAIN_POD_URL"].replace("{namespace}", place[0]).replace("{pod}", place[1])


def page_url(path: str, *, absolute: bool = False) -> str:
    """A page's address inside Airflow's UI; `absolute` for messages that leave it."""
    base = conf.get("api", "base_url", fallback="").rstrip("/")
    return f"{base if absolute else urlsplit(base).path}/plugin/models{PREFIX}/{path}"


REPORT = PageLink("Report", "report")
DATA_DOCS = PageLink("Data Docs", "docs")
MODEL_VERSION = PageLink("Model version", "version")
TENSORBOARD = PageLink("TensorBoard data", "tensorboard")

LINKS = {
    "validate": [DATA_DOCS],
    "train": [TENSORBOARD],
    "promote": [MODEL_VERSION],
    "report": [REPORT],
}
