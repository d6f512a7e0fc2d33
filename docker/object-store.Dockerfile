# MinIO from source, which is how its maintainers give it away; the version as in .ci/run.
ARG GO=golang:1.24-bookworm
ARG BASE=debian:bookworm-slim

FROM ${GO} AS build
ARG MINIO=v0.0.0-20260212201848-7aac2a2c5b7c
RUN CGO_ENABLED=0 GOBIN=/out go install github.com/minio/minio@${MINIO}

FROM ${BASE}
COPY --from=build /out/minio /usr/local/bin/minio
RUN useradd --uid 10002 --create-home minio && install -d -o minio /data
USER 10002
VOLUME /data
HEALTHCHECK --interval=5s --retries=10 CMD bash -c \
    'exec 3<>/dev/tcp/127.0.0.1/9000; printf "GET /minio/health/ready HTTP/1.1\r\nHost: store\r\nConnection: close\r\n\r\n" >&3; grep -q "200 OK" <&3'
ENTRYPOINT ["minio", "server", "/data", "--address", ":9000", "--console-address", ":9001"]
