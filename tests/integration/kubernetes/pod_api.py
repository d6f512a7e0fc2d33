"""A stand-in for a cluster: the part of Kubernetes' API that KubernetesPodOperator uses, over real HTTP.

A pod's command runs as a process of this machine, with the environment that its spec gives it and no more. What a real
cluster does to a pod, this does too, and says it in the same words: it refuses a spec that does not fit Kubernetes'
OpenAPI schema, finds no node with a GPU, does not find an image or a Secret, kills what needs more memory than its
limit, evicts what fills its volume, ends what outlives its deadline, and stops with SIGTERM, then SIGKILL, what is
deleted. Requests with the token of Airflow's service account are refused unless its Role grants them.

The same tests run against a real cluster where there is one, so that this cannot drift from it unnoticed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import psutil

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = "1.34"  # Kubernetes' version, for the schema that pods are checked against
PATHS = re.compile(r"/api/v1/namespaces/(?P<namespace>[^/]+)/(?P<kind>pods|events)(/(?P<name>[^/]+)(/(?P<sub>log))?)?$")
SIZES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def size(quantity: str) -> int:
    """Bytes, of a quantity such as 200Mi."""
    number, unit = quantity[:-2], quantity[-2:]
    return int(number) * SIZES[unit]


class Pod:
    """A pod and its process."""

    def __init__(self, cluster: Cluster, document: dict[str, Any]) -> None:
        self.cluster = cluster
        self.document = document
        self.container = document["spec"]["containers"][0]
        self.process: subprocess.Popen[bytes] | None = None
        self.log: list[tuple[float, bytes]] = []
        self.scratch = Path(tempfile.mkdtemp(dir=cluster.folder))
        self.killed_because: tuple[str, str] | None = None  # reason and message
        self.deleted = threading.Event()
        document["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        document["status"] = {"phase": "Pending", "conditions": []}

    @property
    def name(self) -> str:
        return self.document["metadata"]["name"]

    @property
    def status(self) -> dict[str, Any]:
        return self.document["status"]

    def live(self) -> None:
        """The pod's life, in a thread of its own."""
        resources = self.container.get("resources", {})
        if int(resources.get("limits", {}).get("nvidia.com/gpu", 0)):
            message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
            self._condition("PodScheduled", "False", "Unschedulable", message)
            self._event("Warning", "FailedScheduling", message)
            return
        self._condition("PodScheduled", "True", None, None)
        self.status["startTime"] = now()
        if self.container["image"] not in self.cluster.images:
            message = f'failed to pull and unpack image "{self.container["image"]}": not found'
            self._event("Warning", "Failed", message)
            self._container({"waiting": {"reason": "ErrImagePull", "message": message}})
            return
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "TMPDIR": str(self.scratch), "HOSTNAME": self.name}
        for source in self.container.get("envFrom", []):
            secret = source["secretRef"]["name"]
            if secret not in self.cluster.secrets:
                message = f'secret "{secret}" not found'
                self._event("Warning", "Failed", f"Error: {message}")
                self._container({"waiting": {"reason": "CreateContainerConfigError", "message": message}})
                return
            environment |= self.cluster.secrets[secret]
        # `valueFrom` gives the limits; what a limit that is not set reads as here, the node's size, is none.
        environment |= {each["name"]: each.get("value", "0") for each in self.container.get("env", [])}
        self._run(environment)

    def _run(self, environment: dict[str, str]) -> None:
        last_words = self.scratch.with_suffix(".termination-log")
        last_words.touch()
        self.process = subprocess.Popen(
            [*self.container["command"], *self.container.get("args", [])],
            cwd=ROOT,
            env=environment | {"RETRAIN_TERMINATION_LOG": str(last_words)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        self.status["phase"] = "Running"
        self._container({"running": {"startedAt": now()}})
        self._event("Normal", "Started", "Started container base")
        threading.Thread(target=self._watch_limits, daemon=True).start()
        assert self.process.stdout
        for line in self.process.stdout:
            self.log.append((time.time(), line))
        code = self.process.wait()
        self._end(128 - code if code < 0 else code, last_words.read_text())
        last_words.unlink()

    def _end(self, code: int, last_words: str) -> None:
        if code and not last_words and self.container.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            last_words = b"".join(line for _, line in self.log[-80:]).decode(errors="replace")[-2048:]
        reason = "Completed" if code == 0 else "Error"
        if self.killed_because and self.killed_because[0] == "OOMKilled":
            reason = "OOMKilled"
        elif self.killed_because:
            self.status["reason"], self.status["message"] = self.killed_because
        ended = {"exitCode": code, "reason": reason, "message": last_words, "finishedAt": now(), "startedAt": now()}
        self._container({"terminated": ended})
        self.status["phase"] = "Failed" if code or self.killed_because else "Succeeded"
        if self.deleted.is_set():
            self.cluster.remove(self)

    def _watch_limits(self) -> None:
        """What kernel and kubelet do to a container that takes more than it may."""
        limits = self.container.get("resources", {}).get("limits", {})
        volumes = [volume["emptyDir"] for volume in self.document["spec"].get("volumes", []) if "emptyDir" in volume]
        room = next((each["sizeLimit"] for each in volumes if "sizeLimit" in each and "medium" not in each), None)
        deadline = time.time() + self.document["spec"].get("activeDeadlineSeconds", 1e9)
        assert self.process
        while self.process.poll() is None and self.killed_because is None:
            with contextlib.suppress(psutil.Error, OSError):
                if "memory" in limits and psutil.Process(self.process.pid).memory_info().rss > size(limits["memory"]):
                    self._kill("OOMKilled", "")
                used = sum(file.stat().st_size for file in self.scratch.rglob("*") if file.is_file())
                if room and used > size(room):
                    self._kill("Evicted", f'Usage of EmptyDir volume "scratch" exceeds the limit "{room}". ')
                if time.time() > deadline:
                    self._kill("DeadlineExceeded", "Pod was active on the node longer than the specified deadline")
            time.sleep(0.05)

    def _kill(self, reason: str, message: str) -> None:
        self.killed_because = (reason, message)
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the container."""
        if self.process and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def delete(self, grace: int) -> None:
        """SIGTERM, and SIGKILL after the grace; the pod is gone once its process is, or at once without a grace."""
        self.deleted.set()
        self.document["metadata"].setdefault("deletionTimestamp", now())
        if self.process is None or self.process.poll() is not None or grace == 0:
            self.signal(signal.SIGKILL)
            self.cluster.remove(self)
            return
        self.signal(signal.SIGTERM)
        timer = threading.Timer(grace, self.signal, [signal.SIGKILL])
        timer.daemon = True
        timer.start()

    def _container(self, state: dict[str, Any]) -> None:
        image = self.container["image"]
        ready = "running" in state
        status = {"name": self.container["name"], "image": image, "imageID": image, "ready": ready, "restartCount": 0}
        self.status["containerStatuses"] = [status | {"state": state, "lastState": {}}]

    def _condition(self, kind: str, status: str, reason: str | None, message: str | None) -> None:
        self.status["conditions"] = [{"type": kind, "status": status, "reason": reason, "message": message}]

    def _event(self, kind: str, reason: str, message: str) -> None:
        self.cluster.add_event(self, kind, reason, message)


class Cluster:
    """One node without a GPU, and an API server on a free port of the loopback interface.

    `used` collects the verb and resource of each request with `worker_token`, as an audit log does; `granted` are those
    that are not refused.
    """

    def __init__(self, folder: Path, images: set[str], granted: set[tuple[str, str]]) -> None:
        self.folder, self.images, self.granted = folder, images, granted
        self.secrets: dict[str, dict[str, str]] = {}
        self.used: set[tuple[str, str]] = set()
        self.admin_token, self.worker_token = uuid.uuid4().hex, uuid.uuid4().hex
        self.pods: dict[str, Pod] = {}
        self.events: list[dict[str, Any]] = []
        cluster = self

        class Handler(_Handler):
            def __init__(self, *arguments: Any) -> None:
                self.cluster = cluster
                super().__init__(*arguments)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        """Stop the server, and whatever still runs."""
        self.server.shutdown()
        self.server.server_close()
        for pod in list(self.pods.values()):
            pod.signal(signal.SIGKILL)

    def create(self, document: dict[str, Any]) -> Pod:
        kubernetes_validate.validate(document, SCHEMA, strict=True)
        pod = self.pods[document["metadata"]["name"]] = Pod(self, document)
        threading.Thread(target=pod.live, daemon=True).start()
        return pod

    def remove(self, pod: Pod) -> None:
        self.pods.pop(pod.name, None)
        shutil.rmtree(pod.scratch, ignore_errors=True)

    def add_event(self, pod: Pod, kind: str, reason: str, message: str) -> None:
        number = str(len(self.events) + 1)
        metadata = {"name": f"{pod.name}.{number}", "uid": str(uuid.uuid4()), "resourceVersion": number}
        involved = {"kind": "Pod", "name": pod.name, "fieldPath": "spec.containers{base}"}
        event = {"metadata": metadata, "involvedObject": involved, "type": kind, "reason": reason, "message": message}
        self.events.append(event)


def selects(selector: str, labels: dict[str, str]) -> bool:
    """Whether labels fit a selector of `a=b`, `a!=b`, `a` and `!a`."""
    for part in filter(None, selector.split(",")):
        if "!=" in part:
            name, value = part.split("!=")
            fits = labels.get(name) != value
        elif "=" in part:
            name, value = part.split("=")
            fits = labels.get(name) == value
        else:
            fits = (part.lstrip("!") in labels) is not part.startswith("!")
        if not fits:
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def do_GET(self) -> None:
        if not (asked := self._asked({"pods": "get" if self._name() else "list", "events": "list"})):
            return
        if asked["kind"] == "events":
            self._events()
        elif not asked["name"]:
            selector = self.query.get("labelSelector", "")
            pods = [each.document for each in list(self.cluster.pods.values())]
            found = [each for each in pods if selects(selector, each["metadata"].get("labels", {}))]
            self._answer(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found})
        elif pod := self._pod(asked["name"]):
            self._send_log(pod) if asked["sub"] else self._answer(200, pod.document)

    def do_POST(self) -> None:
        body = self._body()
        if self._asked({"pods": "create"}):
            try:
                self._answer(201, self.cluster.create(body).document)
            except kubernetes_validate.ValidationError as error:
                self._refuse(422, "Invalid", f"Pod is invalid: {error.message}")

    def do_PATCH(self) -> None:
        body = self._body()
        if (asked := self._asked({"pods": "patch"})) and (pod := self._pod(asked["name"])):
            pod.document["metadata"].setdefault("labels", {}).update(body["metadata"]["labels"])
            self._answer(200, pod.document)

    def do_DELETE(self) -> None:
        body = self._body()
        if (asked := self._asked({"pods": "delete"})) and (pod := self._pod(asked["name"])):
            given = self.query.get("gracePeriodSeconds", body.get("gracePeriodSeconds"))
            grace = pod.document["spec"].get("terminationGracePeriodSeconds", 30) if given is None else int(given)
            pod.delete(grace)
            self._answer(200, pod.document)

    def _events(self) -> None:
        name = self.query.get("fieldSelector", "").removeprefix("involvedObject.name=")
        events = [each for each in list(self.cluster.events) if each["involvedObject"]["name"] == name]
        if self.query.get("watch"):
            self._start_stream("application/json")
            for event in events:
                self._chunk(json.dumps({"type": "ADDED", "object": event}).encode() + b"\n")
            time.sleep(min(int(self.query.get("timeoutSeconds", 1)), 2))
            self._chunk(b"")
        else:
            version = {"resourceVersion": str(len(self.cluster.events))}
            self._answer(200, {"kind": "EventList", "apiVersion": "v1", "metadata": version, "items": events})

    def _send_log(self, pod: Pod) -> None:
        since = time.time() - int(self.query.get("sinceSeconds", 10**9))
        follow, stamped = (self.query.get(name, "").lower() == "true" for name in ("follow", "timestamps"))
        self._start_stream("text/plain")
        sent = 0
        while True:
            over = not follow or pod.status["phase"] in {"Succeeded", "Failed"} or pod.name not in self.cluster.pods
            for moment, line in pod.log[sent:]:
                sent += 1
                if moment >= since:
                    stamp = datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z ") if stamped else ""
                    self._chunk(stamp.encode() + line)
            if over:
                break
            time.sleep(0.1)
        self._chunk(b"")

    def _name(self) -> str | None:
        path = PATHS.match(urlsplit(self.path).path)
        return path and path["name"]

    def _asked(self, verbs: dict[str, str]) -> dict[str, Any] | None:
        """What the request asks for, unless it is refused; `verbs` are the method's, by resource."""
        address = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(address.query).items()}
        path = PATHS.match(address.path)
        if not path or path["kind"] not in verbs:
            self._refuse(404, "NotFound", f"this stand-in has no {self.command} {self.path}")
            return None
        verb = "watch" if self.query.get("watch") else verbs[path["kind"]]
        right = (verb, path["kind"] + (f"/{path['sub']}" if path["sub"] else ""))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == self.cluster.worker_token:
            self.cluster.used.add(right)
            if right not in self.cluster.granted:
                self._refuse(403, "Forbidden", f'{path["kind"]} is forbidden: User "worker" cannot {verb} it')
                return None
        elif token != self.cluster.admin_token:
            self._refuse(401, "Unauthorized", "Unauthorized")
            return None
        return path.groupdict()

    def _pod(self, name: str) -> Pod | None:
        pod = self.cluster.pods.get(name)
        if pod is None:
            self._refuse(404, "NotFound", f'pods "{name}" not found')
        return pod

    def _body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")

    def _refuse(self, code: int, reason: str, message: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        self._answer(code, status | {"reason": reason, "message": message, "code": code})

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _start_stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
