# MinIO, and `mc`, with which its users are made, from source, which is how its maintainers give them away; MinIO is the
# version of .ci/run.
ARG GO=golang:1.24-bookworm
ARG BASE=debian:bookworm-slim

FROM ${GO} AS build
ARG MINIO=v0.0.0-20260212201848-7aac2a2c5b7c
ARG MC=v0.0.0-20250313080218-cf909e1063a9
RUN CGO_ENABLED=0 GOBIN=/out go install github.com/minio/minio@${MINIO} && \
    CGO_ENABLED=0 GOBIN=/out go install github.com/minio/mc@${MC}

FROM ${BASE}
COPY --from=build /out/minio /out/mc /usr/local/bin/
RUN useradd --uid 10002 --create-home minio && install -d -o minio /data
USER 10002
VOLUME /data
HEALTHCHECK --interval=5s --retries=10 CMD bash -c \
    'exec 3<>/dev/tcp/127.0.0.1/9000; printf "GET /minio/health/ready HTTP/1.1\r\nHost: store\r\nConnection: close\r\n\r\n" >&3; grep -q "200 OK" <&3'
ENTRYPOINT ["minio", "server", "/data", "--address", ":9000", "--console-address", ":9001"]
