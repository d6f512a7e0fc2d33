# Airflow itself, for a cluster whose steps run in pods of the trainer image: no TensorFlow, so a tenth of its size.
#
#   docker build -f docker/airflow.Dockerfile -t retrain-airflow .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS libraries
RUN python3 -m venv /opt/venv
COPY requirements-airflow.txt /tmp/requirements.txt
RUN /opt/venv/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check --require-hashes -r /tmp/requirements.txt \
    && /opt/venv/bin/pip uninstall --yes --quiet --disable-pip-version-check pip

FROM ${BASE}
# 50000 in group 0, as in Airflow's own image: its Helm chart expects them.
RUN useradd --uid 50000 --gid 0 --create-home airflow && install -d -o airflow -g 0 -m 775 /opt/airflow
COPY --from=libraries /opt/venv /opt/venv
WORKDIR /opt/retrain
COPY config config
COPY dags dags
COPY k8s/pods k8s/pods
COPY plugins plugins
COPY retrain_models retrain_models
COPY tasks tasks
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/retrain \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    AIRFLOW_HOME=/opt/airflow
# As in Airflow's own image: the chart and KubernetesExecutor give whole commands, and the chart's probes call /entrypoint.
# Where DAGs and plugins are is said in the chart's values, which the image's environment would outweigh.
RUN printf '#!/bin/sh\nexec "$@"\n' >/entrypoint && chmod 755 /entrypoint
USER 50000
ENTRYPOINT ["/entrypoint"]
CMD ["airflow", "version"]
