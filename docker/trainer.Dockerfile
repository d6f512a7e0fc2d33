# The image that every step runs in: the same lock as on a laptop. With it Airflow too can run its steps as processes.
#
#   docker build -f docker/trainer.Dockerfile -t retrain-trainer --build-arg COMMIT=$(git rev-parse HEAD) .
#   docker run --rm retrain-trainer --version
#
# For GPUs add `--build-arg REQUIREMENTS=requirements-gpu.txt`: the same lock with TensorFlow's CUDA libraries.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS libraries
ARG REQUIREMENTS=requirements.txt
RUN python3 -m venv /opt/venv
COPY ${REQUIREMENTS} /tmp/requirements.txt
RUN /opt/venv/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check --require-hashes -r /tmp/requirements.txt \
    && /opt/venv/bin/pip uninstall --yes --quiet --disable-pip-version-check pip

FROM ${BASE}
RUN useradd --uid 10001 --create-home retrain && install -d -o retrain /opt/airflow
COPY --from=libraries /opt/venv /opt/venv
WORKDIR /opt/retrain
COPY config config
COPY dags dags
COPY k8s/pods k8s/pods
COPY plugins plugins
COPY retrain_models retrain_models
COPY tasks tasks
COPY examples/demo/corpus examples/demo/corpus
COPY examples/demo/base-model examples/demo/base-model
ARG COMMIT=""
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/retrain \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TF_CPP_MIN_LOG_LEVEL=2 \
    RETRAIN_COMMIT=${COMMIT}
USER 10001
HEALTHCHECK CMD ["python", "-m", "tasks", "--version"]
ENTRYPOINT ["python", "-m", "tasks"]
CMD ["--help"]
