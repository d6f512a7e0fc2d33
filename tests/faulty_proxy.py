"""A proxy between client and store that does what networks and busy servers do, by a seeded schedule.

    with faulty_proxy(server.port, seed=7, rate=0.2) as proxy:
        os.environ["S3_ENDPOINT_URL"] = proxy.endpoint

Requests reach the store byte for byte, so that their signatures hold.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = (
    "delayed",  # the request waits
    "cut before",  # the connection ends before the request has arrived
    "cut after",  # the request was done, and the answer is lost
    "cut inside",  # the answer breaks off
    "twice",  # the request arrives twice, and the second answer is given
    "500",
    "503",
    "503 after",  # the request was done, and the answer is that it was not
    "slow",  # the answer trickles
)


@dataclass
class Proxy:
    """A running proxy: where it is, and what it has done."""

    endpoint: str = ""
    counts: Counter[str] = field(default_factory=Counter)


@contextmanager
def faulty_proxy(
    port: int, seed: int = 0, rate: float = 0.2, without_headers: frozenset[str] = frozenset()
) -> Iterator[Proxy]:
    """A proxy to a port of this machine; `without_headers` (in lower case) do not get through."""
    dice, lock, proxy = random.Random(seed), threading.Lock(), Proxy()  # noqa: S311

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self, body: bytes) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"expect", "connection", *without_headers}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            return connection.getresponse()

        def _give(self, answer: http.client.HTTPResponse, fault: str) -> None:
            content = answer.read()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                    self.send_header(name, value)
            length = answer.headers["Content-Length"] if self.command == "HEAD" else str(len(content))
            if answer.status not in {204, 304}:
                self.send_header("Content-Length", length or "0")
            self.end_headers()
            if fault == "cut inside":
                content = content[: len(content) // 2]
                self.close_connection = True
            for start in range(0, len(content), max(1, len(content) // 5)):
                self.wfile.write(content[start : start + max(1, len(content) // 5)])
                if fault == "slow":
                    self.wfile.flush()
                    time.sleep(0.05)

        def _fail(self, status: int) -> None:
            code = {500: "InternalError", 503: "SlowDown"}[status]
            content = f"<Error><Code>{code}</Code><Message>try again</Message></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                fault = dice.choice(FAULTS) if dice.random() < rate else "none"
                proxy.counts[fault] += 1
            if fault == "delayed":
                time.sleep(0.2)
            if fault in {"500", "503"}:
                return self._fail(int(fault))
            if fault != "cut before":
                answer = self._forward(body)
                if fault == "twice":
                    answer.read()
                    answer = self._forward(body)
                if fault == "503 after":
                    answer.read()
                    return self._fail(503)
                if fault != "cut after":
                    return self._give(answer, fault)
            self.close_connection = True
            return None

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a client that went away is what is being tried

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield proxy
        server.shutdown()
